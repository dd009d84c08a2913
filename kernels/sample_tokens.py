"""Sampling of one token a row from softmax(logits / temperature) by the inverse distribution function."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import (
    LOG2_E,
    LOWEST,
    as_rows,
    below,
    capped_tile,
    check_logits,
    check_tokens,
    number,
    operand,
    tile_columns,
    tiling,
)

PART = 256  # columns whose probabilities are summed; the columns of the selected part are read again


def sample_tokens(
    logits: Tensor,
    stream: Tensor,
    offset: Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    least: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastppo.ops.eager.sample_tokens` (Devroye 1986, ch. III.2), with u from `fastppo.ops.philox.uniform`.

    logits: (R, V) fp32, bf16 or fp16, any row stride; stream, offset: (R,) int64; seed: modulo 2^64. Returns tokens,
    (R,) int64, and their log probabilities, (R,) fp32: NaN for a row with NaN, +inf or no finite entry. A token whose
    e^(z - max z) is 0 in fp32 is never sampled. The result of a row depends on its logits and (seed, stream, offset)
    only, bit for bit, for rows with the same alignment. With least, (R,) fp32, and last, (R,) int64, what `truncation`
    returns, the result is that of logits with -inf at the tokens that are not kept. Traffic: R (V + PART) b bytes.
    """
    check_logits("logits", logits, logits)
    rows, vocabulary = logits.shape
    check_tokens(rows, stream=stream, offset=offset, least=least, last=last)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return tokens, logprobs

    policy = as_rows(logits)
    block, width, num_warps = tiling(vocabulary, logits.dtype, None, True)  # whole parts, also if not aligned
    with torch.cuda.device_of(logits):
        sample_tokens_kernel[(rows,)](
            policy.tensor,
            stream.contiguous(),
            offset.contiguous(),
            None if least is None else least.contiguous(),
            None if last is None else last.contiguous(),
            tokens,
            logprobs,
            policy.stride,
            vocabulary,
            operand(temperature, logits),
            (int(seed) + 2**63) % 2**64 - 2**63,
            UNIT=policy.unit,
            BLOCK=block,
            WIDTH=width,
            PART=PART,
            TILES=triton.next_power_of_2(triton.cdiv(vocabulary, block)),
            num_warps=num_warps,
        )
    return tokens, logprobs


@triton.jit(do_not_specialize=["seed"])
def sample_tokens_kernel(
    logits,
    stream,
    offset,
    least,
    last,
    tokens,
    logprobs,
    stride,
    V,
    temperature,
    seed,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    TILES: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    temperature = number(temperature)
    rate = LOG2_E / temperature
    columns = tile_columns(BLOCK, WIDTH, WIDTH)
    peaks = tl.full((TILES, BLOCK // PART), LOWEST, tl.float32)  # of each part, in the order of the vocabulary
    totals = tl.zeros((TILES, BLOCK // PART), tl.float32)  # sums of e^(z - peak of the part)
    tile = tl.arange(0, TILES)[:, None]
    whole = V // BLOCK
    for t in range(0, whole):
        u = capped_tile(logits, t * BLOCK + columns, V, None, False)
        peak, total = sum_parts(kept(u, t * BLOCK + columns, least, last, m), rate, PART)
        peaks = tl.where(tile == t, peak[None, :], peaks)
        totals = tl.where(tile == t, total[None, :], totals)
    if whole * BLOCK < V:
        u = capped_tile(logits, whole * BLOCK + columns, V, None, True)
        peak, total = sum_parts(kept(u, whole * BLOCK + columns, least, last, m), rate, PART)
        peaks = tl.where(tile == whole, peak[None, :], peaks)
        totals = tl.where(tile == whole, total[None, :], totals)

    row_peak = tl.max(tl.max(peaks, axis=1), axis=0)
    mass = (totals * tl.exp2(below(peaks, row_peak) * rate)).to(tl.float64)
    mass = tl.reshape(mass, (TILES * (BLOCK // PART),))
    row_total = tl.sum(mass, axis=0)
    threshold = uniform(seed, tl.load(stream + m), tl.load(offset + m)).to(tl.float64) * row_total
    part = first_above(mass, threshold)
    index = tl.arange(0, TILES * (BLOCK // PART))
    threshold -= tl.sum(tl.where(index < part, mass, 0.0), axis=0)

    within = tl.arange(0, PART)
    column = part * PART + within
    u = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
    u = kept(u, column, least, last, m)
    chosen = first_above(tl.exp2(below(u, row_peak) * rate).to(tl.float64), threshold)
    u_token = tl.sum(tl.where(within == chosen, u, 0.0), axis=0)
    tl.store(tokens + m, (part * PART + chosen).to(tl.int64))
    tl.store(logprobs + m, (u_token - row_peak) * (1.0 / temperature) - tl.log(row_total.to(tl.float32)))


@triton.jit
def kept(u, columns, least, last, m):
    """u with -inf where row m is truncated. A NaN stays one."""
    if least is not None:
        limit = tl.load(least + m)
        u = tl.where((u < limit) | ((u == limit) & (columns > tl.load(last + m))), float("-inf"), u)
    return u


@triton.jit
def sum_parts(u, rate, PART: tl.constexpr):
    """Peak and sum of 2^((u - peak) rate) of each part of a tile (G, WIDTH): (G WIDTH / PART,) each."""
    GROUPS: tl.constexpr = u.shape[0]
    WIDTH: tl.constexpr = u.shape[1]
    group_peak = tl.maximum(tl.max(u, axis=1), LOWEST)
    group_total = tl.sum(tl.exp2(below(u, group_peak[:, None]) * rate), axis=1)
    PARTS: tl.constexpr = GROUPS * WIDTH // PART
    group_peak = tl.reshape(group_peak, (PARTS, GROUPS // PARTS))
    group_total = tl.reshape(group_total, (PARTS, GROUPS // PARTS))
    peak = tl.max(group_peak, axis=1)
    return peak, tl.sum(group_total * tl.exp2(below(group_peak, peak[:, None]) * rate), axis=1)


@triton.jit
def first_above(mass, threshold):
    """The first index with mass > 0 whose cumulative sum exceeds the threshold; if there is none because of rounding,
    the last index with mass > 0; 0 if no mass is > 0. Rounding can make cumulative sums decrease, so both conditions
    are needed."""
    index = tl.arange(0, mass.shape[0])
    above = (tl.cumsum(mass, axis=0) > threshold) & (mass > 0)
    first = tl.min(tl.where(above, index, mass.shape[0]), axis=0)
    last = tl.max(tl.where(mass > 0, index, 0), axis=0)
    return tl.where(first < mass.shape[0], first, last)


@triton.jit
def uniform(seed, stream, offset):
    """u in (0, 1), fp32, from Philox4x32-10 with key (seed) and counter (offset, stream), low words first."""
    word, _, _, _ = tl.philox(
        seed,
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        stream.to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23; fits fp32 exactly
