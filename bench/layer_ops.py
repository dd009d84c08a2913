"""The ops of a layer, beside what transformers' models compute, torch.compile and, if installed, Liger-Kernel.

The least is one read of each input and one write of each output; backward reads what forward kept once more. `add` is
torch.add over as many bytes. On the CPU the sizes are those of SmolLM2 and of a 1B Llama, with 2,048 tokens; on a GPU
those of an 8B Llama, with 8,192.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_case import OpCase, gradients
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from fastppo.ops import layers


class Sizes(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    width: int  # of a head


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = (Sizes(2048, 576, 1536, 9, 3, 64), Sizes(2048, 2048, 8192, 32, 8, 64))
SIZES = ON_CPU if DEVICE.type == "cpu" else (Sizes(8192, 4096, 14336, 32, 8, 128),)
SMALL = Sizes(8, 32, 64, 4, 2, 8)
EPS = 1e-5
Ways = dict[str, Callable[..., Any]]


# RMSNorm, of the sum of two branches or of one


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The forward pass of transformers' module, on an object with its two attributes."""
    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def eager_norm_of_sum(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager_norm(total, weight), total


def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    return layers.rms_norm(x, weight, EPS, residual)


def liger_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


# Rotary positions of queries and keys


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


def for_norm_alone(
    sizes: Sizes, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    (x, weight, _), (grad, _), _ = for_norm(sizes, dtype)
    return (x, weight), (grad,), ()


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
    form: str = ""  # in the title


def ops_of(sizes: Sizes) -> list[Op]:
    tokens, hidden, intermediate, heads, kv_heads, width = sizes
    wide, inner, turned = tokens * hidden, tokens * intermediate, tokens * (heads + kv_heads) * width
    return [
        Op("rms_norm", {"eager": eager_norm_of_sum, "fastppo": norm, "liger": liger_norm}, for_norm,
           4 * wide, 8 * wide, " with residual"),
        Op("rms_norm", {"eager": eager_norm, "fastppo": norm}, for_norm_alone, 2 * wide, 5 * wide),
        Op("rotary", {"eager": apply_rotary_pos_emb, "fastppo": layers.rotary, "liger": liger_rotary}, for_rotary,
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
    return [case for sizes in ((SMALL,) if small else SIZES) for op in ops_of(sizes) for case in cases_of(op, sizes)]


def cases_of(op: Op, sizes: Sizes) -> list[OpCase]:
    """A forward pass, and one with its backward pass."""
    ways = {"eager": op.ways["eager"], "compiled": torch.compile(op.ways["eager"], dynamic=False)} | op.ways
    if not find_spec("liger_kernel") or DEVICE.type == "cpu":
        ways.pop("liger", None)
    found = []
    for differentiated, elements in ((False, op.forward), (True, op.both)):
        called = gradients if differentiated else without_gradient
        candidates = {name: functools.partial(called, way) for name, way in ways.items()}
        found.append(
            OpCase(
                op.name,
                f"{op.name}{op.form}, {sizes.tokens:,} x {sizes.hidden:,}, forward" + " and backward" * differentiated,
                candidates | {"add": adding(elements)},
                functools.partial(arguments, op, sizes, differentiated),
                functools.partial(int.__mul__, elements),
            )
        )
    return found


def adding(elements: int) -> Callable[..., Tensor]:
    """torch.add that moves so many elements, of the dtype of what it is called with."""
    terms = functools.cache(lambda dtype: random(2, elements // 3, dtype=dtype))

    def add(first: Any, *rest: Any) -> Tensor:
        return torch.add(*terms((first[0] if isinstance(first, tuple) else first).dtype))

    return add


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
