"""The two overloads of an op with coefficients: `default` takes numbers, `tensors` takes tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Arguments that are floats, or the seed of sampling, and may change at each call. Other numbers are constants of a
# model.
_LOSS = ("temperature", "clip_low", "clip_high", "dual_clip", "clip", "entropy_coef", "kl_coef")
COEFFICIENTS = (*_LOSS, "gamma", "lam", "seed")


def overload(op: str, coefficient: float | Tensor | None) -> Any:
    """The overload for coefficients of this type. Without it, torch would read a tensor without dimensions as a
    number."""
    packet = getattr(torch.ops.fastppo, op)
    return packet.tensors if isinstance(coefficient, Tensor) else packet.default
