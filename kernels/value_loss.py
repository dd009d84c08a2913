"""The squared error of the critic over tokens, its gradient and its sums, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.policy_loss import clamp, load_kept
from fastppo.kernels.row import check_tokens, number, operand
from fastppo.kernels.sums import TOKEN_BLOCK, finish, store_partials


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor,
    clip: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastppo.ops.eager.value_loss` (Schulman et al. 2017, eq. 9; clip: Ziegler et al. 2019) and its gradient.

    values, old_values, returns: (M,) fp32, bf16 or fp16 each; mask: (M,) bool; normalizer: () fp32, read on the device.
    Returns loss (), sums (7,) of `ValueStats`, and d loss / d values (M,), fp32 each. Traffic with fp32 inputs and a
    mask: 17 bytes a token; old_values are read only with a clip. Results repeat bit for bit.
    """
    check_tokens(len(values), values=values, old_values=old_values, returns=returns, mask=mask)
    inputs = [None if x is None else x.contiguous() for x in (values, old_values, returns, mask)]
    tokens = len(values)
    blocks = triton.cdiv(tokens, TOKEN_BLOCK)
    partials = torch.empty(8, blocks, dtype=torch.float32, device=values.device)
    d_values = torch.empty(tokens, dtype=torch.float32, device=values.device)
    limit = None if clip is None else operand(clip, values)
    if blocks:
        with torch.cuda.device_of(values):
            value_loss_kernel[(blocks,)](
                *inputs, normalizer, partials, d_values, tokens, limit, BLOCK=TOKEN_BLOCK, num_warps=8
            )
    loss, sums, _ = finish(partials, 7, normalizer, 0.0, 0.0)
    return loss, sums, d_values


@triton.jit(do_not_specialize=["M"])
def value_loss_kernel(values, old_values, returns, mask, normalizer, partials, d_values, M, clip, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + i, mask=inside, other=0) != 0
    value = load_kept(values, i, keep)
    target = load_kept(returns, i, keep)
    difference = value - target
    error = difference * difference
    clipped = inside & False
    loss, slope = error, difference
    if clip is not None:
        clip = number(clip)
        old_value = load_kept(old_values, i, keep)
        moved = value - old_value
        clipped_difference = old_value + clamp(moved, -clip, clip) - target
        clipped_error = clipped_difference * clipped_difference
        clipped = clipped_error > error
        loss = tl.where(clipped, clipped_error, error)
        slope = tl.where(clipped, tl.where(tl.abs(moved) <= clip, clipped_difference, 0.0), difference)
    tl.store(d_values + i, slope / tl.load(normalizer), mask=inside)
    blocks = tl.num_programs(0)
    sums = (loss * 0.5, clipped.to(tl.float32), value, value * value, target, target * target, error)
    store_partials(partials, blocks, block, sums)
    tl.store(partials + 7 * blocks + block, 0.0)
