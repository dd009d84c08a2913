"""The choice between an op's kernel and its oracle, and the log line about it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastppo.errors import log_once
from fastppo.ops import registration


def by_eager(like: Tensor) -> bool:
    """Whether the oracle (`fastppo.ops.eager`) computes: for fp64, which no kernel supports. Logs the choice once."""
    if not torch.compiler.is_compiling():
        log_backend(like.device, like.dtype)
    return like.dtype == torch.float64


@cache  # what the log says takes 3 us to find out
def log_backend(device: torch.device, dtype: torch.dtype) -> None:
    backend = registration.backend(device)
    if dtype == torch.float64:
        backend = "reference PyTorch, because no kernel supports fp64"
    log_once(f"ops on {device} in {str(dtype).removeprefix('torch.')}: {backend}")


def log_once_unless_compiling(message: str) -> None:
    """Log the message once a process; nothing while torch.compile traces an op, which would break the graph."""
    if not torch.compiler.is_compiling():
        log_once(message)
