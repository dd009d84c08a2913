"""A gradient times a number on the device, which is nearly always 1: then nothing is read or written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.row import DTYPES

BLOCK, WARPS = 4096, 8  # elements of a step of a program: two 16-byte loads a thread in half precision
PROGRAMS = 1024  # enough to fill a card; each takes every so many blocks, so that few are launched in vain


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, rounded once; a factor of 1 costs a launch, and the host does not wait for its value.

    gradient: fp32, bf16 or fp16, contiguous; factor: () fp32 on its device. Traffic: 2 b bytes an element, 0 for 1.
    """
    if gradient.dtype not in DTYPES or not gradient.is_contiguous():
        raise ValueError(
            f"gradient is {gradient.dtype} with strides {gradient.stride()}; expected contiguous fp32, bf16 or fp16"
        )
    if factor.shape != () or factor.dtype != torch.float32 or factor.device != gradient.device:
        raise ValueError(
            f"factor is {factor.dtype} {tuple(factor.shape)} on {factor.device}; expected () fp32 on {gradient.device}"
        )
    blocks = triton.cdiv(gradient.numel(), BLOCK)
    if blocks:
        with torch.cuda.device_of(gradient):
            scale_gradient_kernel[(min(blocks, PROGRAMS),)](
                gradient, factor, gradient.numel(), BLOCK=BLOCK, num_warps=WARPS
            )


@triton.jit
def scale_gradient_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    if scale != 1.0:
        column = tl.arange(0, BLOCK)
        step = tl.num_programs(0).to(tl.int64) * BLOCK  # offsets exceed 2^31
        whole = count // BLOCK * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, step):
            x = tl.load(gradient + start + column).to(tl.float32)
            tl.store(gradient + start + column, (x * scale).to(gradient.dtype.element_ty))
        if tl.program_id(0) == 0:  # no mask in the loop, which would split loads of 16 bytes
            inside = whole + column < count
            x = tl.load(gradient + whole + column, mask=inside).to(tl.float32)
            tl.store(gradient + whole + column, (x * scale).to(gradient.dtype.element_ty), mask=inside)
