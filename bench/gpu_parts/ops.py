"""Every op beside eager PyTorch, torch.compile and others' kernels, and against its ceiling; bf16 before fp32.

The cases are those of each benchmark in bench/ that has a function `op_cases`.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ceilings import Ceilings, ceilings
from op_case import COLUMNS, DTYPES, OpCase, compare, markdown

from gpu_parts.report import Report

BENCH = Path(__file__).resolve().parents[1]
FIRST = ("layer_ops", "vocabulary_ops")  # where time may not last for all
ROUNDS = 15


def run(report: Report) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most = ceilings(device)
    cases = [case for name in modules() for case in cases_of(name, report)]
    report.add("ceiling", f"ceiling of {most.device}: {most}\n{COLUMNS}", **most._asdict())
    due, longest = [(case, dtype) for dtype in DTYPES for case in cases if dtype in case.dtypes], 0.0
    for number, (case, dtype) in enumerate(due):
        if report.seconds_left() < longest:
            report.skip(f"{len(due) - number} further cases", "no time is left")
            return
        start = time.perf_counter()
        measure(report, case, dtype, most, device)
        longest = max(longest, time.perf_counter() - start)


def measure(report: Report, case: OpCase, dtype: str, most: Ceilings, device: torch.device) -> None:
    """One case in one dtype; that it fails is a finding, too, as the others are still worth their time."""
    rounds = 1 if report.small else max(3, ROUNDS // 3) if case.flops else ROUNDS
    try:
        found = compare(case, dtype, rounds, most, device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        report.add("failed op", f"| {case.title}, {dtype} failed: {why} |", op=case.op, error=why)
        return
    text = markdown(found) + "".join(f"\n{name} failed: {why}" for name, why in found["failed"].items())
    report.add("op", text, op=case.op, **found)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def modules() -> Iterator[str]:
    """Modules of bench/ with a function `op_cases`, found without importing the others."""
    having = [p.stem for p in sorted(BENCH.glob("*.py")) if re.search(r"^def op_cases\(", p.read_text(), re.MULTILINE)]
    yield from sorted(having, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def cases_of(name: str, report: Report) -> list[OpCase]:
    try:
        cases: list[OpCase] = importlib.import_module(name).op_cases(small=report.small)
    except ImportError as error:
        report.skip(f"the ops of {name}", f"{error}")
        return []
    return cases
