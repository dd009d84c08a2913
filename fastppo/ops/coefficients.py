"""Coefficients of an op for its kernels: all as numbers, or all as tensors without dimensions, in an overload each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops.arguments import Coefficient

# Arguments that are floats, or the seed of sampling, and may change at each call. Other numbers are constants of a
# model.
_LOSS = ("temperature", "clip_low", "clip_high", "dual_clip", "clip", "entropy_coef", "kl_coef")
COEFFICIENTS = (*_LOSS, "gamma", "lam", "seed")


def numbers(like: Tensor, *, device: torch.device | None = None, **coefficients: Coefficient | None) -> dict[str, Any]:
    """The coefficients of a call whose other tensors have the dtype and device of `like`.

    device: of new tensors, by default that of `like`. Numbers stay numbers, unless one coefficient is a tensor or
    torch.compile traces: a number would be a constant of its graph, and another number would compile again.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not any(isinstance(x, Tensor) for x in coefficients.values()):
        return coefficients
    device = device or like.device
    return {name: None if x is None else _tensor(x, like, device, compiling) for name, x in coefficients.items()}


def _tensor(value: Coefficient, like: Tensor, device: torch.device, compiling: bool) -> Tensor:
    """(), fp32 or fp64"""
    if isinstance(value, Tensor):
        value = value if value.dtype == torch.float64 else value.float()
        return value.to(device) if like.dtype == torch.float64 else value  # kernels read a CPU tensor as a number
    if compiling:  # only with a sum the number does not become a constant of the graph
        return torch.zeros((), dtype=torch.float64, device=device) + value
    return torch.full((), value, dtype=torch.float64, device=device)


def overload(op: str, coefficient: float | Tensor | None) -> Any:
    """The overload of an op for coefficients of this type: `default` takes numbers, `tensors` takes tensors. Without
    it, torch would read a tensor without dimensions as a number."""
    packet = getattr(torch.ops.fastppo, op)
    return packet.tensors if isinstance(coefficient, Tensor) else packet.default
