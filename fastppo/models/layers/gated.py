"""Gated feed-forward layers: act(gate(x)) up(x) by `ops.swiglu` or `geglu`, in plain layers and in experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.layers.classes import is_plain, replace_functions, shell, weighted_children

WIDTH, INNER = 8, 64  # of the random input, and of what the stand-ins return

ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu tanh": partial(ops.geglu, approximate="tanh"),
    "gelu": partial(ops.geglu, approximate="none"),
}
# The same from gate and up in one tensor, the gate in the first half; its gradient is one tensor, too.
JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.swiglu_joined,
    "gelu tanh": partial(ops.geglu_joined, approximate="tanh"),
    "gelu": partial(ops.geglu_joined, approximate="none"),
}
# Relative and absolute difference from the module's own product: bf16 rounds it twice and the op once.
TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 1e-3)}

REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # of model code that needs more


@dataclass(frozen=True)
class GatedForm:
    """What the layer computes: down(act(gate(x)) up(x)), gate and up by two children or by one."""

    projections: tuple[str, ...]  # names of gate and up, or of the one that computes both
    order: tuple[int, int]  # which of the two, or which half, is the gate, and which up
    down: str
    activation: str  # of `ACTIVATIONS`


def fuse_gated(module: nn.Module) -> bool:
    """Let the module call an op for its gated activation if it is such a layer; returns whether it is."""
    form = gated_form(module)
    if form is not None:
        cast(Any, module).gated_form = form
        replace_functions(module, _layer)
        return True
    activation = _experts_activation(module)
    if activation is not None:
        cast(Any, module).gated_activation = activation
        replace_functions(module, _experts)
    return activation is not None


class _Projection(nn.Module):
    """Stands for a linear layer: returns random numbers of a width, and notes its input."""

    def __init__(self, output: Tensor, calls: list[tuple[_Projection, Tensor]]):
        super().__init__()
        self.output, self.calls = output, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self, x))
        return self.output


def gated_form(module: nn.Module) -> GatedForm | None:
    """The form in which the module's own forward pass is a gated feed-forward layer; None if it is none."""
    names = weighted_children(module)
    widths_of = {2: (2 * INNER, WIDTH), 3: (INNER, INNER, WIDTH)}.get(len(names))
    if widths_of is None or not is_plain(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    for widths in {*permutations(widths_of)}:
        found = {_traced(module, dict(zip(names, widths, strict=True)), dtype) for dtype in TOLERANCES}
        form = found.pop()
        if form is not None and not found:
            return form
    return None


def _traced(module: nn.Module, widths: dict[str, int], dtype: torch.dtype) -> GatedForm | None:
    """The form, if the module's own forward pass on stand-ins with these output widths has one in this dtype."""
    random = torch.Generator().manual_seed(0)
    calls: list[tuple[_Projection, Tensor]] = []
    x = torch.randn(2, 3, WIDTH, generator=random).to(dtype)
    stand_ins = {
        name: _Projection((3 * torch.randn(2, 3, width, generator=random)).to(dtype), calls)
        for name, width in widths.items()
    }
    try:
        with torch.no_grad():
            own = shell(module, stand_ins).forward(x)
    except REFUSALS:
        return None
    names = {stand_in: name for name, stand_in in stand_ins.items()}
    called = [names[stand_in] for stand_in, _ in calls]
    if sorted(called) != sorted(widths) or own is not calls[-1][0].output:
        return None
    *first, (_, product) = calls
    if not all(torch.equal(given, x) for _, given in first):
        return None
    outputs = [stand_in.output for stand_in, _ in first]
    parts = outputs if len(outputs) == 2 else list(outputs[0].chunk(2, -1))
    for order in ((0, 1), (1, 0)):
        activation = _activation(product, parts[order[0]], parts[order[1]])
        if activation is not None:
            return GatedForm(tuple(called[:-1]), order, called[-1], activation)
    return None


def _activation(product: Tensor, gate: Tensor, up: Tensor) -> str | None:
    """The activation for which the product is act(gate) up."""
    for name, op in ACTIVATIONS.items():
        fused = op(gate, up)
        same_kind = product.shape == fused.shape and product.dtype == fused.dtype
        if same_kind and torch.allclose(product, fused, *TOLERANCES[product.dtype]):
            return name
    return None


def _layer(own: Any) -> Mapping[str, Callable[..., Any]]:
    def forward(self: Any, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)"""
        form = self.gated_form
        outputs = [getattr(self, name)(x) for name in form.projections]
        if len(outputs) == 1 and form.order == (0, 1):
            product = JOINED[form.activation](outputs[0])
        else:
            parts = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
            product = ACTIVATIONS[form.activation](parts[form.order[0]], parts[form.order[1]])
        out: Tensor = getattr(self, form.down)(product)
        return out

    return {"forward": forward}


def _experts_activation(module: nn.Module) -> str | None:
    """The activation of experts whose products transformers computes together; None if the module has no such.

    transformers calls `_apply_gate` with the output (S, 2 I) of gate and up, the gate in the first half.
    """
    if not hasattr(module, "_apply_gate") or not getattr(module, "has_gate", False):
        return None
    random, found = torch.Generator().manual_seed(0), set()
    for dtype in TOLERANCES:
        both = (3 * torch.randn(4, 2 * INNER, generator=random)).to(dtype)
        try:
            with torch.no_grad():
                product = cast(Any, module)._apply_gate(both)
        except REFUSALS:
            return None
        found.add(_activation(product, *both.chunk(2, -1)) if isinstance(product, Tensor) else None)
    return found.pop() if len(found) == 1 else None


def _experts(own: Any) -> Mapping[str, Callable[..., Any]]:
    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        """(S, 2 I) -> (S, I)"""
        return JOINED[self.gated_activation](gate_up)

    return {"_apply_gate": apply_gate}
