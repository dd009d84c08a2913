"""The gradient of `vocabulary_forward`: one more read of each row of logits, and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import (
    LOG2_E,
    as_rows,
    check_logits,
    check_tokens,
    gradient_slopes,
    number,
    operand,
    tile_columns,
    tiling,
    write_row,
)


def vocabulary_backward(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    grad: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ref_logits: Tensor | None,
    out: Tensor,
) -> None:
    """Write d logits to `out`, given the upstream gradients of a `vocabulary_forward` with the same arguments.

    stats: its result, (5 or 10, M) fp32; grad: (4, M) fp32, any strides, gradients by logprobs, entropy, lse and kl,
    the last ignored without a reference; out: (M, V) in the dtype of logits, any row stride, may be logits. A KL of
    +inf has no gradient, and an entry of probability 0 receives none. Traffic: 2 M V b bytes, 3 with a reference.
    """
    check_logits("logits", logits, logits)
    check_logits("out", out, logits)
    check_tokens(logits.shape[0], targets=targets)
    rows, vocabulary = logits.shape
    if out.dtype != logits.dtype or grad.shape != (4, rows) or grad.dtype != torch.float32:
        raise ValueError(
            f"out is {out.dtype}, grad {grad.dtype} {tuple(grad.shape)}; expected {logits.dtype}, fp32 (4, {rows})"
        )
    if stats.shape[0] < (5 if ref_logits is None else 10) or stats.shape[1] != rows:
        raise ValueError(f"stats has shape {tuple(stats.shape)}; expected ({5 if ref_logits is None else 10}, {rows})")
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits, logits)

    if rows == 0:
        return

    policy, ref, gradient = as_rows(logits), as_rows(ref_logits), as_rows(out)
    block, width, num_warps = tiling(vocabulary, logits.dtype, softcap, policy.unit > 1)
    with torch.cuda.device_of(logits):
        vocabulary_backward_kernel[(rows,)](
            policy.tensor,
            targets.contiguous(),
            ref.tensor,
            stats.contiguous(),
            grad,
            gradient.tensor,
            policy.stride,
            ref.stride,
            gradient.stride,
            grad.stride(0),
            grad.stride(1),
            rows,
            vocabulary,
            operand(temperature, logits),
            softcap,
            UNIT=policy.unit,
            REF_UNIT=ref.unit,
            OUT_UNIT=gradient.unit,
            BLOCK=block,
            WIDTH=width,
            num_warps=num_warps,
        )
    if gradient.tensor is not out and gradient.tensor is not None:
        out.copy_(gradient.tensor)


@triton.jit(do_not_specialize=["M", "grad_stride", "grad_token_stride"])
def vocabulary_backward_kernel(
    logits,
    targets,
    ref_logits,
    stats,
    grad,
    out,
    stride,
    ref_stride,
    out_stride,
    grad_stride,
    grad_token_stride,
    M,
    V,
    temperature,
    softcap,
    UNIT: tl.constexpr,
    REF_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    out += m * out_stride * OUT_UNIT
    temperature = number(temperature)
    target = tl.load(targets + m)
    grad += m * grad_token_stride
    g_logprob = tl.load(grad)
    g_entropy = tl.load(grad + grad_stride)
    g_lse = tl.load(grad + grad_stride * 2)
    stats += m
    entropy = tl.load(stats + M)
    peak = tl.load(stats + M * 3)
    log_total = tl.load(stats + M * 4)
    mean = (log_total - entropy) * temperature
    g_kl, ref_peak, ref_mean = 0.0, 0.0, 0.0
    if ref_logits is not None:
        ref_logits += m * ref_stride * REF_UNIT
        g_kl = tl.load(grad + grad_stride * 3)
        kl = tl.load(stats + M * 6)
        ref_peak = tl.load(stats + M * 8)
        ref_mean = (tl.load(stats + M * 9) - entropy - kl) * temperature
    slopes = gradient_slopes(g_logprob, g_entropy, g_lse, g_kl, log_total, mean, ref_mean, temperature)
    columns = tile_columns(BLOCK, WIDTH, UNIT)
    write_row(logits, ref_logits, out, columns, target, V, softcap, LOG2_E / temperature, peak, ref_peak, slopes)
