"""Compare the ops of a layer with the model's own code, with torch.compile and with torch.add.

    pytest bench/test_layers.py --benchmark-only
    python bench/test_layers.py [rounds [op]]            # a table of paired ratios, and one line of JSON

For the table, candidates run alternately in one process, so that other programs slow all of them equally. The ceiling
is the bandwidth of torch.add: `add` adds two tensors into a new one, of a size that moves as many bytes as the op must.
2,048 tokens of width 576 and 2,048, as in SmolLM2-135M and a 1B Llama. Runs on the GPU if there is one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported

import functools
import json
import statistics
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from ceilings import seconds
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastppo import ops
from fastppo.ops import registration

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 2048 if DEVICE.type == "cpu" else 16_384
WIDTHS = (576, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-6


class LayerCase(NamedTuple):
    """An op and the model's own code for it; both take `inputs(width, dtype)` and return a tuple of tensors."""

    eager: Callable[..., tuple[Tensor, ...]]
    fastppo: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[int, torch.dtype], tuple[Tensor, ...]]  # all of them get a gradient
    forward: int  # rows of TOKENS x width that must be read or written
    backward: int
    widths: tuple[int, ...] = WIDTHS


def random_rows(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, width, device=DEVICE).to(dtype)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return *eager_norm(total, weight), total


def eager_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The forward pass of transformers' module, on an object with its two attributes."""
    return (LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x),)


def heads_of(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys of `width` numbers together, as a model's projections make them: 9 + 3 or 32 + 8 heads."""
    heads, kv_heads = {768: (9, 3), 2560: (32, 8)}[width]
    q, k = (random_rows(64 * n, dtype).view(1, TOKENS, n, 64).transpose(1, 2) for n in (heads, kv_heads))
    return q, k


@functools.cache
def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin; they are not counted as bytes."""
    angles = torch.rand(1, TOKENS, 32, device=DEVICE).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


CASES = {
    "rms_norm with residual": LayerCase(
        eager_add_norm,
        lambda x, residual, weight: ops.rms_norm(x, weight, EPS, residual),
        lambda width, dtype: (
            random_rows(width, dtype),
            random_rows(width, dtype),
            torch.randn(width, device=DEVICE).to(dtype),
        ),
        forward=4,
        backward=4,
    ),
    "rms_norm": LayerCase(
        eager_norm,
        lambda x, weight: (ops.rms_norm(x, weight, EPS),),
        lambda width, dtype: (random_rows(width, dtype), torch.randn(width, device=DEVICE).to(dtype)),
        forward=2,
        backward=3,
    ),
    "swiglu": LayerCase(
        lambda gate, up: (functional.silu(gate) * up,),
        lambda gate, up: (ops.swiglu(gate, up),),
        lambda width, dtype: (random_rows(width, dtype), random_rows(width, dtype)),
        forward=3,
        backward=5,
        widths=(1536, 8192),  # of the feed-forward layers
    ),
    "geglu": LayerCase(
        lambda gate, up: (functional.gelu(gate, approximate="tanh") * up,),
        lambda gate, up: (ops.geglu(gate, up, approximate="tanh"),),
        lambda width, dtype: (random_rows(width, dtype), random_rows(width, dtype)),
        forward=3,
        backward=5,
        widths=(1536, 8192),
    ),
    "rotary": LayerCase(
        lambda q, k: apply_rotary_pos_emb(q, k, *factors(q.dtype)),
        lambda q, k: ops.rotary(q, k, *factors(q.dtype)),
        heads_of,
        forward=2,
        backward=2,
        widths=(768, 2560),  # of queries and keys together
    ),
}


def calls(case: LayerCase, width: int, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    """The candidates, without arguments."""
    torch.manual_seed(0)
    inputs = [x.requires_grad_(backward) for x in case.inputs(width, dtype)]
    upstream = [torch.randn_like(x) for x in case.eager(*inputs)]

    def run(op: Callable[..., tuple[Tensor, ...]]) -> object:
        outputs = op(*inputs)
        return torch.autograd.grad(outputs, inputs, upstream) if backward else outputs

    passes = [case.forward] + [case.backward] * backward
    terms = [torch.randn(2, round(TOKENS * width * rows / 3), device=DEVICE).to(dtype) for rows in passes]
    compiled = torch.compile(case.eager, dynamic=False)
    candidates = {"eager": case.eager, "compiled": compiled, "fastppo": case.fastppo}
    made: dict[str, Callable[[], object]] = {name: functools.partial(run, f) for name, f in candidates.items()}
    return made | {"add": lambda: [torch.add(a, b) for a, b in terms]}


ALL = [
    (name, width, dtype, backward)
    for name in CASES
    for width in CASES[name].widths
    for dtype in DTYPES
    for backward in (False, True)
]


@pytest.mark.parametrize("candidate", ["eager", "compiled", "fastppo", "add"])
@pytest.mark.parametrize(("name", "width", "dtype", "backward"), ALL)
def test_layers(benchmark: Any, name: str, width: int, dtype: str, backward: bool, candidate: str) -> None:
    benchmark.group = f"{name}, {width}, {dtype}" + ", with backward" * backward
    call = calls(CASES[name], width, DTYPES[dtype], backward)[candidate]
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=10, warmup_rounds=2)


def compare(name: str, width: int, dtype: str, backward: bool, rounds: int) -> dict[str, Any]:
    """Medians, and the median ratio of each candidate's time to fastppo's."""
    candidates = calls(CASES[name], width, DTYPES[dtype], backward)
    times = [{n: seconds(call, DEVICE) for n, call in candidates.items()} for _ in range(rounds + 5)][5:]
    rows = CASES[name].forward + CASES[name].backward * backward
    return {
        "case": f"{name}, {width}, {dtype}" + ", with backward" * backward,
        "ms": {n: 1e3 * statistics.median(t[n] for t in times) for n in candidates},
        "times_faster": {n: statistics.median(t[n] / t["fastppo"] for t in times) for n in candidates},
        "bytes": rows * TOKENS * width * DTYPES[dtype].itemsize,
    }


def main(rounds: int = 200, op: str = "") -> None:
    print(f"{torch.get_num_threads()} threads, {registration.backend(DEVICE)}; medians of {rounds} rounds\n")
    print("| | eager, ms | compiled, ms | fastppo, ms | times faster than eager | than compiled | of torch.add |")
    print("|---|---|---|---|---|---|---|")
    results = []
    with torch.set_grad_enabled(True):
        for name, *case in ALL:
            if not name.startswith(op):
                continue
            found = compare(name, *case, rounds)
            results.append(found)
            ms, faster = found["ms"], found["times_faster"]
            print(
                f"| {found['case']} | {ms['eager']:.3f} | {ms['compiled']:.3f} | {ms['fastppo']:.3f}"
                f" | {faster['eager']:.2f} | {faster['compiled']:.2f} | {faster['add']:.2f} |",
                flush=True,
            )
    print(json.dumps({"threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main(*(int(x) if x.isdigit() else x for x in sys.argv[1:]))  # type: ignore[arg-type]
