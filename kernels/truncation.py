"""Which tokens top_k and top_p keep, by a search over the order of the logits: no sort, and no table in memory.

A program has a whole row, also where there are few rows: each pass over it needs the sums of the pass before, over the
whole row. Divided among programs, each pass would be a launch of its own, 4 to 21 of them a step in place of one, with
its sums in memory in parts that do not depend on the division.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import LOWEST, as_rows, check_logits, operand, tile_columns, tiling
from fastppo.kernels.sample_tokens import first_above

# Bits of the threshold that a pass over the row determines: 16 sums in int32, or 8 in fp64, fit into the registers.
COUNT_DIGIT, MASS_DIGIT = 4, 3
PART = 128  # columns whose ties are counted together; those of one part are read again


def truncation(logits: Tensor, temperature: float | Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What `fastppo.ops.eager.restrict` keeps: least, (R,) fp32, and last, (R,) int64.

    Kept are tokens with a logit above `least`, and of those equal to it the ones up to index `last`. logits: (R, V)
    fp32, bf16 or fp16, any row stride. No NaN and no +inf is left out, so that none is drawn around. Probabilities and
    their sums are fp64, added in a fixed order, so the result of a row depends on its logits only. It reads all logits
    once for each pass of `passes`, and R PART of them once more.
    """
    check_logits("logits", logits, logits)
    rows, vocabulary = logits.shape
    least = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return least, last

    policy = as_rows(logits)
    block, width, num_warps = tiling(vocabulary, torch.float32, None, False)  # more columns would need more registers
    heat = operand(temperature, logits)
    with torch.cuda.device_of(logits):
        truncation_kernel[(rows,)](
            policy.tensor,
            least,
            last,
            policy.stride,
            vocabulary,
            heat if isinstance(heat, Tensor) else bits_of(heat),
            top_k,
            bits_of(top_p),
            UNIT=policy.unit,
            BLOCK=block,
            WIDTH=width,
            PART=PART,
            TILES=triton.next_power_of_2(triton.cdiv(vocabulary, block)),
            BITS=8 * logits.element_size(),
            COUNT_DIGIT=COUNT_DIGIT,
            MASS_DIGIT=MASS_DIGIT,
            BY_COUNT=0 < top_k < vocabulary,
            BY_MASS=top_p < 1.0,
            num_warps=num_warps,
        )
    return least, last


