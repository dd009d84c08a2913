"""PPO's loss on a chunk of logits: statistics and loss of a row, then its gradient, written over its logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.policy_loss import bounded_exp, clipped_objective
from fastppo.kernels.row import (
    LOG2_E,
    against_reference,
    as_rows,
    capped,
    check_logits,
    check_tokens,
    gradient_slopes,
    number,
    operand,
    read_row,
    tile_columns,
    tiling,
    write_row,
)

SOFTCAP_REGISTERS = 96  # of a thread, with softcap and reference: with fewer, the compiler's choice, registers spill


def policy_loss_in_chunk(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    normalizer: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
    kl_kind: str,
    ref_logprobs: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    gradient: bool,
    token_stats: Tensor,
) -> None:
    """`vocabulary_forward`, `policy_loss` and, with `gradient`, d loss / d logits written over the logits.

    logits: (m, V) fp32, bf16 or fp16, any row stride; targets: (m,) int64; old_logprobs, advantages, ref_logprobs: (m,)
    fp32; normalizer: () fp32, read on the device; mask: (m,) bool; token_stats: (8, m) fp32, any strides, receives
    the terms of `sum_tokens` for each token, 0 for a masked one, whose gradient is 0 too. The KL is exact with
    kl_kind "exact" and ref_logits, (m, V); k2 or k3 with ref_logprobs; else 0.

    Traffic: 3 m V b bytes, 1 without gradient; the logits of a reference are read once, twice if the loss has its KL.
    """
    tokens = {"targets": targets, "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}
    check_chunk(logits, ref_logits, token_stats, kl_kind, **tokens, mask=mask)
    rows, vocabulary = logits.shape
    if rows == 0:
        return

    exact = kl_kind == "exact"
    policy, ref = as_rows(logits), as_rows(ref_logits if exact else None)
    block, width, num_warps = tiling(vocabulary, logits.dtype, softcap, policy.unit > 1)
    with torch.cuda.device_of(logits):
        policy_loss_in_chunk_kernel[(rows,)](
            policy.tensor,
            targets.contiguous(),
            old_logprobs.contiguous(),
            advantages.contiguous(),
            None if exact or ref_logprobs is None else ref_logprobs.contiguous(),
            ref.tensor,
            None if mask is None else mask.contiguous(),
            normalizer,
            token_stats,
            policy.stride,
            ref.stride,
            token_stats.stride(0),
            token_stats.stride(1),
            vocabulary,
            operand(temperature, logits),
            softcap,
            operand(clip_low, logits),
            operand(clip_high, logits),
            None if dual_clip is None else operand(dual_clip, logits),
            operand(entropy_coef, logits),
            operand(kl_coef, logits),
            KL_KIND=kl_kind,
            GRADIENT=gradient,
            REF_GRADIENT=isinstance(kl_coef, Tensor) or kl_coef != 0.0,
            UNIT=policy.unit,
            REF_UNIT=ref.unit,
            BLOCK=block,
            WIDTH=width,
            num_warps=num_warps,
            maxnreg=None if softcap is None or ref.tensor is None else SOFTCAP_REGISTERS,
        )
    if gradient and policy.tensor is not logits and policy.tensor is not None:
        logits.copy_(policy.tensor)


def check_chunk(
    logits: Tensor, ref_logits: Tensor | None, token_stats: Tensor, kl_kind: str, **tokens: Tensor | None
) -> None:
    check_logits("logits", logits, logits)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits, logits)
    rows = len(logits)
    check_tokens(rows, **tokens)
    if token_stats.shape != (8, rows) or token_stats.dtype != torch.float32:
        raise ValueError(f"token_stats is {token_stats.dtype} {tuple(token_stats.shape)}; expected fp32 (8, {rows})")
    if kl_kind not in ("exact", "k2", "k3"):
        raise ValueError(f"kl_kind is {kl_kind!r}; expected 'exact', 'k2' or 'k3'")


@triton.jit(do_not_specialize=["stats_stride", "stats_token_stride"])
def policy_loss_in_chunk_kernel(
    logits,
    targets,
    old_logprobs,
    advantages,
    ref_logprobs,
    ref_logits,
    mask,
    normalizer,
    token_stats,
    stride,
    ref_stride,
    stats_stride,
    stats_token_stride,
    V,
    temperature,
    softcap,
    clip_low,
    clip_high,
    dual_clip,
    entropy_coef,
    kl_coef,
    KL_KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    REF_GRADIENT: tl.constexpr,
    UNIT: tl.constexpr,
    REF_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    if ref_logits is not None:
        ref_logits += m * ref_stride * REF_UNIT
    token_stats += m * stats_token_stride
    columns = tile_columns(BLOCK, WIDTH, UNIT)
    keep = True
    if mask is not None:
        keep = tl.load(mask + m) != 0
    if keep:
        temperature = number(temperature)
        target = tl.load(targets + m)
        u_target, _ = capped(tl.load(logits + target).to(tl.float32), softcap)
        rate = LOG2_E / temperature
        over_temperature = 1.0 / temperature
        peak, log_total, mean, ref_peak, ref_log_total, ref_mean = read_row(
            logits, ref_logits, columns, V, softcap, rate
        )
        logprob = (u_target - peak) * over_temperature - log_total
        objective, slope, ratio, k3, clipped, dual_clipped = clipped_objective(
            logprob, tl.load(old_logprobs + m), tl.load(advantages + m), clip_low, clip_high, dual_clip
        )
        kl, kl_slope = 0.0, 0.0
        if ref_logits is not None:
            _, kl = against_reference(log_total, mean, 0.0, ref_peak, ref_log_total, ref_mean, over_temperature)
        if ref_logprobs is not None:
            kl, kl_slope = kl_estimate(logprob - tl.load(ref_logprobs + m), KL_KIND)
        entropy = log_total - mean * over_temperature
        stats = (-objective, entropy, kl, k3, clipped.to(tl.float32), dual_clipped.to(tl.float32), ratio, 1.0)
        for i in tl.static_range(8):
            tl.store(token_stats + stats_stride * i, stats[i])
        if GRADIENT:
            entropy_coef, kl_coef = number(entropy_coef), number(kl_coef)
            share = 1.0 / tl.load(normalizer)
            g_logprob = (kl_coef * kl_slope - slope) * share
            g_kl = 0.0
            if ref_logits is not None:
                g_kl = kl_coef * share
            slopes = gradient_slopes(
                g_logprob, -entropy_coef * share, 0.0, g_kl, log_total, mean, ref_mean, temperature
            )
            tl.debug_barrier()  # all threads must have read the row before a thread writes to it
            if REF_GRADIENT:
                write_row(logits, ref_logits, logits, columns, target, V, softcap, rate, peak, ref_peak, slopes)
            else:
                write_row(logits, None, logits, columns, target, V, softcap, rate, peak, ref_peak, slopes)
    else:
        for i in tl.static_range(8):
            tl.store(token_stats + stats_stride * i, 0.0)
        if GRADIENT:
            clear_row(logits, columns, V)


@triton.jit
def kl_estimate(d, KL_KIND: tl.constexpr):
    """k2 or k3 of d = logprob - ref_logprob, and its derivative (Schulman 2020; `fastppo.ops.eager.kl_estimate`)."""
    if KL_KIND == "k2":
        kl = d * d * 0.5
        slope = d
    else:
        _, ratio, kl = bounded_exp(-d)
        slope = 1.0 - ratio
    return kl, slope


@triton.jit
def clear_row(row, columns, V):
    BLOCK: tl.constexpr = columns.shape[0] * columns.shape[1]
    zero = tl.zeros(columns.shape, row.dtype.element_ty)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(row + start + columns, zero)
    if whole < V:
        tl.store(row + whole + columns, zero, mask=whole + columns < V)
