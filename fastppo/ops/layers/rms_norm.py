"""RMSNorm, with the sum of a residual before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops import derivatives
from fastppo.ops.arguments import check_device, check_floating, check_number, check_precision, check_range, check_shape
from fastppo.ops.backend import by_eager
from fastppo.ops.layers import eager


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    *,
    round_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) (offset + weight), s = x + residual (Zhang and Sennrich, 2019, eq. 4).

    x: (..., H) fp32, bf16 or fp16, or fp64 with everything else; H at least 1; residual: the shape and dtype of x, or
    None for s = x; weight: (H,), of any of these dtypes; eps: at least 0; offset: 1.0 where the model's weight is the
    difference from 1, as in Gemma. Rows may lie apart, as those of heads in a joined projection do: they are not
    copied if their columns are adjacent.
    s is rounded to the dtype of x. round_first: so is the quotient before it is multiplied, as in Llama; else the
    product alone is, as in Gemma and OLMo-2. Sums are fp32. A row of the result depends on that row of x and residual
    alone, bit for bit.

    Returns y, (..., H) in the dtype of x; with a residual (y, s). Gradients flow to x, residual and weight, from both;
    those of x and residual are one tensor.
    """
    _check(x, weight, eps, residual, offset)
    if by_eager(x):
        return eager.rms_norm(x, weight, eps, residual, offset, round_first=round_first)
    y, total = _norm(x, weight, eps, residual, offset, round_first)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float) -> None:
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., H) with H >= 1")
    check_floating("weight", weight)
    check_precision("weight", weight, x, "x")
    check_shape("weight", weight, (x.shape[-1],), "one number for each column of x")
    check_device("weight", weight, x, "x")
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype} and x {x.dtype}; they must be the same")
        check_shape("residual", residual, tuple(x.shape), "the shape of x")
        check_device("residual", residual, x, "x")
    for name, value in (("eps", eps), ("offset", offset)):
        check_number(name, value, "a constant of the model")
    check_range("eps", eps, 0.0, 1e36)
    check_range("offset", offset, -1e36, 1e36)


# Registration


def fake_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


def fake_rms_norm_backward(
    d_y: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if rest[-1] else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, residual, ctx.offset, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)  # the sum of a last layer has no further use


def _backward(ctx: Any, d_y: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if not ctx.has_residual:
        d_total = None
    if d_y is None:  # y has no use
        d_x, d_weight = d_total, weight.new_zeros(weight.shape) if wanted[1] else None
    else:
        gradients = torch.ops.fastppo.rms_norm_backward.default
        d_x, d_weight = gradients(d_y, d_total, total, weight, ctx.eps, ctx.offset, wanted[1])
    return d_x, d_weight if wanted[1] else None, None, d_x if ctx.has_residual else None, None, None


_norm = derivatives.register_direct("rms_norm", "rms_norm", _backward, _save)
