"""A warm PPO step of the shape of Llama-3.2-1B (`end_to_end.SIZES`), bf16: each phase against the least that it needs,
then the same under the profiler. What it measures of moves and memory is read by the parts that report them.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peak_memory
import torch
from ceilings import ceilings
from end_to_end import SIZES, Size, arguments, make_inputs

from gpu_parts import trace as traces
from gpu_parts.report import Report, SkipPart, table
from gpu_parts.roofline import least_seconds

PHASES = ("sampling", "feedback", "experience", "learning", "health")
RECORD = "step.json"  # in the scratch folder: what other parts read


def size_of(report: Report) -> Size:
    return SIZES["tiny" if report.small else "1b"]


def inputs(report: Report) -> Path:
    """The folder with models and prompts; the first part that needs them writes them."""
    folder, ready = report.scratch / "inputs", report.scratch / "inputs-are-whole"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_inputs(folder, size_of(report))
        ready.touch()
    return folder


def step_record(report: Report) -> dict[str, Any]:
    """What this part has measured. Raises SkipPart if it has not come so far."""
    if not (report.scratch / RECORD).exists():
        raise SkipPart("the part `step` has measured nothing")
    found: dict[str, Any] = json.loads((report.scratch / RECORD).read_text())
    return found


def run(report: Report) -> None:
    from fastppo.config import PPO, parse
    from fastppo.distributed import start_world
    from fastppo.monitor import Phases, setup_logging
    from fastppo.ppo import set_up
    from fastppo.train import ppo_step

    argv = arguments(inputs(report), size_of(report), "bf16", 3, plan="warn", threads=1 if report.small else 2)
    config = parse(argv, PPO)
    world = start_world(config.threads)
    setup_logging(0)
    record: dict[str, Any] = {"arguments": argv, "before": peak_memory.in_use(world.device), "peaks": {}}

    class MeasuredPhases(Phases):
        """Notes the highest memory of each phase, too."""

        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            peak_memory.mark(world.device)
            with super().__call__(name):
                yield
            record["peaks"][name] = peak_memory.peak(world.device)

    setup = set_up(config, world)
    assert setup is not None
    setup = replace(setup, phases=MeasuredPhases(setup.progress.seconds))
    prompts, tokens = setup.batches(), size_of(report).prompts * size_of(report).response_tokens

    def one_step() -> dict[str, float]:
        done = ppo_step(setup, prompts)
        setup.progress.end_step()
        update = done.updates[0]
        record["first_update"] = {"ratio_mean": update.ratio_mean, "approx_kl": update.approx_kl}
        return {name.removeprefix("time/"): seconds for name, seconds in setup.phases.take().items()}

    cold = one_step()
    report.add("cold step", f"first step {sum(cold.values()):.2f} s, with what is done once", seconds=cold)
    record["peaks"].clear()
    warm = one_step()
    write_record(report, record | {"seconds": warm})
    report_phases(report, warm, tokens, record["first_update"], world.device)
    moves(record, setup.roles.residency, world.device)
    write_record(report, record | {"seconds": warm})
    profiled(report, one_step, record | {"seconds": warm}, world.device)


def moves(record: dict[str, Any], residency: Any, device: torch.device) -> None:
    """Into the record: seconds in which each phase gets what it uses, nothing else running, and what there is then."""
    record["moves"] = []
    for phase in ("sampling", "feedback", "experience", "learning"):  # from the end of a step on
        start = time.perf_counter()
        with residency.holding(phase):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        row = {"phase": phase, "s": time.perf_counter() - start, "in_use_gb": peak_memory.in_use(device) / 1e9}
        record["moves"].append(row)


def write_record(report: Report, record: dict[str, Any]) -> None:
    (report.scratch / RECORD).write_text(json.dumps(record))


def report_phases(
    report: Report, warm: dict[str, float], tokens: int, first_update: dict[str, float], device: torch.device
) -> None:
    size, most = size_of(report), ceilings(device)
    least = least_seconds(size, most)
    rows = [
        {"phase": name, "s": seconds, "least_s": least[name], "times_least": seconds / least[name]}
        for name, seconds in warm.items()
        if name in least
    ]
    whole, bound = sum(warm.values()), sum(least.values())
    rows.append({"phase": "step", "s": whole, "least_s": bound, "times_least": whole / bound})
    title = f"warm step, {size.prompts} x ({size.prompt_tokens} + {size.response_tokens}) tokens, {size.epochs} epochs,"
    title += f" bf16, on {most.device}; least by {most.bandwidth / 1e9:,.0f} GB/s and {most.flops / 1e12:,.2f} TFLOP/s"
    title += f" ({most.source}); {tokens / whole:,.0f} response tokens/s; first update at ratio"
    title += f" {first_update['ratio_mean']:.6f}, approximate KL {first_update['approx_kl']:.1e}"
    report.add("warm step", f"{title}\n{table(rows)}", phases=rows, seconds=whole, least=bound, **first_update)


def profiled(report: Report, one_step: Any, record: dict[str, Any], device: torch.device) -> None:
    """A step under the profiler; its trace stays in the folder of the results."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        seconds = one_step()
    path = report.scratch / "trace.json"
    profiler.export_chrome_trace(str(path))
    trace = traces.read_trace(path, PHASES)
    what = "kernels" if any(span.kind == "kernel" for span in trace.busy) else "operators on the CPU"
    rows = []
    for phase in trace.phases:
        spans = traces.inside(trace.busy, phase)
        busy = traces.busy_seconds(spans)
        waits = traces.host_waits(trace, phase)
        row = {"phase": phase.name, "s": phase.length / 1e6, "busy_s": busy, "spans": len(spans), "waits": len(waits)}
        rows.append(row | {"waits_s": traces.busy_seconds(waits)})
    text = f"the step again, under the profiler ({sum(seconds.values()):.2f} s); spans: {what}\n{table(rows)}"
    report.add("profile", text, phases=rows)
    gaps = [gap._asdict() for gap in traces.longest_gaps(trace)]
    shown = [
        {"ms": (g["end"] - g["start"]) / 1e3, "phase": g["phase"], "host": traces.short(g["host"], 40)}
        | {"after": traces.short(g["after"], 40), "before": traces.short(g["before"], 40)}
        for g in gaps
    ]
    report.add("gaps", f"longest times without {what}\n{table(shown)}", gaps=shown)
    for phase in (phase for phase in trace.phases if phase.name in ("sampling", "learning")):
        found = traces.by_name(traces.inside(trace.busy, phase), 10)
        report.add(f"{what} of {phase.name}", f"{what} of {phase.name} by time\n{table(found)}", spans=found)
    write_record(report, record | {"copies": traces.copies(trace)})
    with path.open("rb") as plain, gzip.open(report.output / "trace.json.gz", "wb", compresslevel=1) as packed:
        shutil.copyfileobj(plain, packed)
    print(f"trace: {report.output / 'trace.json.gz'}", file=sys.stderr)
