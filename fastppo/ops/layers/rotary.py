"""Rotary position embeddings of queries and keys."""

from __future__ import annotations

from torch import Tensor

from fastppo.ops.layers import eager


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (1, heads, N, D) and keys (1, kv heads, N, D) by cos, sin, broadcast over heads."""
    return eager.rotary(q, k, cos, sin)
