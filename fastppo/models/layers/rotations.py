"""Rotary positions: attention whose modelling code has a function that computes what `ops.rotary` computes.

The attention's own forward pass is kept, as a function with other globals: those of its file, with the op in the place
of that function. Nothing in transformers changes, so models that are not fused compute as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.layers.classes import replace_functions

WIDTH = 16  # of a head in the random input
# Relative and absolute difference from the function's own output: in bf16 it rounds three times and the op once.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-6, 2**-5)}


def fuse_rotary(module: nn.Module) -> bool:
    """Let the module rotate queries and keys by the op if its code has such a function; returns whether it has."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or not rotating(forward):
        return False
    replace_functions(module, _functions)
    return True


@cache
def rotating(forward: FunctionType) -> dict[str, bool]:
    """The functions in a function's code that rotate q and k, with arguments (q, k, cos, sin), by their name there.

    Each with whether it rotates the first numbers of a head only where cos and sin are narrower than the head.
    """
    known = forward.__globals__
    names = [name for name in forward.__code__.co_names if "rot" in name and callable(known.get(name))]
    return {name: _rotates(known[name], WIDTH // 2) for name in names if _rotates(known[name], WIDTH)}


def _rotates(function: Callable[..., Any], width: int) -> bool:
    """Whether the function computes `_rotate`, in fp32 and in bf16, with cos and sin (B, N, width)."""
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, WIDTH), (2, 2, 5, WIDTH), (2, 5, width), (2, 5, width))
    numbers = [torch.randn(shape, generator=random) for shape in shapes]
    for dtype, tolerance in TOLERANCES.items():
        q, k, cos, sin = (x.to(dtype) for x in numbers)
        try:
            with torch.no_grad():
                own = function(q, k, cos, sin)
        except Exception:  # any function of the file may have "rot" in its name, and ask for anything
            return False
        if not isinstance(own, tuple) or len(own) != 2 or not all(isinstance(x, Tensor) for x in own):
            return False
        for one, other in zip(own, _rotate(q, k, cos, sin), strict=True):
            if one.shape != other.shape or one.dtype != dtype or not torch.allclose(one, other, *tolerance):
                return False
    return True


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, heads, N, D) and k (B, kv heads, N, D), their first d numbers by cos and sin (B, N, d)."""
    width, cos, sin = cos.shape[-1], cos.unsqueeze(1), sin.unsqueeze(1)
    if width == q.shape[-1]:
        return ops.rotary(q, k, cos, sin)
    rotated = ops.rotary(q[..., :width], k[..., :width], cos, sin)
    out_q, out_k = (torch.cat([x, own[..., width:]], -1) for x, own in zip(rotated, (q, k), strict=True))
    return out_q, out_k


def _functions(own: Any) -> Mapping[str, Callable[..., Any]]:
    forward = own.forward
    known = forward.__globals__
    fused = {name: _fused(known[name], partial) for name, partial in rotating(forward).items()}
    # Without a name, torch.compile reads the functions in these globals and not those of the file of that name.
    others = {name: value for name, value in known.items() if name != "__name__"} | fused
    function = FunctionType(forward.__code__, others, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__, function.__doc__ = forward.__kwdefaults__, forward.__doc__
    return {"forward": function}


def _fused(own: Callable[..., tuple[Tensor, Tensor]], partial: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """partial: whether the own function may be given cos and sin that are narrower than a head."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        known = cos.dim() == 3 and (partial or cos.shape[-1] == q.shape[-1])
        if others or named or not known:  # heads after positions, for example
            return own(q, k, cos, sin, *others, **named)
        return _rotate(q, k, cos, sin)

    return rotate
