"""Gated activations of feed-forward layers: SwiGLU and GeGLU (Shazeer, 2020, eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastppo.ops.arguments import check_device, check_floating, check_shape
from fastppo.ops.backend import by_eager
from fastppo.ops.derivatives import register_direct
from fastppo.ops.layers import eager

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # of the kernels, by torch's name of GELU's approximation


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up; gate, up: (..., I), floating, of one dtype, which the result, dense, has too.

    The kernels compute in fp32 and round once. Rows may lie apart, as the halves of a joined projection do, but for
    these `swiglu_joined` makes one gradient. gate and up are saved for the backward pass, and nothing else.
    """
    _check("gate", gate)
    _check_like(gate, up)
    return eager.swiglu(gate, up) if by_eager(gate) else _swiglu(gate, up)


def swiglu_joined(gate_up: Tensor) -> Tensor:
    """`swiglu` of the halves of gate_up, (..., 2 I), the gate first; its gradient is one tensor, too."""
    _check_joined(gate_up)
    return eager.swiglu(*gate_up.chunk(2, -1)) if by_eager(gate_up) else _swiglu(gate_up, None)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) up, with all else as in `swiglu`; approximate: `none` for the normal distribution's, or `tanh`."""
    _check("gate", gate)
    _check_like(gate, up)
    _check_approximate(approximate)
    if by_eager(gate):
        return eager.geglu(gate, up, approximate=approximate)
    return _geglu(gate, up, approximate)


def geglu_joined(gate_up: Tensor, *, approximate: str = "none") -> Tensor:
    """`geglu` of the halves of gate_up, (..., 2 I), the gate first; its gradient is one tensor, too."""
    _check_joined(gate_up)
    _check_approximate(approximate)
    if by_eager(gate_up):
        return eager.geglu(*gate_up.chunk(2, -1), approximate=approximate)
    return _geglu(gate_up, None, approximate)


def _check(name: str, gate: Tensor) -> None:
    check_floating(name, gate)
    if gate.ndim == 0:
        raise ValueError(f"{name} has shape (); expected (..., I)")


def _check_like(gate: Tensor, up: Tensor) -> None:
    if up.dtype != gate.dtype:
        raise TypeError(f"up has dtype {up.dtype} and gate {gate.dtype}; they must be the same")
    check_shape("up", up, tuple(gate.shape), "the shape of gate")
    check_device("up", up, gate, "gate")


def _check_joined(gate_up: Tensor) -> None:
    _check("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; expected (..., 2 I): gate and up, side by side")


def _check_approximate(approximate: str) -> None:
    if approximate not in ACTIVATIONS:
        raise ValueError(f"approximate is {approximate!r}; expected 'none' or 'tanh'")


# Registration


def fake_glu(gate: Tensor, up: Tensor | None, approximate: str = "none") -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def fake_glu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty(gate.shape if up is None else (2, *gate.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *approximate = inputs
    ctx.activation, ctx.constants = ACTIVATIONS[approximate[0]] if approximate else "silu", len(approximate)
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    gradients = torch.ops.fastppo.glu_backward.default(grad, gate, up, ctx.activation)
    if up is None:
        return gradients, None, *(None,) * ctx.constants
    d_gate, d_up = gradients.unbind()
    return d_gate, d_up, *(None,) * ctx.constants


_swiglu: Callable[..., Tensor] = register_direct("swiglu", "swiglu", _backward, _save)
_geglu: Callable[..., Tensor] = register_direct("geglu", "geglu", _backward, _save)
