"""The seconds of single kernels, measured by calling them on random tensors of the shapes that were counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.planner.time.work import Call, Shape

CACHED = 128 << 20  # bytes of copies of the arguments, taken in turn: a pass comes back to a weight after all others
COPIES = 32
LONG = 0.02  # seconds that a kernel is measured for, and at least so many times
TIMES = 5
LARGEST = 4 << 30  # bytes of arguments; larger ones are not made


def seconds_of(calls: Iterable[Call], device: torch.device) -> dict[str, float]:
    """Seconds by the name of the call; of those that can be called alone."""
    found: dict[str, float] = {}
    for call in calls:
        if call.function is not None and call.name not in found:
            measured = _measured(call, device)
            if measured is not None:
                found[call.name] = measured
    return found


def _measured(call: Call, device: torch.device) -> float | None:
    size = sum(_bytes(x) for x in _shapes((call.arguments, call.options)))
    if size > LARGEST:
        return None
    count = max(1, min(COPIES, CACHED // max(size, 1)))
    generator = torch.Generator(device).manual_seed(0)
    made = [_arguments(call, device, generator) for _ in range(count)]
    runs = [partial(call.function, *args, **kwargs) for args, kwargs in made]
    with torch.no_grad():
        for run in runs:
            run()
        return call_seconds(runs, device)


def call_seconds(runs: Sequence[Callable[[], Any]], device: torch.device, *, long: float = LONG) -> float:
    """The median of calls one by one; on a GPU the mean of many after each other.

    On a CPU what a call returns stays until the same run is called again: a pass writes each result to memory that is
    in no cache, too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for i in range(10 * TIMES):
            runs[i % len(runs)]()
        last.record()
        torch.cuda.synchronize(device)
        return float(first.elapsed_time(last)) / 1e3 / (10 * TIMES)
    clock = clock_of(torch.get_num_threads())
    times: list[float] = []
    results: list[Any] = [None] * len(runs)
    begun = clock()
    while len(times) < TIMES or (clock() - begun < long and len(times) < 10 * TIMES):
        i = len(times) % len(runs)
        start = clock()
        result = runs[i]()
        times.append(clock() - start)
        results[i] = result
    return statistics.median(times)


def clock_of(threads: int) -> Callable[[], float]:
    """One thread's own time, in which another process that takes its core does not count; of several threads the time
    that passes, as they wait for each other."""
    return time.thread_time if threads == 1 else time.perf_counter


def _arguments(call: Call, device: torch.device, generator: torch.Generator) -> tuple[list[Any], dict[str, Any]]:
    first = next((shape for shape in _shapes(call.arguments) if shape.dtype.is_floating_point), None)
    whole = call.name.startswith("aten.embedding")
    most = 1 if first is None or not first.size else first.size[0] if whole else min(first.size[:2])
    args = [_made(x, device, generator, most) for x in call.arguments]
    kwargs = {name: _made(x, device, generator, most) for name, x in call.options}
    if call.name.startswith("fastppo.attend_cached"):  # its rows, and how many positions each has
        cached = int(call.name.rpartition(" ")[2])
        args[5] = torch.full_like(args[5], cached)
        args[6] = torch.arange(len(args[6]), device=device)
    return args, kwargs


def _made(x: Any, device: torch.device, generator: torch.Generator, most: int) -> Any:
    if isinstance(x, Shape):
        return _tensor(x, device, generator, most)
    if isinstance(x, tuple):
        return [_made(item, device, generator, most) for item in x]
    return device if isinstance(x, torch.device) else x


def _tensor(shape: Shape, device: torch.device, generator: torch.Generator, most: int) -> Tensor:
    """Random numbers near 0, or numbers of rows of the first argument, in the same memory layout."""
    extent = 1 + sum((n - 1) * step for n, step in zip(shape.size, shape.stride, strict=True)) if all(shape.size) else 0
    if shape.dtype.is_floating_point:
        flat = torch.randn(min(extent, 1 << 20), generator=generator, device=device).mul_(0.1)
        flat = flat.repeat(-(-extent // max(len(flat), 1)))[:extent].to(shape.dtype)
    elif shape.dtype == torch.bool:
        flat = torch.zeros(extent, dtype=torch.bool, device=device)
    else:
        flat = torch.randint(0, max(most, 1), (extent,), generator=generator, device=device).to(shape.dtype)
    return flat.as_strided(shape.size, shape.stride)


def _shapes(tree: Any) -> list[Shape]:
    if isinstance(tree, Shape):
        return [tree]
    return [shape for item in tree for shape in _shapes(item)] if isinstance(tree, tuple) else []


def _bytes(shape: Shape) -> int:
    count = 1
    for n in shape.size:
        count *= n
    return count * shape.dtype.itemsize
