"""What a trace of torch's profiler shows: where the GPU waits and for what, its kernels by time, its copies.

Without a GPU the operators on the CPU stand for kernels. Times in a trace are microseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

BUSY = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation")
WAIT = re.compile(r"cuda\w*Synchronize(?:_v\d+)?|cu\w+Synchronize")
IN_A_GAP = 0.5  # of the gap that something has to last to be called what the host does in it


class Span(NamedTuple):
    start: float
    end: float
    name: str
    kind: str
    bytes: int = 0  # of a copy

    @property
    def length(self) -> float:
        return self.end - self.start

    def overlap(self, other: Span) -> float:
        return max(min(self.end, other.end) - max(self.start, other.start), 0.0)


class Trace(NamedTuple):
    busy: list[Span]  # kernels and copies by their start; without a GPU operators
    host: list[Span]  # operators and calls of the driver
    phases: list[Span]  # by their start


class Gap(NamedTuple):
    """A time without anything on the GPU."""

    start: float
    end: float
    phase: str
    after: str  # the kernel that ended last
    before: str  # the one that ends it
    host: str  # what the host does most of that time


def read_trace(path: Path, phases: Iterable[str]) -> Trace:
    """phases: their names, as `monitor.Phases` marks them."""
    names = set(phases)
    spans = [_span(event) for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    on_gpu = any(span.kind == "kernel" for span in spans)
    busy = sorted(span for span in spans if span.kind in (BUSY if on_gpu else ("cpu_op",)))
    marked = sorted(span for span in spans if span.kind == "user_annotation" and span.name in names)
    host = [span for span in spans if span.kind in HOST and span.name not in names]
    return Trace(busy, host, marked)


def _span(event: dict[str, Any]) -> Span:
    moved = int(event.get("args", {}).get("bytes", 0)) if event.get("cat") == "gpu_memcpy" else 0
    return Span(event["ts"], event["ts"] + event.get("dur", 0.0), event["name"], event.get("cat", ""), moved)


def longest_gaps(trace: Trace, count: int = 10) -> list[Gap]:
    """Within the phases: before their first kernel, between kernels and after the last."""
    found: list[tuple[float, float, Span, str, str]] = []
    for phase in trace.phases:
        last, end = "(begin)", phase.start
        for span in inside(trace.busy, phase):
            if span.start > end:
                found.append((span.start - end, end, phase, last, span.name))
            if span.end > end:
                last, end = span.name, span.end
        if phase.end > end:
            found.append((phase.end - end, end, phase, last, "(end)"))
    longest = sorted(found, key=lambda gap: -gap[0])[:count]
    return [
        Gap(start, start + length, phase.name, after, before, _meanwhile(trace, start, start + length))
        for length, start, phase, after, before in longest
    ]


def inside(spans: Iterable[Span], phase: Span) -> list[Span]:
    """Those that begin in a phase: a phase ends after what it launched."""
    return [span for span in spans if phase.start <= span.start < phase.end]


def host_waits(trace: Trace, phase: Span) -> list[Span]:
    """The calls of a phase in which the host waits for the GPU, by their start."""
    return sorted(span for span in inside(trace.host, phase) if WAIT.fullmatch(span.name))


def _meanwhile(trace: Trace, start: float, end: float) -> str:
    """The innermost call of the host that lasts most of a gap."""
    gap = Span(start, end, "", "")
    lasting = [span for span in trace.host if span.overlap(gap) >= IN_A_GAP * gap.length]
    return min(lasting, key=lambda span: span.length).name if lasting else "Python, or many short calls"


def busy_seconds(spans: list[Span]) -> float:
    """Of the union of spans that are sorted by their start."""
    total, end = 0.0, float("-inf")
    for span in spans:
        total += max(span.end - max(span.start, end), 0.0)
        end = max(end, span.end)
    return total / 1e6


def by_name(spans: Iterable[Span], count: int) -> list[dict[str, Any]]:
    """The names that take most time, with how often and how many milliseconds."""
    times: dict[str, list[float]] = {}
    for span in spans:
        times.setdefault(span.name, []).append(span.length)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    return [{"name": short(name), "count": len(t), "ms": sum(t) / 1e3} for name, t in ordered]


def short(name: str, length: int = 64) -> str:
    """A kernel's name without the types of its arguments."""
    name = name.removeprefix("void ").replace("at::native::", "")
    return name if len(name) <= length else name[: length - 3] + "..."


def kernels_of(call: Callable[[], object], device: torch.device) -> list[Span]:
    """The kernels that a call launches, without copies; on the CPU its operators that call no other."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as profiler:
        call()
        if gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == wanted and not e.is_user_annotation]
    events = [e for e in events if not e.cpu_children and not e.name.startswith(("Memcpy", "Memset"))]
    return [Span(e.time_range.start, e.time_range.end, e.name, "kernel") for e in events]


def copies(trace: Trace) -> list[dict[str, Any]]:
    """What is copied between host and GPU in each phase: bytes, seconds, and of these without a kernel beside it."""
    kernels = [span for span in trace.busy if span.kind == "kernel"]
    found = []
    for phase in trace.phases:
        beside, moved = inside(kernels, phase), [s for s in inside(trace.busy, phase) if s.kind == "gpu_memcpy"]
        for direction in ("HtoD", "DtoH"):
            spans = [span for span in moved if direction in span.name]
            if spans:
                both = sorted([*beside, *spans])
                exposed = busy_seconds(both) - busy_seconds(beside)
                row = {"phase": phase.name, "direction": direction, "copies": len(spans)}
                row |= {"gb": sum(s.bytes for s in spans) / 1e9, "s": busy_seconds(sorted(spans))}
                found.append(row | {"exposed_s": exposed})
    return found
