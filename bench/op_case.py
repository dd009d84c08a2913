"""Ways to compute the same, timed one after the other in rounds, and the ceiling of the device for it.

A benchmark of ops gives its cases in a function `op_cases()`; the part `ops` of `bench/gpu.py` runs those of all.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ceilings import Ceilings, ceilings, seconds
from torch import Tensor

from fastppo.ops import registration

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class OpCase(NamedTuple):
    """Candidates that compute the same result from the same arguments; one of them is `fastppo`."""

    op: str  # its name in `fastppo.ops` or `fastppo.ops.layers`
    title: str
    candidates: dict[str, Callable[..., Any]]
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    moved: Callable[[int], int]  # least possible bytes, given the bytes of an element
    flops: int = 0
    dtypes: Sequence[str] = tuple(DTYPES)

    def calls(self, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        shared = self.arguments(dtype)
        own = {"liger": self.arguments(dtype)} if "liger" in self.candidates else {}  # its backward writes to them
        return {name: functools.partial(f, *own.get(name, shared)) for name, f in self.candidates.items()}


def gradients(forward: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> Any:
    """Forward and backward: the gradients of `inputs`, which are the first arguments, for `grads` of the outputs."""
    out = forward(*inputs, *rest)
    outputs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(outputs, inputs, grads)


def compare(case: OpCase, dtype: str, rounds: int, most: Ceilings, device: torch.device) -> dict[str, Any]:
    """Run the candidates alternately. Returns medians, and the median ratio of each to fastppo.

    A candidate other than fastppo that fails is left out; `failed` says why.
    """
    calls, failed = case.calls(DTYPES[dtype]), {}
    for name in list(calls):
        try:
            for _ in range(2):  # compiled, and memory taken
                seconds(calls[name], device)
        except Exception as error:
            if name == "fastppo":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del calls[name]
    times = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(rounds)]
    median = {name: statistics.median(t[name] for t in times) for name in calls}
    moved = case.moved(DTYPES[dtype].itemsize)
    flops = case.flops * (1 if dtype == "bf16" or device.type == "cpu" else 2)
    return {
        "case": f"{case.title}, {dtype}",
        "ms": {name: 1e3 * t for name, t in median.items()},
        "times_faster": {n: statistics.median(t[n] / t["fastppo"] for t in times) for n in calls if n != "fastppo"},
        "gb_per_s": moved / median["fastppo"] / 1e9,
        "tflop_per_s": flops / median["fastppo"] / 1e12,
        "of_peak": most.share(median["fastppo"], moved=moved, flops=flops),
        "failed": failed,
    }


def print_all(cases: Sequence[OpCase], rounds: int = 30, *, device: torch.device) -> None:
    """A table of all cases, and one line of JSON."""
    most = ceilings(device)
    print(
        f"{most.device}, {registration.backend(device)}; medians of {rounds} rounds. Ceiling ({most.source}):", end=" "
    )
    print(f"{most.bandwidth / 1e9:,.0f} GB/s, {most.flops / 1e12:.2f} TFLOP/s in bf16\n")
    print(f"{COLUMNS}\n|---|---|---|---|---|---|---|---|")
    results = []
    for case in cases:
        for dtype in case.dtypes:
            found = compare(case, dtype, rounds if not case.flops else max(3, rounds // 6), most, device)
            results.append(found)
            print(markdown(found), flush=True)
            for name, why in found["failed"].items():
                print(f"{found['case']}: {name} failed: {why}", file=sys.stderr)
    print(json.dumps({"device": most.device, "results": results}))


def markdown(found: dict[str, Any]) -> str:
    """A row of the table whose columns are `COLUMNS`."""
    ms, faster = found["ms"], found["times_faster"]
    extra = "".join(f" ({n}: {ms[n]:.3f} ms)" for n in ms if n not in ("eager", "compiled", "fastppo"))
    cells = [found["case"] + extra, *(f"{ms[n]:.3f}" if n in ms else "" for n in ("eager", "compiled", "fastppo"))]
    cells += [f"{faster[n]:.2f}" if n in faster else "" for n in ("eager", "compiled")]
    return "| " + " | ".join([*cells, f"{found['gb_per_s']:.1f}", f"{found['of_peak']:.0%}"]) + " |"


COLUMNS = "| | eager, ms | compiled, ms | fastppo, ms | times faster than eager | than compiled | GB/s | of ceiling |"
