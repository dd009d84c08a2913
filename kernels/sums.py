"""Sums over tokens that repeat bit for bit: a partial sum for each block of tokens, then their sum in fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import number, operand

TOKEN_BLOCK = 1024  # tokens of a partial sum, computed by 8 warps


def finish(
    partials: Tensor, sums: int, normalizer: Tensor, entropy_coef: float | Tensor, kl_coef: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum partial sums, (sums + 1, blocks) fp32, whose last row contains maxima >= 0.

    Returns (sums[0] - entropy_coef sums[1] + kl_coef sums[2]) / normalizer, (); sums, (sums,); the maximum, (): fp32.
    A term with coefficient 0 is left out, so that it may be infinite. One program sums in fp64.
    """
    if normalizer.shape != () or normalizer.dtype != torch.float32:
        raise ValueError(f"normalizer is {normalizer.dtype} {tuple(normalizer.shape)}; expected fp32 ()")
    total = partials.new_empty(sums)
    loss, maximum = partials.new_empty(()), partials.new_empty(())
    with torch.cuda.device_of(partials):
        finish_kernel[(1,)](
            partials,
            normalizer,
            loss,
            total,
            maximum,
            partials.shape[1],
            operand(entropy_coef, partials),
            operand(kl_coef, partials),
            SUMS=sums,
            CHUNK=128,
            num_warps=4,
        )
    return loss, total, maximum


@triton.jit(do_not_specialize=["blocks"])
def finish_kernel(
    partials, normalizer, loss, sums, maximum, blocks, entropy_coef, kl_coef, SUMS: tl.constexpr, CHUNK: tl.constexpr
):
    entropy_coef, kl_coef = number(entropy_coef), number(kl_coef)
    row = tl.arange(0, 8)
    column = tl.arange(0, CHUNK)
    total = tl.zeros((8, CHUNK), tl.float64)
    largest = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, blocks, CHUNK):
        inside = start + column < blocks
        pointers = partials + row[:, None] * blocks + (start + column)[None, :]
        total += tl.load(pointers, mask=(row[:, None] < SUMS) & inside[None, :], other=0.0).to(tl.float64)
        maxima = tl.load(partials + SUMS * blocks + start + column, mask=inside, other=0.0)
        largest = tl.maximum(largest, maxima, propagate_nan=tl.PropagateNan.ALL)
    total = tl.sum(total, axis=1)
    coefficient = tl.where(row == 0, 1.0, tl.where(row == 1, -entropy_coef, tl.where(row == 2, kl_coef, 0.0)))
    terms = tl.where(coefficient == 0.0, 0.0, total * coefficient)
    tl.store(loss, (tl.sum(terms, axis=0) / tl.load(normalizer)).to(tl.float32))
    tl.store(sums + row, total.to(tl.float32), mask=row < SUMS)
    tl.store(maximum, tl.max(largest, axis=0))


@triton.jit
def store_partials(partials, blocks, block, values):
    """Store the sum of values[i], (TOKEN_BLOCK,), in row i and column `block` of partials."""
    for i in tl.static_range(len(values)):
        tl.store(partials + i * blocks + block, tl.sum(values[i], axis=0))
