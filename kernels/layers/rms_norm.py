"""RMSNorm with the sum of a residual before it, and its gradient: each row is read once and stays in registers.

A program has the weight in registers and takes one tile of rows after the other: a row, or several if rows are small.
With d_weight rows of more than 8,192 columns need some more registers than there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.layers.rows import as_rows, multiprocessors, row_starts

WIDEST = 16_384  # columns of a row that fits in registers
ROW_AHEAD = 16_384  # bytes of a row beside which there is room in registers for the next one
TILE = 2048  # numbers of a tile of several rows
WARPS = 24  # of a multiprocessor, in the forward pass: 48 KB on their way with a residual


class Tiling(NamedTuple):
    """The tiles of a kernel. They depend on the width of rows alone, so that a row's sums do not depend on others."""

    rows: int
    block: int  # columns, a power of 2
    num_warps: int


def tiling(width: int, tile: int) -> Tiling:
    """Tiles of `tile` numbers, or of one row that has more; 16 numbers a thread, if there are as many."""
    block = triton.next_power_of_2(width)
    rows = max(1, tile // block)
    return Tiling(rows, block, min(32, max(1, rows * block // 512)))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """`fastppo.ops.layers.eager.rms_norm` of s = x + residual (Zhang and Sennrich, 2019, eq. 4), and s.

    x, residual: (..., H) fp32, bf16 or fp16 of one dtype; weight: (H,) fp32, bf16 or fp16. Returns y and s, dense, in
    the dtype of x; s is empty without a residual. Traffic for N rows: 4 N H b bytes, b bytes a number, or 2 N H b
    without a residual, and the weight once for each program.
    """
    _check(x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rows, width = y.numel() // y.shape[-1], y.shape[-1]
    if rows == 0:
        return y, total
    tiles = tiling(width, TILE)
    programs = min(triton.cdiv(rows, tiles.rows), multiprocessors(x.device) * max(1, WARPS // tiles.num_warps))
    inner, (of_x, of_residual) = as_rows(x=x, residual=residual)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(programs,)](
            of_x.tensor,
            of_residual.tensor,
            weight.contiguous(),
            y,
            total,
            rows,
            inner,
            of_x.outer,
            of_x.step,
            of_residual.outer,
            of_residual.step,
            eps,
            offset,
            X_UNIT=of_x.unit,
            RESIDUAL_UNIT=of_residual.unit,
            H=width,
            ROUND_FIRST=round_first,
            ROWS=tiles.rows,
            BLOCK=tiles.block,
            num_warps=tiles.num_warps,
        )
    return y, total


def rms_norm_backward(
    d_y: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of `rms_norm` by s, which is that of x and of the residual, and by the weight.

    d_y, d_total: gradients by y and s, (..., H) in the dtype of x, d_total may be None; x: (..., H), the s of the
    forward pass. Returns d_x, dense, and d_weight, in the dtype of the weight, or empty if it is not wanted: fp32 sums
    over rows in an order that depends on the number of rows and of multiprocessors alone. Traffic for N rows: 4 N H b
    bytes, or 3 N H b without d_total; for each program the weight and, if d_weight is wanted, 8 H bytes.
    """
    _check(x, weight)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight = torch.empty(weight.shape if weight_wanted else (0,), dtype=weight.dtype, device=x.device)
    rows, width = d_x.numel() // d_x.shape[-1], d_x.shape[-1]
    if rows == 0:
        return d_x, d_weight.zero_()
    tiles = tiling(width, 2 * TILE)
    # Sums of d_weight cost 8 H bytes a program, so there is one on each multiprocessor.
    programs = min(triton.cdiv(rows, tiles.rows), multiprocessors(x.device))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device) if weight_wanted else None
    inner, (of_d_y, of_d_total, of_x) = as_rows(d_y=d_y, d_total=d_total, x=x)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            of_d_y.tensor,
            of_d_total.tensor,
            of_x.tensor,
            weight.contiguous(),
            d_x,
            sums,
            rows,
            inner,
            of_d_y.outer,
            of_d_y.step,
            of_d_total.outer,
            of_d_total.step,
            of_x.outer,
            of_x.step,
            eps,
            offset,
            D_Y_UNIT=of_d_y.unit,
            D_TOTAL_UNIT=of_d_total.unit,
            X_UNIT=of_x.unit,
            H=width,
            AHEAD=tiles.block * x.element_size() <= ROW_AHEAD,
            ROWS=tiles.rows,
            BLOCK=tiles.block,
            num_warps=tiles.num_warps,
        )
        if sums is not None:
            add_sums_kernel[(triton.cdiv(width, 64),)](sums, d_weight, programs, width, ROWS=32, BLOCK=64, num_warps=4)
    return d_x, d_weight


def _check(x: Tensor, weight: Tensor) -> None:
    if not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"x has shape {tuple(x.shape)}; these kernels support 1 to {WIDEST:,} columns")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {tuple(x.shape[-1:])}")


@triton.jit
def load_rows(x, starts, inside, columns, H: tl.constexpr):
    """Rows (ROWS, BLOCK) in their dtype, 0 outside."""
    return tl.load(x + starts[:, None] + columns[None, :], mask=inside[:, None] & (columns < H)[None, :], other=0.0)


@triton.jit
def store_rows(to, values, m, inside, columns, H: tl.constexpr):
    """Write rows (ROWS, BLOCK) to the dense tensor `to`."""
    mask = inside[:, None] & (columns < H)[None, :]
    tl.store(to + m.to(tl.int64)[:, None] * H + columns[None, :], values, mask=mask)


@triton.jit
def load_scale(weight, offset, columns, H: tl.constexpr):
    """offset + weight, (1, BLOCK) fp32."""
    return (offset + tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32))[None, :]


