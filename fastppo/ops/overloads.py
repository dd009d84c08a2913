"""The two overloads of an op with coefficients: `default`, which takes them as numbers, and `tensors`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What is a float, or sampling's seed, and may change from call to call. Other numbers are constants of a model.
_LOSS = ("temperature", "clip_low", "clip_high", "dual_clip", "clip", "entropy_coef", "kl_coef")
COEFFICIENTS = (*_LOSS, "gamma", "lam", "seed")


def overload(op: str, coefficient: float | Tensor | None) -> Any:
    """The overload for coefficients like this one. Left to itself, torch takes a tensor without dimensions for a number
    and reads it."""
    found = getattr(torch.ops.fastppo, op)
    return found.tensors if isinstance(coefficient, Tensor) else found.default
