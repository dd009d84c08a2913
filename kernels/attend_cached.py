"""One decode step of attention over a key/value cache, the length of each row split among programs.

A program computes the queries that share a kv head over one split of a row's positions, reads each key and value once,
and keeps a running maximum and sums of fp32 (Milakov & Gimelshein 2018). Where a row has several splits, their sums are
partial ones, and a second kernel adds them in the order of the splits (Flash-Decoding, Dao et al. 2023).

How a row is split depends on the number of its own positions and on the model alone, not on the other rows, their
number or the room in the cache: its result is the same, bit for bit, in any batch. The grid depends on shapes alone, as
a CUDA graph requires: programs beyond the splits of their row leave at once.

Products of fp32 are exact products, rounded once in the sum. bf16 and fp16 are multiplied by tensor cores in tf32,
which holds both exactly; the weights of the values are rounded to tf32 before they are added up, so that they are as
much as their sum says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import DTYPES, LOG2_E, LOWEST, capped

SPLITS_READ_TOGETHER = 8


class Tiling(NamedTuple):
    """How the positions of a row are computed, the same for every call of a model."""

    split: int  # a row has one split for each `split` positions, rounded down: a split is shorter than two of these
    block: int  # positions of a tile
    stages: int  # tiles of keys, and as many of values, that are on their way or being computed
    num_warps: int


def tiling(group: int, width: int, itemsize: int) -> Tiling:
    """The tiling for `group` queries a kv head, of this width.

    A split costs its partial sums, written and read, 8 group (width + 2) bytes, and its own read of the queries, group
    width itemsize bytes; its keys and values are 2 split width itemsize bytes. With 160 positions a query the cost is
    at most 1/60 of that in bf16, for widths from 64 on. Larger splits would be fewer programs to keep a GPU busy, and
    splits of fewer than 256 positions more of them than it needs.

    The tiles of keys and of values that are on their way take 32 KiB, so that four programs fit into a multiprocessor.
    """
    heads, columns = triton.next_power_of_2(group), padded_width(width)
    split = max(256, 160 * heads)
    room = 8192 // (columns * itemsize)
    block = min(64, max(16, room)) if heads <= 32 else 16
    num_warps = 4 if heads * columns < 4096 else 8 if heads * columns < 16384 else 16
    return Tiling(split, block, 3 if room >= block else 2, num_warps)


def padded_width(width: int) -> int:
    """Columns of a tile: a power of two, and at least 16, as a product requires."""
    columns: int = triton.next_power_of_2(width)
    return max(16, columns)


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`fastppo.ops.eager.attend_cached`: append a position to R rows of the cache and attend to all of each row.

    query: (R, heads, D) fp32, bf16 or fp16; key, value: (R, kv heads, D); key_cache, value_cache: (rows, kv heads, T,
    D), written in place; of all five the last dimension is dense, and the others have any strides, with the same bits
    for the same alignment. lengths: (rows,) and rows: (R,), int32 or int64, contiguous; the host does not read them.
    Returns (R, heads, D), with NaN for a row that is not in the cache, or has no room for one more position, of which
    nothing is written. No row may be named twice. Traffic: keys and values of the positions attended to, once, and for
    rows of two splits and more at most 1/60 of that (`tiling`).
    """
    check_arguments(query, key, value, key_cache, value_cache, lengths, rows)
    active, heads, width = query.shape
    total, kv_heads, capacity, _ = key_cache.shape
    out = torch.empty((active, heads, width), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    split, block, stages, num_warps = tiling(heads // kv_heads, width, query.element_size())
    splits = max(1, min(window or capacity, capacity) // split)  # of the longest row that the cache has room for
    places = active * heads * splits if splits > 1 else 0
    partials = torch.empty((places, width), dtype=torch.float32, device=query.device)
    stats = torch.empty((places, 2), dtype=torch.float32, device=query.device)
    row = (lengths, rows, total, capacity, window)
    shape = {"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "WIDTH": width, "COLUMNS": padded_width(width)}
    with torch.cuda.device_of(query):
        attend_kernel[(active * kv_heads, splits)](
            *(query, key, value, key_cache, value_cache, out, partials, stats),
            *(query.stride()[:2], key.stride()[:2], value.stride()[:2]),
            *(key_cache.stride()[:3], value_cache.stride()[:3]),
            *row,
            splits,
            float(scale),
            float(softcap) or None,
            **shape,
            HEADS=triton.next_power_of_2(heads // kv_heads),
            SPLIT=split,
            BLOCK=block,
            STAGES=stages,
            EXACT=query.dtype == torch.float32,
            num_warps=num_warps,
        )
        if splits > 1:
            combine_kernel[(active * heads,)](
                out, partials, stats, *row, splits, **shape, SPLIT=split, CHUNK=SPLITS_READ_TOGETHER, num_warps=1
            )
    return out


def check_arguments(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, rows: Tensor
) -> None:
    """Check what would let the kernels read or write where they must not."""
    if query.dtype not in DTYPES or query.ndim != 3:
        raise ValueError(
            f"query is {query.dtype} {tuple(query.shape)}; expected float32, bfloat16 or float16, (rows, heads, width)"
        )
    if key_cache.ndim != 4 or key_cache.shape[1] == 0 or query.shape[1] % key_cache.shape[1]:
        raise ValueError(
            f"key_cache has shape {tuple(key_cache.shape)} and query {tuple(query.shape)}; expected (rows, kv heads, "
            "positions, width), and heads of the query that are a multiple of kv heads"
        )
    active, _, width = query.shape
    total, kv_heads, capacity, _ = key_cache.shape
    for name, tensor, shape in (
        ("key", key, (active, kv_heads, width)),
        ("value", value, (active, kv_heads, width)),
        ("key_cache", key_cache, (total, kv_heads, capacity, width)),
        ("value_cache", value_cache, (total, kv_heads, capacity, width)),
        ("lengths", lengths, (total,)),
        ("rows", rows, (active,)),
    ):
        if tensor.shape != shape or tensor.device != query.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; expected {shape} on {query.device}"
            )
        if name in ("lengths", "rows"):
            if tensor.dtype not in (torch.int32, torch.int64) or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype}; expected int32 or int64, contiguous")
        elif tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, and has {tensor.dtype}")
    dense = {"query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    for name, tensor in dense.items():
        if tensor.stride(-1) != 1 and width != 1:
            raise ValueError(f"{name} must be dense in its last dimension; its strides are {tensor.stride()}")


@triton.jit
def row_span(lengths, rows, active, total, capacity, window, SPLIT: tl.constexpr):
    """Of an active row: its row in the cache, its length, the first position that it attends to, and its number of
    splits, 0 for a row that is not in the cache or has no room left. Positions are int32, the row int64."""
    row = tl.load(rows + active).to(tl.int64)
    length = tl.load(lengths + row, mask=(row >= 0) & (row < total), other=-1).to(tl.int64)
    valid = (length >= 0) & (length < capacity)
    length = tl.where(valid, length, 0).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(length + 1 - window, 0), 0)
    splits = tl.where(valid, tl.maximum((length + 1 - first) // SPLIT, 1), 0)
    return row, length, first, splits


@triton.jit
def add_scores(s, peak, mass, EXACT: tl.constexpr):
    """Add scores s, (HEADS, BLOCK), to the peak and to mass = sum of e^(s - peak), (HEADS,) each.

    Returns both, the factor by which the new peak scales earlier sums, and e^(s - peak). A score of -inf adds 0. A NaN
    is not in the peak, but in the terms."""
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    shrink = tl.exp2((peak - new_peak) * LOG2_E)
    p = tl.exp2((s - new_peak[:, None]) * LOG2_E)
    if not EXACT:  # to tf32, which has 13 bits less
        rounded = ((p.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        p = tl.where(p == p, rounded, p)  # the largest NaN would become -0
    return new_peak, mass * shrink + tl.sum(p, axis=1), shrink, p


@triton.jit(do_not_specialize=["total", "capacity", "window", "places"])
def attend_kernel(
    query,
    key,
    value,
    key_cache,
    value_cache,
    out,
    partials,
    stats,
    query_strides,
    key_strides,
    value_strides,
    keys_strides,
    values_strides,
    lengths,
    rows,
    total,
    capacity,
    window,
    places,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """places: number of splits that `partials` and `stats` have room for."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    active = (tl.program_id(0) // KV_HEADS).to(tl.int64)  # offsets exceed 2^31
    kv_head, split = (tl.program_id(0) % KV_HEADS).to(tl.int64), tl.program_id(1)
    row, length, first, splits = row_span(lengths, rows, active, total, capacity, window, SPLIT)
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    inside, mine = column < WIDTH, head < GROUP
    shown = mine[:, None] & inside[None, :]
    first_head = active * (KV_HEADS * GROUP) + kv_head * GROUP
    if split >= splits:
        if split == 0:
            tl.store(out + (first_head + head)[:, None] * WIDTH + column[None, :], float("nan"), mask=shown)
        return

    query += active * query_strides[0] + (kv_head * GROUP + head)[:, None] * query_strides[1] + column[None, :]
    q = tl.load(query, mask=shown, other=0.0).to(tl.float32)
    keys = key_cache + row * keys_strides[0] + kv_head * keys_strides[1] + column
    values = value_cache + row * values_strides[0] + kv_head * values_strides[1] + column
    peak = tl.full((HEADS,), LOWEST, tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    weighted = tl.zeros((HEADS, COLUMNS), tl.float32)  # sum of e^(s - peak) v
    if split == splits - 1:  # the new position, which is not in the cache yet
        k = tl.load(key + active * key_strides[0] + kv_head * key_strides[1] + column, mask=inside, other=0.0)
        v = tl.load(value + active * value_strides[0] + kv_head * value_strides[1] + column, mask=inside, other=0.0)
        tl.store(keys + length.to(tl.int64) * keys_strides[2], k, mask=inside)
        tl.store(values + length.to(tl.int64) * values_strides[2], v, mask=inside)
        s, _ = capped(tl.sum(q * k.to(tl.float32)[None, :], axis=1) * scale, softcap)
        peak = tl.maximum(s, LOWEST)
        mass = tl.exp2((s - peak) * LOG2_E)
        weighted = mass[:, None] * v.to(tl.float32)[None, :]

    blocks = tl.cdiv(length + 1 - first, BLOCK).to(tl.int64)
    start = first + (split * blocks // splits * BLOCK).to(tl.int32)
    stop = tl.minimum(first + ((split + 1) * blocks // splits * BLOCK).to(tl.int32), length)
    for t in tl.range(start, stop, BLOCK, num_stages=STAGES):
        position = (t + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here = position < stop
        k = tl.load(keys[None, :] + position * keys_strides[2], mask=here & inside[None, :], other=0.0)
        v = tl.load(values[None, :] + position * values_strides[2], mask=here & inside[None, :], other=0.0)
        s, _ = capped(tl.dot(q, tl.trans(k.to(tl.float32)), input_precision=PRECISION) * scale, softcap)
        s = tl.where(tl.trans(here), s, float("-inf"))
        peak, mass, shrink, p = add_scores(s, peak, mass, EXACT)
        weighted = tl.dot(p, v.to(tl.float32), weighted * shrink[:, None], input_precision=PRECISION)

    heads = first_head + head
    if splits == 1:
        tl.store(out + heads[:, None] * WIDTH + column[None, :], weighted / mass[:, None], mask=shown)
    else:
        place = heads * places + split
        tl.store(partials + place[:, None] * WIDTH + column[None, :], weighted, mask=shown)
        tl.store(stats + 2 * place, peak, mask=mine)
        tl.store(stats + 2 * place + 1, mass, mask=mine)


@triton.jit(do_not_specialize=["total", "capacity", "window", "places"])
def combine_kernel(
    out,
    partials,
    stats,
    lengths,
    rows,
    total,
    capacity,
    window,
    places,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for each query: the sums of the splits of its row, if there are several, added in their order."""
    head = tl.program_id(0).to(tl.int64)
    _, _, _, splits = row_span(lengths, rows, head // (KV_HEADS * GROUP), total, capacity, window, SPLIT)
    if splits <= 1:
        return
    column, chunk = tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
    inside = column < WIDTH
    peak, mass = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    weighted = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + chunk
        place, there = head * places + split, split < splits
        split_peak = tl.load(stats + 2 * place, mask=there, other=LOWEST)
        split_mass = tl.load(stats + 2 * place + 1, mask=there, other=0.0)
        pointers = partials + place[:, None] * WIDTH + column[None, :]
        split_weighted = tl.load(pointers, mask=there[:, None] & inside[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(split_peak, axis=0))
        shrink = tl.exp2((peak - new_peak) * LOG2_E)
        grow = tl.exp2((split_peak - new_peak) * LOG2_E)
        mass = mass * shrink + tl.sum(split_mass * grow, axis=0)
        weighted = weighted * shrink + tl.sum(split_weighted * grow[:, None], axis=0)
        peak = new_peak
    tl.store(out + head * WIDTH + column, weighted / mass, mask=inside)
