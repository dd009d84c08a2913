"""An activation of the gate times the up projection, and its gradients, each in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.layers.rows import Rows, as_rows, row_starts

GROUPS = 256  # of adjacent numbers, in a program: two for each of its threads
NUM_WARPS = 4

ROOT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


class Inputs(NamedTuple):
    """Rows of gate and up, (..., I), and of further tensors of that shape."""

    inner: int | None
    rows: tuple[Rows, ...]
    shape: torch.Size
    unit: int  # numbers that a thread reads together: those of 16 bytes, or 1 where rows are not aligned


def inputs_of(gate: Tensor, up: Tensor | None, **others: Tensor) -> Inputs:
    if up is None:
        gate, up = gate.chunk(2, -1)
    inner, rows = as_rows(gate=gate, up=up, **others)
    width = 16 // gate.element_size()
    whole = gate.shape[-1] % width == 0 and all(x.unit == width for x in rows)
    return Inputs(inner, rows, gate.shape, width if whole else 1)


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """`fastppo.ops.layers.eager.swiglu`.

    gate, up: (..., I) fp32, bf16 or fp16; without up, gate is (..., 2 I), gate and up side by side. Traffic: 3 numbers
    each.
    """
    return glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
    """`fastppo.ops.layers.eager.geglu`, of tensors as for `swiglu`."""
    return glu(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    inputs = inputs_of(gate, up)
    out = torch.empty(inputs.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        launch(glu_kernel, inputs, (out,), activation)
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """d_gate and d_up as one tensor, (2, ..., I), or as the halves of (..., 2 I). Traffic: 5 numbers each.

    activation: `silu`, `gelu` or `gelu_tanh`.
    """
    inputs = inputs_of(gate, up, grad=grad)
    out = torch.empty(gate.shape if up is None else (2, *gate.shape), dtype=gate.dtype, device=gate.device)
    if out.numel():
        d_gate, d_up = out.chunk(2, -1) if up is None else out.unbind()
        launch(glu_backward_kernel, inputs, (d_gate, d_up), activation)
    return out


def launch(kernel: triton.JITFunction, inputs: Inputs, outputs: tuple[Tensor, ...], activation: str) -> None:
    width, unit = inputs.shape[-1], inputs.unit
    groups = outputs[0].numel() // unit
    dense = inputs.inner is None and all(x.step * x.unit == width for x in inputs.rows)
    out_step = outputs[0].stride(-2) if outputs[0].ndim > 1 else width
    strides = [x for rows in inputs.rows for x in (rows.outer * rows.unit // unit, rows.step * rows.unit // unit)]
    with torch.cuda.device_of(outputs[0]):
        kernel[(triton.cdiv(groups, GROUPS),)](
            *(rows.tensor for rows in inputs.rows),
            *outputs,
            inputs.inner,
            *strides,
            out_step // unit,
            width // unit,
            groups,
            ACTIVATION=activation,
            DENSE=dense and out_step == width,
            UNIT=unit,
            GROUPS=GROUPS,
            num_warps=NUM_WARPS,
        )


@triton.jit
def sigmoid_gate(g, ACTIVATION: tl.constexpr):
    """sigmoid(z), and dz / dg, of y = g sigmoid(z): z = g for SiLU, sqrt(8 / pi) (g + 0.044715 g^3) for GELU's tanh."""
    z, slope = g, 1.0
    if ACTIVATION == "gelu_tanh":
        square = g * g
        z = ROOT_8_OVER_PI * g * (1.0 + CUBIC * square)
        slope = ROOT_8_OVER_PI * (1.0 + 3.0 * CUBIC * square)
    return 1.0 / (1.0 + tl.exp(-z)), slope


@triton.jit
def activation(g, ACTIVATION: tl.constexpr):
    """The activation of g, fp32, and its derivative."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(g * ROOT_HALF))
        y = g * below
        slope = below + g * DENSITY_AT_0 * tl.exp(-0.5 * g * g)
    else:
        s, z_slope = sigmoid_gate(g, ACTIVATION)
        y = g * s
        slope = s + y * (1.0 - s) * z_slope
    return y, slope


@triton.jit
def places(start, inner, outer, step, width, DENSE: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr):
    """Offsets in elements, (GROUPS, UNIT), of the groups from `start` on: a thread has whole groups."""
    group = start + tl.arange(0, GROUPS)
    if DENSE:
        begins = group * UNIT
    else:
        row = group // width
        begins = row_starts(row, inner, outer, step, UNIT) + (group - row * width) * UNIT
    return begins[:, None] + tl.arange(0, UNIT)[None, :]


@triton.jit(do_not_specialize=["gate_outer", "gate_step", "up_outer", "up_step", "out_step", "width", "groups"])
def glu_kernel(
    gate,
    up,
    out,
    inner,
    gate_outer,
    gate_step,
    up_outer,
    up_step,
    out_step,
    width,
    groups,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * GROUPS
    inside = (start + tl.arange(0, GROUPS) < groups)[:, None]
    g_at = places(start, inner, gate_outer, gate_step, width, DENSE, UNIT, GROUPS)
    u_at = places(start, inner, up_outer, up_step, width, DENSE, UNIT, GROUPS)
    g = tl.load(gate + g_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + u_at, mask=inside, other=0.0).to(tl.float32)
    y, _ = activation(g, ACTIVATION)
    at = places(start, None, 0, out_step, width, DENSE, UNIT, GROUPS)
    tl.store(out + at, (y * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "gate_outer",
        "gate_step",
        "up_outer",
        "up_step",
        "grad_outer",
        "grad_step",
        "out_step",
        "width",
        "groups",
    ]
)
def glu_backward_kernel(
    gate,
    up,
    grad,
    d_gate,
    d_up,
    inner,
    gate_outer,
    gate_step,
    up_outer,
    up_step,
    grad_outer,
    grad_step,
    out_step,
    width,
    groups,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * GROUPS
    inside = (start + tl.arange(0, GROUPS) < groups)[:, None]
    g_at = places(start, inner, gate_outer, gate_step, width, DENSE, UNIT, GROUPS)
    u_at = places(start, inner, up_outer, up_step, width, DENSE, UNIT, GROUPS)
    d_at = places(start, inner, grad_outer, grad_step, width, DENSE, UNIT, GROUPS)
    g = tl.load(gate + g_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + u_at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + d_at, mask=inside, other=0.0).to(tl.float32)
    y, slope = activation(g, ACTIVATION)
    at = places(start, None, 0, out_step, width, DENSE, UNIT, GROUPS)
    tl.store(d_up + at, (d * y).to(d_up.dtype.element_ty), mask=inside)
    tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
