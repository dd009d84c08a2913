"""PPO's clipped loss over tokens, its gradient and its sums, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import check_tokens, number, operand
from fastppo.kernels.sums import TOKEN_BLOCK, finish, store_partials

LOG_RATIO_MAX = tl.constexpr(20.0)  # above it e^x is continued by its tangent, see `bounded_exp`


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastppo.ops.eager.policy_loss` (Schulman et al. 2017, eq. 7; Ye et al. 2020, eq. 5) and its gradient.

    logprobs, old_logprobs, advantages, entropy, kl: (M,) fp32, bf16 or fp16 each; mask: (M,) bool; normalizer: () fp32,
    read on the device. Returns loss (), sums (8,), the largest ratio () and d loss / d logprobs (M,), fp32 each; the
    sums are those of `PolicyStats`. Traffic with fp32 inputs: 25 bytes a token, 17 without entropy and kl, 1 less
    without a mask. Results repeat bit for bit.
    """
    floats: dict[str, Tensor | None] = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    floats |= {"advantages": advantages, "entropy": entropy, "kl": kl}
    check_tokens(len(logprobs), **floats, mask=mask)
    inputs = [None if x is None else x.contiguous() for x in (*floats.values(), mask)]
    tokens = len(logprobs)
    blocks = triton.cdiv(tokens, TOKEN_BLOCK)
    partials = torch.empty(9, blocks, dtype=torch.float32, device=logprobs.device)
    d_logprobs = torch.empty(tokens, dtype=torch.float32, device=logprobs.device)
    if blocks:
        with torch.cuda.device_of(logprobs):
            policy_loss_kernel[(blocks,)](
                *inputs,
                normalizer,
                partials,
                d_logprobs,
                tokens,
                operand(clip_low, logprobs),
                operand(clip_high, logprobs),
                None if dual_clip is None else operand(dual_clip, logprobs),
                BLOCK=TOKEN_BLOCK,
                num_warps=8,
            )
    return *finish(partials, 8, normalizer, entropy_coef, kl_coef), d_logprobs


@triton.jit(do_not_specialize=["M"])
def policy_loss_kernel(
    logprobs,
    old_logprobs,
    advantages,
    entropy,
    kl,
    mask,
    normalizer,
    partials,
    d_logprobs,
    M,
    clip_low,
    clip_high,
    dual_clip,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    keep = inside
    if mask is not None:
        keep = tl.load(mask + i, mask=inside, other=0) != 0
    logprob = load_kept(logprobs, i, keep)
    old_logprob = load_kept(old_logprobs, i, keep)
    advantage = load_kept(advantages, i, keep)
    objective, slope, ratio, k3, clipped, dual_clipped = clipped_objective(
        logprob, old_logprob, advantage, clip_low, clip_high, dual_clip
    )
    tl.store(d_logprobs + i, -slope / tl.load(normalizer), mask=inside)
    zero = tl.zeros((BLOCK,), tl.float32)
    entropies, kls = zero, zero
    if entropy is not None:
        entropies = load_kept(entropy, i, keep)
    if kl is not None:
        kls = load_kept(kl, i, keep)
    count = keep.to(tl.float32)
    ratio *= count
    k3 = tl.where(keep, k3, 0.0)
    values = (-objective, entropies, kls, k3, clipped.to(tl.float32), dual_clipped.to(tl.float32), ratio, count)
    blocks = tl.num_programs(0)
    store_partials(partials, blocks, block, values)
    tl.store(partials + 8 * blocks + block, tl.max(ratio, axis=0))


@triton.jit
def load_kept(tokens, i, keep):
    """Load tokens as fp32; 0 where `keep` is False, for any value in memory."""
    return tl.load(tokens + i, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clipped_objective(logprob, old_logprob, advantage, clip_low, clip_high, dual_clip):
    """PPO's objective J of tokens, to be maximised.

    Returns J, dJ / d logprob, ratio, k3 of the old policy to the new, and whether the clip and the dual clip bound J.
    """
    ratio, ratio_slope, k3 = bounded_exp(logprob - old_logprob)
    unclipped = ratio * advantage
    bounded = clamp(ratio, 1.0 - number(clip_low), 1.0 + number(clip_high)) * advantage
    clipped = bounded < unclipped
    objective = tl.where(clipped, bounded, unclipped)
    held = clipped
    if dual_clip is not None:
        dual_clip = number(dual_clip)
        dual_clipped = (advantage < 0) & (objective < dual_clip * advantage)
        objective = tl.where(dual_clipped, dual_clip * advantage, objective)
        held = held | dual_clipped
    else:
        dual_clipped = clipped & False
    slope = tl.where(held, 0.0, ratio_slope * advantage)
    return objective, slope, ratio, k3, clipped, dual_clipped


@triton.jit
def bounded_exp(x):
    """`fastppo.ops.eager.bounded_exp`, its derivative, and `exp_less_tangent`, which is 0 at 0."""
    near = tl.minimum(x, LOG_RATIO_MAX, propagate_nan=tl.PropagateNan.ALL)
    beyond = tl.maximum(x - LOG_RATIO_MAX, 0.0)
    slope = tl.exp(near)
    return slope + slope * beyond, slope, (slope - 1.0 - near) + (slope - 1.0) * beyond