@triton.jit(do_not_specialize=["M", "inner"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    M,
    inner,
    x_outer,
    x_step,
    residual_outer,
    residual_step,
    eps,
    offset,
    X_UNIT: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr,
    H: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    scale = load_scale(weight, offset, columns, H)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        m = first + tl.arange(0, ROWS)
        inside = (m < M) if ROWS > 1 else (m >= 0)  # a tile of one row needs no mask
        s = load_rows(x, row_starts(m, inner, x_outer, x_step, X_UNIT), inside, columns, H).to(tl.float32)
        if residual is not None:
            starts = row_starts(m, inner, residual_outer, residual_step, RESIDUAL_UNIT)
            stored = (s + load_rows(residual, starts, inside, columns, H).to(tl.float32)).to(total.dtype.element_ty)
            store_rows(total, stored, m, inside, columns, H)
            s = stored.to(tl.float32)
        rate = tl.rsqrt(tl.sum(s * s, axis=1) / H + eps)
        quotient = s * rate[:, None]
        if ROUND_FIRST:
            quotient = quotient.to(y.dtype.element_ty).to(tl.float32)
        store_rows(y, (quotient * scale).to(y.dtype.element_ty), m, inside, columns, H)


@triton.jit(do_not_specialize=["M", "inner"])
def rms_norm_backward_kernel(
    d_y,
    d_total,
    x,
    weight,
    d_x,
    sums,
    M,
    inner,
    d_y_outer,
    d_y_step,
    d_total_outer,
    d_total_step,
    x_outer,
    x_step,
    eps,
    offset,
    D_Y_UNIT: tl.constexpr,
    D_TOTAL_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    H: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    scale = load_scale(weight, offset, columns, H)
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    if AHEAD:
        m = first + tl.arange(0, ROWS)
        next_x = load_rows(x, row_starts(m, inner, x_outer, x_step, X_UNIT), m < M, columns, H)
        next_d_y = load_rows(d_y, row_starts(m, inner, d_y_outer, d_y_step, D_Y_UNIT), m < M, columns, H)
    for start in range(first, M, step):
        m = start + tl.arange(0, ROWS)
        if not AHEAD:
            next_x = load_rows(x, row_starts(m, inner, x_outer, x_step, X_UNIT), m < M, columns, H)
            next_d_y = load_rows(d_y, row_starts(m, inner, d_y_outer, d_y_step, D_Y_UNIT), m < M, columns, H)
            scale = load_scale(weight, offset, columns, H)
        s, up = next_x.to(tl.float32), next_d_y.to(tl.float32)
        d = tl.zeros((ROWS, BLOCK), tl.float32)
        if d_total is not None:
            starts = row_starts(m, inner, d_total_outer, d_total_step, D_TOTAL_UNIT)
            d = load_rows(d_total, starts, m < M, columns, H).to(tl.float32)
        if AHEAD:  # the next rows are on their way while these are computed
            ahead = m + step
            next_x = load_rows(x, row_starts(ahead, inner, x_outer, x_step, X_UNIT), ahead < M, columns, H)
            next_d_y = load_rows(d_y, row_starts(ahead, inner, d_y_outer, d_y_step, D_Y_UNIT), ahead < M, columns, H)

        # d_x = rate (d_y scale - q mean(d_y scale q)) with q = s rate
        rate = tl.rsqrt(tl.sum(s * s, axis=1) / H + eps)
        g = up * scale
        back = rate * rate * rate * tl.sum(g * s, axis=1) / H
        d += g * rate[:, None] - s * back[:, None]
        store_rows(d_x, d.to(d_x.dtype.element_ty), m, m < M, columns, H)
        if sums is not None:
            of_weight += up * (s * rate[:, None])
    if sums is not None:
        row = sums + tl.program_id(0).to(tl.int64) * H
        tl.store(row + columns, tl.sum(of_weight, axis=0), mask=columns < H)


@triton.jit(do_not_specialize=["count"])
def add_sums_kernel(sums, to, count, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """to[i] = the sum of sums[:, i], (count, H) fp32, in fixed order."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, count, ROWS):
        mask = (first + rows < count)[:, None] & (columns < H)[None, :]
        total += tl.load(sums + (first + rows)[:, None] * H + columns[None, :], mask=mask, other=0.0)
    tl.store(to + columns, tl.sum(total, axis=0).to(to.dtype.element_ty), mask=columns < H)
