"""The ops of a layer, beside what transformers' models compute, torch.compile and, if installed, Liger-Kernel.

    python bench/layer_ops.py [ROUNDS]         # a table of paired ratios, and one line of JSON

The ceiling is one read of each input and one write of each output; backward reads what forward kept once more. On the
CPU the sizes are SmolLM2's, with 2,048 tokens; on a GPU those of an 8B Llama, with 8,192.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_case import OpCase, gradients, print_all
from torch import Tensor

from fastppo.ops import layers


class Sizes(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int  # of a head


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = Sizes(2048, 576, 1536, 9, 3, 64) if DEVICE.type == "cpu" else Sizes(8192, 4096, 14336, 32, 8, 128)
SMALL = Sizes(8, 32, 64, 4, 2, 8)
EPS = 1e-5
Ways = dict[str, Callable[..., Any]]


# RMSNorm of the sum of two branches


def eager_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), total


def norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    return layers.rms_norm(x, weight, EPS, residual)


def liger_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


# Rotary positions of queries and keys


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos[:, None] + turned(q) * sin[:, None], k * cos[:, None] + turned(k) * sin[:, None]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return layers.rotary(q, k, cos, sin)


def liger_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)[:2]  # some versions return cos and sin, too


# Gated activations


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger_swiglu(gate: Tensor, up: Tensor) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def eager_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def geglu(gate: Tensor, up: Tensor) -> Any:
    return layers.geglu(gate, up, approximate="tanh")


def liger_geglu(gate: Tensor, up: Tensor) -> Any:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)


# The same of gate and up in one tensor, as one projection writes them


def eager_swiglu_joined(both: Tensor) -> Tensor:
    return eager_swiglu(*both.chunk(2, -1))


def eager_geglu_joined(both: Tensor) -> Tensor:
    return eager_geglu(*both.chunk(2, -1))


def geglu_joined(both: Tensor) -> Any:
    return layers.geglu_joined(both, approximate="tanh")


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def for_norm(sizes: Sizes, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs with gradients, gradients of the outputs, and inputs without."""
    make = functools.partial(random, sizes.tokens, sizes.hidden, dtype=dtype)
    return (make(), random(sizes.hidden, dtype=dtype), make()), (make(), make()), ()


def for_rotary(sizes: Sizes, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As models have them: (1, heads, N, width) are views of what the projections wrote, tokens first."""

    def turned(heads: int) -> Tensor:
        return random(1, sizes.tokens, heads, sizes.width, dtype=dtype).transpose(1, 2)

    angles = torch.randn(1, sizes.tokens, sizes.width // 2, device=DEVICE).repeat(1, 1, 2)
    places = (angles.cos().to(dtype), angles.sin().to(dtype))
    return tuple(turned(n) for n in sizes[3:5]), tuple(turned(n) for n in sizes[3:5]), places


def for_glu(sizes: Sizes, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    make = functools.partial(random, sizes.tokens, sizes.intermediate, dtype=dtype)
    return (make(), make()), (make(),), ()


def for_joined(sizes: Sizes, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    make = functools.partial(random, sizes.tokens, dtype=dtype)
    return (make(2 * sizes.intermediate),), (make(sizes.intermediate),), ()


class Op(NamedTuple):
    """An op: ways to compute it, their inputs, and the elements moved in a forward pass and in both."""

    name: str
    ways: Ways
    inputs: Callable[[Sizes, torch.dtype], Any]
    forward: int
    both: int


def ops_of(sizes: Sizes) -> list[Op]:
    tokens, hidden, intermediate, heads, kv_heads, width = sizes
    wide, inner, turned = tokens * hidden, tokens * intermediate, tokens * (heads + kv_heads) * width
    return [
        Op("rms_norm", {"eager": eager_norm, "fastppo": norm, "liger": liger_norm}, for_norm, 4 * wide, 8 * wide),
        Op("rotary", {"eager": eager_rotary, "fastppo": rotary, "liger": liger_rotary}, for_rotary,
           2 * turned, 4 * turned),
        Op("swiglu", {"eager": eager_swiglu, "fastppo": layers.swiglu, "liger": liger_swiglu}, for_glu,
           3 * inner, 8 * inner),
        Op("geglu", {"eager": eager_geglu, "fastppo": geglu, "liger": liger_geglu}, for_glu, 3 * inner, 8 * inner),
        Op("swiglu_joined", {"eager": eager_swiglu_joined, "fastppo": layers.swiglu_joined}, for_joined,
           3 * inner, 8 * inner),
        Op("geglu_joined", {"eager": eager_geglu_joined, "fastppo": geglu_joined}, for_joined, 3 * inner, 8 * inner),
    ]  # fmt: skip


def op_cases(*, small: bool = False) -> list[OpCase]:
    """small: only to see that they run."""
    sizes = SMALL if small else SIZES
    cases = []
    for op in ops_of(sizes):
        ways = {"eager": op.ways["eager"], "compiled": torch.compile(op.ways["eager"], dynamic=False)} | op.ways
        if not find_spec("liger_kernel") or DEVICE.type == "cpu":
            ways.pop("liger", None)
        title = {"rms_norm": "rms_norm with residual"}.get(op.name, op.name) + f", {sizes.tokens:,} tokens"
        forwards = {name: functools.partial(without_gradient, way) for name, way in ways.items()}
        both = {name: functools.partial(gradients, way) for name, way in ways.items()}
        cases += [
            OpCase(op.name, f"{title}, forward", forwards, functools.partial(arguments, op, sizes, False),
                   functools.partial(int.__mul__, op.forward)),
            OpCase(op.name, f"{title}, forward and backward", both, functools.partial(arguments, op, sizes, True),
                   functools.partial(int.__mul__, op.both)),
        ]  # fmt: skip
    return cases


def arguments(op: Op, sizes: Sizes, differentiated: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of `without_gradient`, and of `gradients`."""
    torch.manual_seed(0)
    inputs, grads, rest = op.inputs(sizes, dtype)
    if not differentiated:
        return (*inputs, *rest)
    return (tuple(x.requires_grad_() for x in inputs), grads, *rest)


@torch.no_grad()
def without_gradient(way: Callable[..., Any], *inputs: Tensor) -> Any:
    return way(*inputs)


if __name__ == "__main__":
    print_all(op_cases(), *map(int, sys.argv[1:]), device=DEVICE)
