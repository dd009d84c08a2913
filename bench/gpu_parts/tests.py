"""The tests that only a GPU can run, those of kernels first. What did not fit into the time is counted, not failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_parts.pytest_lines import LINES
from gpu_parts.report import Report, table

ROOT = Path(__file__).resolve().parents[2]
# All marked `gpu`: kernels, attention, decode graphs, then whole steps and runs, which take half a minute each.
FILES = (
    "tests/ops",
    "tests/models/test_backends.py",
    "tests/rollout/test_graphs.py",
    "tests/test_on_gpu.py",
)
# On the CPU, where none of the others can run.
SMALL = ("-k", "judge_that_is_the_proxy", "tests/rewards/test_best_of_n_estimate.py")
KEPT = 5.0  # seconds to write down what there is, before the part itself is cut off
WORKERS = 4


def run(report: Report) -> None:
    lines = report.scratch / "tests.jsonl"
    lines.touch()
    workers = ["-n", str(WORKERS), "--dist", "loadfile"] if find_spec("xdist") and not report.small else []
    chosen = list(SMALL) if report.small else ["-m", "gpu", *FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_parts.pytest_lines", "-p", "no:cacheprovider", *workers]
    command += ["-o", "addopts="]  # they name options of plugins that may not be here
    environment = os.environ | {LINES: str(lines)}
    process = subprocess.Popen([*command, *chosen], cwd=ROOT, env=environment)
    cut_off = False
    try:
        process.wait(max(report.seconds_left() - KEPT, 1.0))
    except subprocess.TimeoutExpired:
        cut_off = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
        process.kill()
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    summarise(report, found, cut_off=cut_off)
    if not found and not cut_off:
        raise RuntimeError(f"pytest ended with status {process.returncode} before its first test")


def summarise(report: Report, found: list[dict[str, Any]], *, cut_off: bool) -> None:
    """found: a record of each test that was run, as `pytest_lines` writes them."""
    counts = {kind: sum(one["outcome"] == kind for one in found) for kind in ("passed", "failed", "skipped")}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    files = sorted({one["test"].partition("::")[0] for one in found})
    text += f" in {', '.join(files)}" + ("; cut off before the rest" if cut_off else "")
    report.add("tests", text, cut_off=cut_off, files=files, **counts)
    for one in found:
        if one["outcome"] == "failed":
            report.add("failed test", f"FAILED {one['test']}: {one['error']}", **one)
    slowest = sorted(found, key=lambda one: -one["seconds"])[:5]
    report.add("slowest tests", table([{"test": x["test"], "s": x["seconds"]} for x in slowest]), tests=slowest)
