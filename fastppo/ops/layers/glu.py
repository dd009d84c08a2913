"""Gated activations of feed-forward layers: SwiGLU and GeGLU."""

from __future__ import annotations

from torch import Tensor

from fastppo.ops.layers import eager


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up; gate, up: (..., I)."""
    return eager.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) up; gate, up: (..., I); approximate: `tanh` or `none`."""
    return eager.geglu(gate, up, approximate=approximate)
