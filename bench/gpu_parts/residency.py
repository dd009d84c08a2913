"""What moves between GPU and host: in the moves of each phase alone, and in the profiled step beside its kernels."""

from __future__ import annotations

import time

import torch

from gpu_parts.report import Report, table
from gpu_parts.step import step_record

PINNED = 1 << 30  # bytes of a copy that shows what the bus does


def run(report: Report) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = step_record(report)
    if device.type == "cuda":
        speeds = pinned_speeds(device)
        text = ", ".join(f"{name} {speed / 1e9:,.1f} GB/s" for name, speed in speeds.items())
        report.add("pinned copies", f"copies of pinned memory: {text}", **speeds)
    else:
        report.skip("copies of pinned memory", "there is no GPU; nothing moves on the CPU")
    moves = record.get("moves", [])
    whole = sum(row["s"] for row in moves)
    text = f"{whole:.3f} s to enter the phases one after the other, nothing computed; in use when a phase begins"
    report.add("moves", f"{text}\n{table(moves)}", moves=moves, seconds=whole)
    if "copies" not in record:
        report.skip("copies of a step", "the part `step` was cut off before its profile")
        return
    copies = record["copies"]
    sums = {name: sum(row[name] for row in copies) for name in ("gb", "s", "exposed_s")}
    text = f"copies between GPU and host in the profiled step: {sums['gb']:.2f} GB in {sums['s']:.3f} s,"
    text += f" {sums['exposed_s']:.3f} s of it without a kernel beside them (exposed)"
    report.add("copies", f"{text}\n{table(copies)}" if copies else text, copies=copies, **sums)


def pinned_speeds(device: torch.device) -> dict[str, float]:
    """Bytes/s of copies to the GPU and back."""
    on_gpu = torch.empty(PINNED, dtype=torch.uint8, device=device)
    on_host = torch.ones(PINNED, dtype=torch.uint8, pin_memory=True)
    found = {}
    for name, (target, source) in (("HtoD", (on_gpu, on_host)), ("DtoH", (on_host, on_gpu))):
        for _ in range(2):  # the first warms up
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            found[name] = PINNED / (time.perf_counter() - start)
    return found
