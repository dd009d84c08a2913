"""Sampling of one token a row from softmax(logits / temperature) by the inverse distribution function.

A first kernel writes the peak and the sum of each part of PART columns, several programs a row where there are few
rows. A second one, a program a row, adds them up, finds the part in which the sum passes the threshold and reads that
part again. Neither the sum of a part nor the order in which parts are added depends on the number of programs, so that
the token is the same, bit for bit, for any number of rows.
"""

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
PROGRAMS = 1024  # of a call, about: what the largest GPUs run at a time. A program has whole tiles.


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
    returns, the result is that of logits with -inf at the tokens that are not kept. Traffic: R (V + PART) b bytes for
    the logits, and 16 R V / PART for the parts.
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
    tiles = triton.cdiv(vocabulary, block)
    tiles_each = max(1, tiles * rows // PROGRAMS)
    least = None if least is None else least.contiguous()
    last = None if last is None else last.contiguous()
    peaks, totals = torch.empty(2, rows, tiles * block // PART, device=logits.device)
    row = (policy.tensor, least, last, peaks, totals, policy.stride, vocabulary, operand(temperature, logits))
    shape = {"UNIT": policy.unit, "PART": PART, "PARTS": tiles * block // PART}
    with torch.cuda.device_of(logits):
        parts_kernel[(rows, triton.cdiv(tiles, tiles_each))](
            *row, tiles_each, **shape, BLOCK=block, WIDTH=width, num_warps=num_warps
        )
        choose_kernel[(rows,)](
            *row,
            stream.contiguous(),
            offset.contiguous(),
            tokens,
            logprobs,
            (int(seed) + 2**63) % 2**64 - 2**63,
            **shape,
            PADDED_PARTS=triton.next_power_of_2(tiles * block // PART),
            num_warps=4,
        )
    return tokens, logprobs


@triton.jit(do_not_specialize=["tiles_each"])
def parts_kernel(
    logits,
    least,
    last,
    peaks,
    totals,
    stride,
    V,
    temperature,
    tiles_each,
    UNIT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The peak of each part of a row, and its sum of e^(z - peak)."""
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    rate = LOG2_E / number(temperature)
    limit = limits(least, last, m)
    columns = tile_columns(BLOCK, WIDTH, WIDTH)
    part = m * PARTS + tl.arange(0, BLOCK // PART)
    first = tl.program_id(1) * tiles_each
    whole = V // BLOCK
    for t in range(first, tl.minimum(first + tiles_each, whole)):
        u = capped_tile(logits, t * BLOCK + columns, V, None, False)
        peak, total = sum_parts(kept(u, t * BLOCK + columns, limit), rate, PART)
        tl.store(peaks + part + t * (BLOCK // PART), peak)
        tl.store(totals + part + t * (BLOCK // PART), total)
    if (whole * BLOCK < V) & (first + tiles_each > whole):
        u = capped_tile(logits, whole * BLOCK + columns, V, None, True)
        peak, total = sum_parts(kept(u, whole * BLOCK + columns, limit), rate, PART)
        tl.store(peaks + part + whole * (BLOCK // PART), peak)
        tl.store(totals + part + whole * (BLOCK // PART), total)


@triton.jit(do_not_specialize=["seed"])
def choose_kernel(
    logits,
    least,
    last,
    peaks,
    totals,
    stride,
    V,
    temperature,
    stream,
    offset,
    tokens,
    logprobs,
    seed,
    UNIT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
):
    """The token of a row and its log probability."""
    m = tl.program_id(0).to(tl.int64)
    logits += m * stride * UNIT
    temperature = number(temperature)
    rate = LOG2_E / temperature
    index = tl.arange(0, PADDED_PARTS)
    peak = tl.load(peaks + m * PARTS + index, mask=index < PARTS, other=LOWEST)
    total = tl.load(totals + m * PARTS + index, mask=index < PARTS, other=0.0)
    row_peak = tl.max(peak, axis=0)
    mass = (total * tl.exp2(below(peak, row_peak) * rate)).to(tl.float64)
    row_total = tl.sum(mass, axis=0)
    threshold = uniform(seed, tl.load(stream + m), tl.load(offset + m)).to(tl.float64) * row_total
    part = first_above(mass, threshold)
    threshold -= tl.sum(tl.where(index < part, mass, 0.0), axis=0)

    within = tl.arange(0, PART)
    column = part * PART + within
    u = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
    u = kept(u, column, limits(least, last, m))
    chosen = first_above(tl.exp2(below(u, row_peak) * rate).to(tl.float64), threshold)
    u_token = tl.sum(tl.where(within == chosen, u, 0.0), axis=0)
    tl.store(tokens + m, (part * PART + chosen).to(tl.int64))
    tl.store(logprobs + m, (u_token - row_peak) * (1.0 / temperature) - tl.log(row_total.to(tl.float32)))


@triton.jit
def limits(least, last, m):
    """What row m keeps, see `truncation`, or None."""
    return None if least is None else (tl.load(least + m), tl.load(last + m))


@triton.jit
def kept(u, columns, limit):
    """u with -inf where its row is truncated. A NaN stays one."""
    if limit is not None:
        u = tl.where((u < limit[0]) | ((u == limit[0]) & (columns > limit[1])), float("-inf"), u)
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
