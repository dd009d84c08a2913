"""What every attention backend is: packed rows, decode steps, and what it cannot compute."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastppo.errors import FastPPOError, log_once
from fastppo.models.cache import ActiveRows

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # the largest head width that FlashAttention-2's kernels support; both backends have them


class AttentionBackend(Protocol):
    """Causal attention by another library. Its calls launch kernels only: the host reads nothing from the device."""

    @property
    def name(self) -> str:
        """The library, as in log lines."""

    @property
    def setting(self) -> str:
        """The value of the setting `attention` that asks for it."""

    @property
    def required(self) -> bool:
        """Whether the user asked for it: attention that it cannot compute is then an error."""

    def lacks(self, width: int, dtype: torch.dtype, softcap: float) -> str | None:
        """What it cannot compute, as in "Attention has ...": heads of this width and dtype, or this cap on scores (0
        for none). None: it has a kernel."""

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Causal attention within each sequence of a packed row, with gradients that sum in a fixed order.

        query (1, heads, N, width); key and value have fewer heads with grouped-query attention; cu_seqlens (B+1,) int32
        on the device; longest: number of tokens of the longest sequence; window: number of newest positions attended
        to, 0 for all; softcap: 0 for none. Returns (1, N, heads, width).
        """

    def cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        active: ActiveRows,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Append one position to each of R rows of the cache, and attend to all positions of that row.

        query (R, heads, 1, width); key, value (R, kv heads, 1, width); key_cache, value_cache (rows, kv heads, length,
        width), contiguous, written in place; active: the rows. A row's result does not depend on the other rows.
        Returns (R, 1, heads, width), without gradient.
        """


def supports(backend: AttentionBackend, module: object, query: Tensor, softcap: float) -> bool:
    """Whether the backend computes this module's attention. If not, raise FastPPOError where it is required, and else
    log a line.

    query (batch, heads, length, width)
    """
    lacking = backend.lacks(query.shape[-1], query.dtype, softcap)
    if lacking is None:
        return True
    reason = f"{type(module).__name__} has {lacking}"
    if backend.required:
        raise FastPPOError(f"attention is {backend.setting}, but {reason}. Set attention to auto or sdpa.")
    log_once(f"attention of {type(module).__name__}: PyTorch's SDPA, because {reason}")
    return False


def heads(width: int, dtype: torch.dtype) -> str:
    """These heads, for a message."""
    return f"heads of width {width} in {str(dtype).removeprefix('torch.')}"