def passes(dtype: torch.dtype, top_k: int, top_p: float) -> int:
    """How often a row is read: for each digit of a threshold, and with top_p once for the maximum and for the ties."""
    bits = 8 * dtype.itemsize
    by_count, by_mass = -(-bits // COUNT_DIGIT), -(-bits // MASS_DIGIT) + 2
    return (by_count if top_k > 0 else 0) + (by_mass if top_p < 1.0 else 0)


def bits_of(number: float) -> int:
    """A positive fp64 number as an integer: Triton would pass a float on as fp32, whose nucleus is another one."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p"])
def truncation_kernel(
    logits,
    least,
    last,
    stride,
    V,
    temperature,
    top_k,
    top_p,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    COUNT_DIGIT: tl.constexpr,
    MASS_DIGIT: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    logits += m * stride * UNIT
    columns = tile_columns(BLOCK, WIDTH, WIDTH)
    whole = V // BLOCK * BLOCK
    key = tl.full((), -(2 ** (BITS - 1)), tl.int32)  # of the last token that is kept
    final = V.to(tl.int64)
    if BY_COUNT:
        key, _, _ = search(logits, columns, V, key, None, 0.0, top_k, BITS, COUNT_DIGIT)
    if BY_MASS:
        peaks = tl.full((BLOCK // WIDTH, WIDTH), LOWEST, tl.float32)
        for start in range(0, whole, BLOCK):
            peaks = tl.maximum(peaks, load(logits, start + columns, V, False).to(tl.float32))
        if whole < V:
            peaks = tl.maximum(peaks, load(logits, whole + columns, V, True).to(tl.float32))
        peak = tl.max(tl.max(peaks, axis=1), axis=0).to(tl.float64)
        rate = 1.0 / fp64(temperature)
        key, above, goal = search(logits, columns, V, key, peak, rate, fp64(top_p), BITS, MASS_DIGIT)

        # Of the tokens that are equal to the last one, as many as are needed.
        share = tl.exp((value_of(key, logits).to(tl.float64) - peak) * rate)
        needed = tl.ceil((goal - above) / share)
        needed = tl.where(needed >= 1, tl.minimum(needed, 1e9), 1.0).to(tl.int32)
        counts = tl.zeros((TILES, BLOCK // PART), tl.int32)  # ties of each part
        tile = tl.arange(0, TILES)[:, None]
        for start in range(0, whole, BLOCK):
            ties = count_ties(logits, start + columns, V, key, PART, False)
            counts = tl.where(tile == start // BLOCK, ties[None, :], counts)
        if whole < V:
            ties = count_ties(logits, whole + columns, V, key, PART, True)
            counts = tl.where(tile == whole // BLOCK, ties[None, :], counts)
        counts = tl.reshape(counts, (TILES * (BLOCK // PART),))
        part = first_above(counts, needed - 1)
        before = tl.sum(tl.where(tl.arange(0, TILES * (BLOCK // PART)) < part, counts, 0), axis=0)
        within = part * PART + tl.arange(0, PART)
        equal = (keys_of(load(logits, within, V, True)) == key) & (within < V)
        final = (part * PART + first_above(equal.to(tl.int32), needed - 1 - before)).to(tl.int64)
    value = value_of(key, logits).to(tl.float32)
    tl.store(least + m, tl.where(value == value, value, float("-inf")))
    tl.store(last + m, final)


@triton.jit
def search(row, columns, V, floor, peak, rate, goal, BITS: tl.constexpr, DIGIT: tl.constexpr):
    """The largest key whose tokens and those above it weigh `goal` or more, of tokens with keys from `floor` on.

    A token weighs 1, or if there is a peak e^((logit - peak) rate); then `goal` is the share of the whole weight. Each
    pass determines DIGIT bits: it adds up what is at or above each of 2^DIGIT thresholds. Returns the key, the weight
    of all above it, and the weight to reach. If weights are NaN, the key is the lowest, which is that of a NaN.
    """
    BLOCK: tl.constexpr = columns.shape[0] * columns.shape[1]
    whole = V // BLOCK * BLOCK
    key = tl.full((), -(2 ** (BITS - 1)), tl.int32)
    zero = tl.zeros((columns.shape[0],), tl.int32 if peak is None else tl.float64)
    above = tl.sum(zero, axis=0)
    target = above + goal
    for step in range(0, (BITS + DIGIT - 1) // DIGIT):
        shift = tl.maximum(BITS - DIGIT - DIGIT * step, 0)
        sums = (zero,) * 2**DIGIT
        for start in range(0, whole, BLOCK):
            sums = add_tile(row, start + columns, V, floor, peak, rate, key, shift, sums, False)
        if whole < V:
            sums = add_tile(row, whole + columns, V, floor, peak, rate, key, shift, sums, True)
        if peak is not None:
            target = tl.where(step == 0, goal * tl.sum(sums[0], axis=0), target)
        chosen = 0
        for digit in tl.static_range(1, 2**DIGIT):
            weight = tl.sum(sums[digit], axis=0)
            chosen += (weight >= target).to(tl.int32)
            above = tl.maximum(above, tl.where(weight < target, weight, above))
        key += chosen << shift
    return key, above, target


@triton.jit
def add_tile(row, columns, V, floor, peak, rate, key, shift, sums, TAIL: tl.constexpr):
    """Add the weights of a tile to the sums, (G,) each, of what is at or above key + (0, 1, 2, ...) 2^shift."""
    logits = load(row, columns, V, TAIL)
    keys = keys_of(logits)
    weights = tl.full(columns.shape, 1, tl.int32) if peak is None else tl.exp((logits.to(tl.float64) - peak) * rate)
    inside = (keys >= floor) & (keys >= key)
    if TAIL:
        inside &= columns < V
    weights = tl.where(inside, weights, 0)
    digits = (keys - key).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    added = (sums[0] + tl.sum(weights, axis=1),)
    for digit in tl.static_range(1, len(sums)):
        added += (sums[digit] + tl.sum(tl.where(digits >= digit, weights, 0), axis=1),)  # type: ignore[assignment]
    return added


@triton.jit
def count_ties(row, columns, V, key, PART: tl.constexpr, TAIL: tl.constexpr):
    """How many tokens of each part of a tile (G, WIDTH) have the key, (G WIDTH / PART,) int32."""
    equal = keys_of(load(row, columns, V, TAIL)) == key
    if TAIL:
        equal &= columns < V
    counts = tl.sum(equal.to(tl.int32), axis=1)
    PARTS: tl.constexpr = columns.shape[0] * columns.shape[1] // PART
    return tl.sum(tl.reshape(counts, (PARTS, columns.shape[0] // PARTS)), axis=1)


@triton.jit
def load(row, columns, V, TAIL: tl.constexpr):
    """Logits in their own dtype, -inf past the end of the row."""
    return tl.load(row + columns, mask=columns < V, other=float("-inf")) if TAIL else tl.load(row + columns)


@triton.jit
def keys_of(logits):
    """int32 in the order of the logits: their bits, with all but the sign flipped in negative ones. -0 has the key of
    0, because they are equal."""
    if logits.dtype == tl.float32:
        bits = logits.to(tl.int32, bitcast=True)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
        keys = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    return tl.where(keys == -1, 0, keys)


@triton.jit
def value_of(key, row):
    """The logit with a key, in the dtype of the row."""
    dtype: tl.constexpr = row.dtype.element_ty
    if dtype == tl.float32:
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(dtype, bitcast=True)
    else:
        return tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def fp64(number):
    """A number as fp64, from its bits or a pointer to it."""
    value = tl.to_tensor(number)
    return tl.load(value).to(tl.float64) if value.dtype.is_ptr() else value.to(tl.float64, bitcast=True)
