"""Statistics of rows of logits: log probability, entropy and, with a reference, exact KL, from one read of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import (
    LOG2_E,
    against_reference,
    as_rows,
    capped,
    check_logits,
    check_tokens,
    number,
    operand,
    read_row,
    tile_columns,
    tiling,
)


def vocabulary_forward(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None, ref_logits: Tensor | None
) -> Tensor:
    """Statistics of z = softcap tanh(logits / softcap) / temperature for each row.

    logits: (M, V) fp32, bf16 or fp16, any row stride; targets: (M,) int64 in [0, V); ref_logits: (M, V) or None, may
    have another dtype. Returns (5, M) fp32: logprobs, entropy, lse, max u of the capped logits u, which fp32 represents
    exactly, and log sum e^(z - max z); with a reference (10, M): also its logprobs, KL(policy || reference), its lse,
    max and log sum. Traffic: M V b bytes, b bytes an element, and as much for the reference.
    """
    check_logits("logits", logits, logits)
    check_tokens(logits.shape[0], targets=targets)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits, logits)

    rows, vocabulary = logits.shape
    stats = torch.empty(5 if ref_logits is None else 10, rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return stats

    policy, ref = as_rows(logits), as_rows(ref_logits)
    block, width, num_warps = tiling(vocabulary, logits.dtype, softcap, policy.unit > 1)
    with torch.cuda.device_of(logits):
        vocabulary_forward_kernel[(rows,)](
            policy.tensor,
            targets.contiguous(),
            ref.tensor,
            stats,
            policy.stride,
            ref.stride,
            rows,
            vocabulary,
            operand(temperature, logits),
            softcap,
            UNIT=policy.unit,
            REF_UNIT=ref.unit,
            BLOCK=block,
            WIDTH=width,
            num_warps=num_warps,
        )
    return stats


@triton.jit(do_not_specialize=["M"])
def vocabulary_forward_kernel(
    logits,
    targets,
    ref_logits,
    stats,
    stride,
    ref_stride,
    M,
    V,
    temperature,
    softcap,
    UNIT: tl.constexpr,
    REF_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    if ref_logits is not None:
        ref_logits += m * ref_stride * REF_UNIT
    temperature = number(temperature)
    target = tl.load(targets + m)
    u_target, _ = capped(tl.load(logits + target).to(tl.float32), softcap)
    peak, log_total, mean, ref_peak, ref_log_total, ref_mean = read_row(
        logits, ref_logits, tile_columns(BLOCK, WIDTH, UNIT), V, softcap, LOG2_E / temperature
    )
    over_temperature = 1.0 / temperature
    stats += m
    tl.store(stats, (u_target - peak) * over_temperature - log_total)
    tl.store(stats + M, log_total - mean * over_temperature)
    tl.store(stats + M * 2, peak * over_temperature + log_total)
    tl.store(stats + M * 3, peak)
    tl.store(stats + M * 4, log_total)
    if ref_logits is not None:
        r_target, _ = capped(tl.load(ref_logits + target).to(tl.float32), softcap)
        ref_logprob, kl = against_reference(
            log_total, mean, r_target, ref_peak, ref_log_total, ref_mean, over_temperature
        )
        tl.store(stats + M * 5, ref_logprob)
        tl.store(stats + M * 6, kl)
        tl.store(stats + M * 7, ref_peak * over_temperature + ref_log_total)
        tl.store(stats + M * 8, ref_peak)
        tl.store(stats + M * 9, ref_log_total)
