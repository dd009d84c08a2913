"""fp32 products of linear modules by oneDNN on CPUs where those of torch take twice as long.

torch computes fp32 products with MKL, which uses AVX-512 on Intel's processors only. oneDNN is a part of torch, too,
which computes bf16 products with it, and uses AVX-512 wherever there is any. With it an output row does not depend on
the number of rows, unless that is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastppo.models.layers.classes import own_class, replace_functions

# Entries of a weight, below which a call of oneDNN takes longer than the product. It is no limit on rows: those of a
# weight are computed in the same way, however many they are.
SMALLEST = 1 << 16
CPUINFO = Path("/proc/cpuinfo")


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products of this CPU are faster by oneDNN than by MKL: with AVX-512, but not from Intel."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    vendor = next((line for line in lines if line.startswith("vendor_id")), "")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and bool(vendor)
        and "GenuineIntel" not in vendor
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def choose_products(module: nn.Linear) -> bool:
    """Let a plain linear module in fp32 compute its products by oneDNN where that is faster.

    Returns whether it does.
    """
    fp32_on_cpu = module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
    chosen = fp32_on_cpu and own_class(module) is nn.Linear and onednn_is_faster()
    if chosen:
        replace_functions(module, _functions)
    return chosen


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`; x (..., H), weight (V, H), bias (V,), result (..., V)."""
    fp32_on_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    rows = x.dim() > 1 and x.numel() > 0
    if not fp32_on_cpu or not rows or weight.numel() < SMALLEST or not onednn_is_faster():
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)
        d_weight = _over_rows(rows, x_rows) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _over_rows(one: Tensor, other: Tensor) -> Tensor:
    """one^T other of (N, V) and (N, H): (V, H). oneDNN gets a dense copy of its first factor: that of the smaller."""
    if one.shape[1] < other.shape[1]:
        return _product(one.t(), other.t(), None)
    return _product(other.t(), one.t(), None).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., H) weight^T + bias, by oneDNN; weight (V, H) in any memory layout."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


def _functions(own: Any) -> Mapping[str, Callable[..., Any]]:
    def forward(self: Any, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    return {"forward": forward}
