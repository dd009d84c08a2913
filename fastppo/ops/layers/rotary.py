"""Rotary position embeddings of queries and keys (Su et al., 2021, eq. 34)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops.arguments import check_device, check_floating, check_precision
from fastppo.ops.backend import by_eager
from fastppo.ops.derivatives import register_direct
from fastppo.ops.layers import eager


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate queries, (B, heads, N, D), and keys, (B, kv heads, N, D), by their positions, in one launch.

    x cos + turned(x) sin; cos, sin: (B or 1, N, R), R <= D even: numbers of a head after the first R stay as they are.
    turned(x) = (-x2, x1) of the halves x1, x2 of the first R numbers, as in Llama; interleaved: of neighbours,
    (-x[1], x[0], -x[3], x[2], ...), as in GPT-J, Cohere and GLM. The factors of a pair need not be equal.
    q and k have one dtype, which the results have too; cos and sin may have another one, and are constants. The kernels
    compute in fp32 and round once. The results are dense, their heads and positions in the order in which those of q
    and k lie in memory. Nothing but cos and sin is saved for the backward pass.
    """
    _check_heads(q, k)
    _check_factors(q, cos, sin)
    if by_eager(q):
        return eager.rotary(q, k, cos.detach(), sin.detach(), interleaved=interleaved)
    q_out, k_out = _rotary(q, k, cos, sin, interleaved, False)
    return q_out, k_out


def _check_heads(q: Tensor, k: Tensor) -> None:
    check_floating("q", q)
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (B, heads, N, D)")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype} and q {q.dtype}; they must be the same")
    b, _, n, d = q.shape
    if k.ndim != 4 or k.shape[0] != b or k.shape[2] != n or k.shape[3] != d:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected ({b}, kv heads, {n}, {d}), as q {tuple(q.shape)}")
    check_device("k", k, q, "q")


def _check_factors(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    b, _, n, d = q.shape
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(name, x)
        check_precision(name, x, q, "q")
        check_device(name, x, q, "q")
        if x.ndim != 3 or x.shape[0] not in (1, b) or x.shape[1] != n:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({b} or 1, {n}, R), as q {tuple(q.shape)}")
        if x.shape[2] > d or x.shape[2] % 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; its last size must be even and at most q's, {d}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin has dtype {sin.dtype} and cos {cos.dtype}; they must be the same")
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)} and cos {tuple(cos.shape)}; they must be the same")


# Registration


def fake_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    return _in_order_of(q), _in_order_of(k)


def _in_order_of(x: Tensor) -> Tensor:
    """Dense, with the heads of a position side by side if they are closer than its positions in x."""
    if x.stride(1) > x.stride(2):
        return x.new_empty(x.shape)
    b, heads, n, d = x.shape
    return x.new_empty(b, n, heads, d).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, cos, sin, ctx.interleaved, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Rotations back, by the transposed matrices."""
    cos, sin = ctx.saved_tensors
    turn_back = (ctx.interleaved, not ctx.transposed)
    return *torch.ops.fastppo.rotary.default(q_grad, k_grad, cos, sin, *turn_back), None, None, None, None


_rotary = register_direct("rotary", "rotary", _backward, _save)
