"""Rotary positions: attention whose modelling code has a function that computes what `ops.rotary` computes.

The attention's own forward pass is kept, as a function with other globals: those of its file, with the op in the place
of that function. Nothing in transformers changes, so models that are not fused compute as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.layers.classes import replace_functions

WIDTH = 16  # of a head in the random input
# Relative and absolute difference from the function's own output: in bf16 it rounds three times and the op once.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-6, 2**-5)}


@dataclass(frozen=True)
class RotaryForm:
    """What a function with arguments (q, k, cos, sin) computes; q (B, heads, N, D), cos and sin (B, N, R)."""

    interleaved: bool  # pairs are neighbours, and not the same places of two halves
    repeats: bool  # only the first half of cos and sin is read, each number for two neighbours (GLM)
    partial: bool  # R may be less than D: the numbers of a head after the first R stay

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self.repeats:
            cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
        return ops.rotary(q, k, cos, sin, interleaved=self.interleaved)


def fuse_rotary(module: nn.Module) -> bool:
    """Let the module rotate queries and keys by the op if its code has such a function; returns whether it has."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or not rotating(forward):
        return False
    replace_functions(module, _functions)
    return True


@cache
def rotating(forward: FunctionType) -> dict[str, RotaryForm]:
    """The functions in a function's code that rotate q and k, by their name there."""
    known = forward.__globals__
    names = [name for name in forward.__code__.co_names if "rot" in name and callable(known.get(name))]
    found = {name: _form(known[name]) for name in names}
    return {name: form for name, form in found.items() if form is not None}


def _form(function: Callable[..., Any]) -> RotaryForm | None:
    forms = [RotaryForm(interleaved, repeats, False) for interleaved, repeats in product((False, True), repeat=2)]
    for form in forms:
        if _computes(function, form, WIDTH):
            return RotaryForm(form.interleaved, form.repeats, _computes(function, form, WIDTH // 2))
    return None


def _computes(function: Callable[..., Any], form: RotaryForm, width: int) -> bool:
    """Whether the function's own output is that of the form, in fp32 and in bf16, with cos and sin (B, N, width)."""
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
        for one, other in zip(own, form.rotate(q, k, cos, sin), strict=True):
            if one.shape != other.shape or one.dtype != dtype or not torch.allclose(one, other, *tolerance):
                return False
    return True


def _functions(own: Any) -> Mapping[str, Callable[..., Any]]:
    forward = own.forward
    known = forward.__globals__
    fused = {name: _fused(known[name], form) for name, form in rotating(forward).items()}
    # Without a name, torch.compile reads the functions in these globals and not those of the file of that name.
    others = {name: value for name, value in known.items() if name != "__name__"} | fused
    function = FunctionType(forward.__code__, others, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__, function.__doc__ = forward.__kwdefaults__, forward.__doc__
    return {"forward": function}


def _fused(own: Callable[..., tuple[Tensor, Tensor]], form: RotaryForm) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if named or len(args) != 4:  # heads after positions, for example
            return own(*args, **named)
        q, k, cos, sin = args
        if cos.dim() != 3 or not (form.partial or cos.shape[-1] == q.shape[-1]):
            return own(q, k, cos, sin)
        return form.rotate(q, k, cos, sin)

    return rotate
