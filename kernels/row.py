"""Shared code of the vocabulary kernels: a row of logits is processed in tiles, read once, and overwritten by its
gradient.

A program processes one row. A tile is BLOCK columns as (BLOCK // WIDTH, WIDTH): the WIDTH columns of a thread are
adjacent and fill 16 bytes, one load. Each group of WIDTH columns has its own running maximum (peak) and sums, so that
no thread waits for another before the end of the row, and WIDTH columns share the cost of a new peak.

The kernels compute with the capped logits u = softcap tanh(logits / softcap), and apply the temperature at the end:
z = u / temperature, e^(z - max z) = 2^((u - max u) rate) with rate = log2(e) / temperature.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.errors import log_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_2_LOG2_E = tl.constexpr(-2.8853900817779268)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the smallest fp32: the initial peak
FAR = tl.constexpr(-1e30)  # replaces -inf in differences: 2^(FAR rate) = 0, and 0 FAR is 0, but 0 (-inf) is NaN


class Tiling(NamedTuple):
    """The tiles of a kernel."""

    block: int  # columns of a tile
    width: int  # columns that fill 16 bytes
    num_warps: int


def tiling(vocabulary: int, dtype: torch.dtype, softcap: float | None, aligned: bool) -> Tiling:
    """The tiling for rows of this size: two loads of 16 bytes a thread and tile, or one with a softcap or with rows
    that are not aligned, which need more registers; the largest number of warps, up to 8, with at least 4 tiles a row.
    It is the same for all kernels, so that all compute the same sums, bit for bit."""
    width = 16 // dtype.itemsize
    warp_columns = (2 if softcap is None and aligned else 1) * width * 32
    num_warps = min(8, triton.next_power_of_2(max(1, vocabulary // (4 * warp_columns)) + 1) // 2)
    return Tiling(num_warps * warp_columns, width, num_warps)


class Rows(NamedTuple):
    """A tensor with adjacent columns, whose rows start stride * unit elements apart."""

    tensor: Tensor | None
    stride: int
    unit: int  # elements in 16 bytes if all rows are aligned to 16 bytes, so that the compiler knows it; else 1


def as_rows(logits: Tensor | None) -> Rows:
    """Logits for the kernels: the tensor itself, or a copy if its columns are not adjacent."""
    if logits is None:
        return Rows(None, 0, 1)
    if logits.stride(1) != 1 and logits.shape[1] != 1:
        log_once(f"columns of logits are {logits.stride(1)} elements apart: the rows are copied first", logging.WARNING)
        logits = logits.contiguous()
    width = 16 // logits.element_size()
    if logits.stride(0) % width == 0 and logits.data_ptr() % 16 == 0:
        return Rows(logits, logits.stride(0) // width, width)
    log_once(
        f"rows of {logits.shape[1]} logits in {logits.dtype}, {logits.stride(0)} elements apart, do not all start at "
        f"multiples of 16 bytes ({width} elements): they are read and written one element at a time",
        logging.WARNING,
    )
    return Rows(logits, logits.stride(0), 1)


def operand(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """A coefficient for a kernel: a tensor on the device of `like`, which `number` reads, or a number."""
    on_device = isinstance(coefficient, Tensor) and coefficient.device == like.device
    return coefficient if on_device else float(coefficient)


def check_logits(name: str, logits: Tensor, like: Tensor) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {logits.dtype}; these kernels support fp32, bf16 and fp16")
    if logits.shape != like.shape or logits.device != like.device or logits.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)} on {logits.device}; expected {tuple(like.shape)} on {like.device}"
        )


def check_tokens(rows: int, **tokens: Tensor | None) -> None:
    """Check that each tensor has one number for each row."""
    for name, tensor in tokens.items():
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({rows},)")


@triton.jit
def number(coefficient):
    """A coefficient as fp32, from a number or a pointer to one."""
    value = tl.to_tensor(coefficient)
    if value.dtype.is_ptr():
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def tile_columns(BLOCK: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """The columns of a tile, (BLOCK // WIDTH, WIDTH). A thread has whole groups of WIDTH columns: adjacent columns,
    which are one load; in rows that are not aligned (UNIT = 1) adjacent threads load adjacent columns."""
    group, member = tl.arange(0, BLOCK // WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    return group + member * (BLOCK // WIDTH) if UNIT == 1 else group * WIDTH + member


@triton.jit
def load_tile(row, columns, V, TAIL: tl.constexpr):
    """fp32 logits of a tile. Only the last tile of a row is masked: a mask would split loads of 16 bytes."""
    logits = tl.load(row + columns, mask=columns < V, other=float("-inf")) if TAIL else tl.load(row + columns)
    return logits.to(tl.float32)


@triton.jit
def capped(logits, softcap):
    """u = softcap tanh(logits / softcap), and du / d logits = 1 - tanh^2.

    tanh = (1 - t) / (1 + t) with t = e^(-2 |v|), or its series if 1 - t would lose digits.
    """
    u, slope = logits, 1.0
    if softcap is not None:
        v = logits * (1.0 / softcap)
        t = tl.exp2(tl.abs(v) * MINUS_2_LOG2_E)
        over = 1.0 / (1.0 + t)
        far = (1.0 - t) * over
        far = tl.where(v < 0, -far, far)
        w = v * v
        near = v + v * w * (-1.0 / 3 + w * (2.0 / 15 + w * (-17.0 / 315 + w * (62.0 / 2835))))
        u = softcap * tl.where(w < 0.1, near, far)
        slope = 4.0 * t * over * over
    return u, slope


@triton.jit
def capped_tile(row, columns, V, softcap, TAIL: tl.constexpr):
    """u of a tile, -inf past the end of the row."""
    u, _ = capped(load_tile(row, columns, V, TAIL), softcap)
    if TAIL:
        u = tl.where(columns < V, u, float("-inf"))
    return u


@triton.jit
def below(u, peak):
    """u - peak, at least FAR. NaN stays NaN, so that the result of a row with a NaN is NaN."""
    return tl.maximum(u - peak, FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_tile(u, peak, total, weighted, rate):
    """Add a tile u, (G, WIDTH), to the peak, total = sum e and weighted = sum e (u - peak) of each group, (G,).

    e = 2^((u - peak) rate). Returns the three, e, and the factor by which the new peak has scaled the sums. All terms
    of `weighted`, that of a new peak too, are at most 0, so that nothing cancels.
    """
    new_peak = tl.maximum(peak, tl.max(u, axis=1))
    moved = below(peak, new_peak)
    shrink = tl.exp2(moved * rate)
    x = below(u, new_peak[:, None])
    e = tl.exp2(x * rate)
    weighted = (weighted + moved * total) * shrink + tl.sum(e * x, axis=1)
    total = total * shrink + tl.sum(e, axis=1)
    return new_peak, total, weighted, e, shrink


@triton.jit
def read_tile(row, ref_row, columns, V, softcap, rate, peak, total, weighted, ref, TAIL: tl.constexpr):
    """One tile of `read_row`: the running values after the columns of the tile."""
    u = capped_tile(row, columns, V, softcap, TAIL)
    if ref_row is None:
        peak, total, weighted, _, _ = add_tile(u, peak, total, weighted, rate)
    else:
        ref_peak, ref_total, ref_weighted, hole = ref
        r = capped_tile(ref_row, columns, V, softcap, TAIL)
        hole = tl.maximum(hole, tl.max(tl.where(r == float("-inf"), u, float("-inf")), axis=1))
        old_total = total
        peak, total, weighted, e, shrink = add_tile(u, peak, total, weighted, rate)
        new_ref_peak = tl.maximum(ref_peak, tl.max(r, axis=1))
        moved = below(ref_peak, new_ref_peak)
        y = below(r, new_ref_peak[:, None])
        ref_total = ref_total * tl.exp2(moved * rate) + tl.sum(tl.exp2(y * rate), axis=1)
        ref_weighted = (ref_weighted + moved * old_total) * shrink + tl.sum(e * y, axis=1)
        ref = (new_ref_peak, ref_total, ref_weighted, hole)
    return peak, total, weighted, ref


@triton.jit
def read_row(row, ref_row, columns, V, softcap, rate):
    """Read a row and, unless ref_row is None, that of its reference once, in tiles of `columns`, (G, WIDTH).

    Returns (peak, log_total, mean, ref_peak, ref_log_total, ref_mean), fp32 scalars: max u, log s = log sum
    e^(z - max z) and E[u - max u]; for the reference max r, its log s, and E[r - max r] under the policy: -inf if the
    reference is -inf at a column with p > 0. The last three are 0 without a reference.
    """
    BLOCK: tl.constexpr = columns.shape[0] * columns.shape[1]
    zero = tl.zeros((columns.shape[0],), tl.float32)
    peak, total, weighted = zero + LOWEST, zero, zero
    ref = (peak, zero, zero, zero + float("-inf"))
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        peak, total, weighted, ref = read_tile(
            row, ref_row, start + columns, V, softcap, rate, peak, total, weighted, ref, False
        )
    if whole < V:
        peak, total, weighted, ref = read_tile(
            row, ref_row, whole + columns, V, softcap, rate, peak, total, weighted, ref, True
        )

    row_peak = tl.max(peak, axis=0)
    moved = below(peak, row_peak)
    shrink = tl.exp2(moved * rate)
    row_total = tl.sum(total * shrink, axis=0)
    mean = tl.sum((weighted + moved * total) * shrink, axis=0) / row_total
    row_ref_peak, ref_log_total, ref_mean = 0.0, 0.0, 0.0
    if ref_row is not None:
        ref_peak, ref_total, ref_weighted, hole = ref
        row_ref_peak = tl.max(ref_peak, axis=0)
        moved = below(ref_peak, row_ref_peak)
        ref_log_total = tl.log(tl.sum(ref_total * tl.exp2(moved * rate), axis=0))
        ref_mean = tl.sum((ref_weighted + moved * total) * shrink, axis=0) / row_total
        infinite = tl.exp2(below(tl.max(hole, axis=0), row_peak) * rate) > 0
        ref_mean = tl.where(infinite, float("-inf"), ref_mean)
    return row_peak, tl.log(row_total), mean, row_ref_peak, ref_log_total, ref_mean


@triton.jit
def against_reference(log_total, mean, r_target, ref_peak, ref_log_total, ref_mean, over_temperature):
    """The log probability of the target under the reference, and the KL, from the results of `read_row`.

    If all entries of the reference's row are -inf, and so is log_total, they are -inf and +inf.
    """
    kl = (mean * over_temperature - log_total) - (ref_mean * over_temperature - ref_log_total)
    excluded = ref_log_total == float("-inf")
    logprob = (r_target - ref_peak) * over_temperature - ref_log_total
    logprob = tl.where(excluded, float("-inf"), logprob)
    return logprob, tl.where(excluded & (mean == mean), float("inf"), kl)


@triton.jit
def gradient_slopes(g_logprob, g_entropy, g_lse, g_kl, log_total, mean, ref_mean, temperature):
    """The coefficients of the gradient of a row: d logits = (base + slope x - kl_slope y) e + target_slope at the
    target.

    x = u - max u, y = r - max r, e = e^(x / temperature); mean = E[x], ref_mean = E[y]. From
    dz = g_logprob (1_target - p) + g_lse p + (g_kl - g_entropy) p (x - E[x]) - g_kl p (y - E[y]), x and y over the
    temperature, p = e / s. An infinite KL (ref_mean is -inf) has no gradient.
    """
    infinite = ref_mean == float("-inf")
    g_kl = tl.where(infinite, 0.0, g_kl)
    ref_mean = tl.where(infinite, 0.0, ref_mean)
    over_temperature = 1.0 / temperature
    slope = (g_kl - g_entropy) * over_temperature
    kl_slope = g_kl * over_temperature
    base = g_lse - g_logprob - slope * mean + kl_slope * ref_mean
    scale = tl.exp2(log_total * -LOG2_E) * over_temperature
    return base * scale, slope * scale, kl_slope * scale, g_logprob * over_temperature


@triton.jit
def write_tile(row, ref_row, out, columns, target, V, softcap, rate, peak, ref_peak, slopes, TAIL: tl.constexpr):
    """One tile of `write_row`."""
    base, slope, kl_slope, target_slope = slopes
    u, cap_slope = capped(load_tile(row, columns, V, TAIL), softcap)
    x = below(u, peak)
    d = base + slope * x
    if ref_row is not None:
        r, _ = capped(load_tile(ref_row, columns, V, TAIL), softcap)
        d -= kl_slope * below(r, ref_peak)
    d = d * tl.exp2(x * rate) + tl.where(columns == target, target_slope, 0.0)
    if softcap is not None:
        d *= cap_slope
    if TAIL:
        tl.store(out + columns, d.to(out.dtype.element_ty), mask=columns < V)
    else:
        tl.store(out + columns, d.to(out.dtype.element_ty))


@triton.jit
def write_row(row, ref_row, out, columns, target, V, softcap, rate, peak, ref_peak, slopes):
    """Read a row (and that of its reference unless ref_row is None) and write its gradient; out may be row."""
    BLOCK: tl.constexpr = columns.shape[0] * columns.shape[1]
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        write_tile(row, ref_row, out, start + columns, target, V, softcap, rate, peak, ref_peak, slopes, False)
    if whole < V:
        write_tile(row, ref_row, out, whole + columns, target, V, softcap, rate, peak, ref_peak, slopes, True)
