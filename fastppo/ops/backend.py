"""Which of its implementations an op runs, and the log line that says so."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from fastppo.ops import registration

log = logging.getLogger("fastppo")


def by_reference(like: Tensor) -> bool:
    """Whether the oracle itself computes: for fp64, which no kernel takes. Says once what the ops run on."""
    if not torch.compiler.is_compiling():
        say_backend(like.device, like.dtype)
    return like.dtype == torch.float64


@cache
def say_backend(device: torch.device, dtype: torch.dtype) -> None:
    found = "reference PyTorch, as no kernel takes fp64" if dtype == torch.float64 else registration.backend(device)
    log.info("ops on %s in %s: %s", device, str(dtype).removeprefix("torch."), found)


def log_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _log(message)


@cache
def _log(message: str) -> None:
    log.info(message)
