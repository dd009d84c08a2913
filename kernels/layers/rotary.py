"""Rotary position embeddings of queries and keys, or their transposed map, in one launch."""

from __future__ import annotations

import logging
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.errors import log_once

THREADS = 128  # of a program; with fewer heads, fewer


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """`fastppo.ops.layers.eager.rotary`: x cos + turned(x) sin.

    q: (B, heads, N, D), k: (B, kv heads, N, D), fp32, bf16 or fp16, cos, sin: (B or 1, N, R), any of these dtypes; any
    strides. Traffic: one read and one write of q and k, one read of cos and sin.
    """
    q_out, k_out = empty_in_order_of(q), empty_in_order_of(k)
    q, k, cos, sin = (x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in (q, k, cos, sin))
    rows, q_heads, positions, size = q.shape
    turned, k_heads = cos.shape[-1], k.shape[1]
    if not rows * positions * size:
        return q_out, k_out
    run = turned if interleaved else turned // 2
    width = gcd(16 // q.element_size(), run, size - turned)  # a power of 2
    factors = [x.expand(rows, -1, -1) for x in (cos, sin)]
    strides = [x.stride(i) for x in (q, k, q_out, k_out) for i in (0, 1, 2)]
    strides += [x.stride(i) for x in factors for i in (0, 1)]
    unit = width if aligned((q, k, q_out, k_out, cos, sin), strides, width) else 1
    groups = triton.next_power_of_2(max(1, run // width))
    heads = min(max(1, THREADS // groups), triton.next_power_of_2(max(1, q_heads, k_heads)))
    with torch.cuda.device_of(q):
        rotary_kernel[(rows * positions,)](
            q,
            k,
            q_out,
            k_out,
            *factors,
            positions,
            *(stride // unit for stride in strides),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            SIZE=size,
            TURNED=turned,
            INTERLEAVED=interleaved,
            TRANSPOSED=transposed,
            UNIT=unit,
            WIDTH=width,
            HEADS=heads,
            GROUPS=groups,
            num_warps=min(4, max(1, heads * groups // 32)),
        )
    return q_out, k_out


def empty_in_order_of(x: Tensor) -> Tensor:
    """Dense, with the heads of a position side by side if they are closer than its positions in x."""
    if x.stride(1) > x.stride(2):
        return x.new_empty(x.shape)
    b, heads, n, d = x.shape
    return x.new_empty(b, n, heads, d).transpose(1, 2)


def aligned(tensors: tuple[Tensor, ...], strides: list[int], width: int) -> bool:
    """Whether every run of `width` numbers starts at a multiple of its bytes."""
    if all(s % width == 0 for s in strides) and all(x.data_ptr() % (width * x.element_size()) == 0 for x in tensors):
        return True
    log_once(
        f"heads for rotary do not all start at multiples of {width} numbers: they are read and written one at a time",
        logging.WARNING,
    )
    return False


@triton.jit
def turn(a, b, cos_a, cos_b, sin_a, sin_b, TRANSPOSED: tl.constexpr):
    """Pairs (a, b), turned or, with their matrix transposed, turned back."""
    if TRANSPOSED:
        return a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def pairs(x):
    """The numbers of a tile (A, B, WIDTH) at even and at odd places."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turn_heads(
    x,
    out,
    head_stride,
    out_head_stride,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The heads of one position."""
    RUN: tl.constexpr = TURNED if INTERLEAVED else TURNED // 2
    columns = tl.arange(0, GROUPS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    for start in range(0, COUNT, HEADS):
        head = start + tl.arange(0, HEADS)[:, None, None]
        inside = (head < COUNT) & (columns < RUN)
        at = head.to(tl.int64) * head_stride * UNIT + columns
        out_at = head.to(tl.int64) * out_head_stride * UNIT + columns
        if INTERLEAVED:
            a, b = pairs(load(x, at, inside))
            a, b = turn(a, b, cos_a, cos_b, sin_a, sin_b, TRANSPOSED)
            turned = tl.reshape(tl.join(a, b), (HEADS, GROUPS, WIDTH))
            tl.store(out + out_at, turned.to(out.dtype.element_ty), mask=inside)
        else:
            a, b = load(x, at, inside), load(x, at + RUN, inside)
            a, b = turn(a, b, cos_a, cos_b, sin_a, sin_b, TRANSPOSED)
            tl.store(out + out_at, a.to(out.dtype.element_ty), mask=inside)
            tl.store(out + out_at + RUN, b.to(out.dtype.element_ty), mask=inside)
        for rest in range(TURNED, SIZE, GROUPS * WIDTH):
            inside = (head < COUNT) & (rest + columns < SIZE)
            tl.store(out + out_at + rest, tl.load(x + at + rest, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=[
        "positions",
        "q_row",
        "q_head",
        "q_position",
        "k_row",
        "k_head",
        "k_position",
        "q_out_row",
        "q_out_head",
        "q_out_position",
        "k_out_row",
        "k_out_head",
        "k_out_position",
        "cos_row",
        "cos_position",
        "sin_row",
        "sin_position",
    ]
)
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    positions,
    q_row,
    q_head,
    q_position,
    k_row,
    k_head,
    k_position,
    q_out_row,
    q_out_head,
    q_out_position,
    k_out_row,
    k_out_head,
    k_out_position,
    cos_row,
    cos_position,
    sin_row,
    sin_position,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # offsets exceed 2^31
    row = token // positions
    position = token - row * positions
    cos += (row * cos_row + position * cos_position) * UNIT
    sin += (row * sin_row + position * sin_position) * UNIT
    RUN: tl.constexpr = TURNED if INTERLEAVED else TURNED // 2
    columns = tl.arange(0, GROUPS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    inside = columns < RUN
    cos_a, sin_a = load(cos, columns, inside), load(sin, columns, inside)
    if INTERLEAVED:
        cos_a, cos_b = pairs(cos_a)
        sin_a, sin_b = pairs(sin_a)
    else:
        cos_b, sin_b = load(cos, columns + RUN, inside), load(sin, columns + RUN, inside)
    turn_heads(
        q + (row * q_row + position * q_position) * UNIT,
        q_out + (row * q_out_row + position * q_out_position) * UNIT,
        q_head,
        q_out_head,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        Q_HEADS,
        SIZE,
        TURNED,
        INTERLEAVED,
        TRANSPOSED,
        UNIT,
        WIDTH,
        HEADS,
        GROUPS,
    )
    turn_heads(
        k + (row * k_row + position * k_position) * UNIT,
        k_out + (row * k_out_row + position * k_out_position) * UNIT,
        k_head,
        k_out_head,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        K_HEADS,
        SIZE,
        TURNED,
        INTERLEAVED,
        TRANSPOSED,
        UNIT,
        WIDTH,
        HEADS,
        GROUPS,
    )
