"""RMSNorm, with the sum of a residual before it."""

from __future__ import annotations

from torch import Tensor

from fastppo.ops.layers import eager


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    *,
    round_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x or of x + residual, (..., H) each; with a residual it returns the sum, too."""
    return eager.rms_norm(x, weight, eps, residual, offset, round_first=round_first)
