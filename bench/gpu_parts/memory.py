"""The peak of each phase of the warm step against the memory plan of the same settings."""

from __future__ import annotations

import torch

from gpu_parts.report import Report, table
from gpu_parts.step import step_record


def run(report: Report) -> None:
    from fastppo.config import PPO, parse
    from fastppo.planner import make_plan, this_machine
    from fastppo.planner.memory import by_phase

    record = step_record(report)
    cpu = not torch.cuda.is_available()
    plan = make_plan(parse(record["arguments"], PPO), this_machine(1, 1, cpu=cpu))
    rows = []
    for phase, places in by_phase(plan.shares):
        if phase in record["peaks"]:
            planned = places.gpu.total + (places.host.total if cpu else 0)
            measured = record["peaks"][phase] - record["before"]
            row = {"phase": phase, "planned_gb": planned / 1e9, "measured_gb": measured / 1e9}
            rows.append(row | {"off": f"{planned / measured - 1:+.1%}" if measured > 0 else ""})
    what = "this process above its start" if cpu else "torch's allocator"
    phase, _ = plan.peak
    text = f"peak memory of the warm step ({what}), planned highest in {phase}"
    report.add("memory", f"{text}\n{table(rows)}", phases=rows, planned_peak=phase, fits=plan.fits)
