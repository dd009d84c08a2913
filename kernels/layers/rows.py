"""Rows of a layer's tensors for its kernels: read through one or two strides, without a copy wherever strides allow."""

from __future__ import annotations

import logging
from functools import cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.errors import log_once

# Of the interpreter, which has none: as many for 256 tokens as an H100 has for 16,384.
MULTIPROCESSORS = 2


class Rows(NamedTuple):
    """A tensor (..., H) as rows of adjacent columns; row m starts (m // inner * outer + m % inner * step) * unit
    elements after the first one."""

    tensor: Tensor | None
    outer: int
    step: int
    unit: int  # elements in 16 bytes if all rows are aligned to 16 bytes, so that the compiler knows it; else 1


def as_rows(**tensors: Tensor | None) -> tuple[int | None, tuple[Rows, ...]]:
    """The rows of tensors of one shape, (..., H), and `inner`, the size of their last dimension but one: None if one
    stride a tensor describes all rows. A tensor that two strides do not describe is copied, which is logged once."""
    shaped = [None if x is None else _in_three_dimensions(name, x) for name, x in tensors.items()]
    inner = None
    for x in shaped:
        if x is not None and x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
            inner = x.shape[1]
    return inner, tuple(Rows(None, 0, 0, 1) if x is None else _strides(x) for x in shaped)


def _in_three_dimensions(name: str, x: Tensor) -> Tensor:
    """(outer, inner, H) with adjacent columns: a view of `x`, or a copy."""
    outer, inner = prod(x.shape[:-2]), x.shape[-2] if x.ndim > 1 else 1
    rows = x.reshape(outer, inner, x.shape[-1])
    if rows.shape[2] > 1 and rows.stride(2) != 1:
        rows = rows.contiguous()
    if rows.data_ptr() != x.data_ptr():
        log_once(
            f"rows of {name}, strides {x.stride()}, are copied first: a kernel needs adjacent columns and at most"
            " two strides of rows",
            logging.WARNING,
        )
    return rows


def _strides(x: Tensor) -> Rows:
    width = 16 // x.element_size()
    outer, step = x.stride(0), x.stride(1) if x.shape[1] > 1 else x.stride(0)
    if outer % width == 0 and step % width == 0 and x.data_ptr() % 16 == 0:
        return Rows(x, outer // width, step // width, width)
    return Rows(x, outer, step, 1)


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of a GPU's multiprocessors."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def row_starts(m, inner, outer, step, UNIT: tl.constexpr):
    """Offsets in elements of the rows m, which may exceed 2^31; inner is None if `step` alone describes the rows."""
    if inner is None:
        starts = m.to(tl.int64) * step
    else:
        starts = (m // inner).to(tl.int64) * outer + (m % inner).to(tl.int64) * step
    return starts * UNIT
