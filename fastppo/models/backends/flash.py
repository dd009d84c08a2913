"""flash-attn (Dao, 2023): the first choice on CUDA, where the library is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.models.backends.backend import DTYPES, WIDEST, heads
from fastppo.models.cache import ActiveRows

INSTALL = "pip install flash-attn --no-build-isolation"


@dataclass(frozen=True)
class FlashAttention:
    """The two functions of flash-attn that are used, called with the layouts of fastppo without copying a tensor.

    flash-attn accepts any strides if the last dimension is contiguous, so the dimension of heads may come before the
    dimension of positions, as it does in the models and in the cache.
    """

    varlen: Callable[..., Tensor]  # flash_attn_varlen_func
    with_kvcache: Callable[..., Tensor]  # flash_attn_with_kvcache
    required: bool = False
    name = "flash-attn"
    setting = "flash"

    def lacks(self, width: int, dtype: torch.dtype, softcap: float) -> str | None:
        if width <= WIDEST and dtype in DTYPES:
            return None
        return f"{heads(width, dtype)}, and flash-attn supports widths up to {WIDEST} in bf16 or fp16"

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
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, heads, width)
        out = self.varlen(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap,
            deterministic=True,  # resume is bit for bit; by default the backward pass sums in no fixed order
        )
        return out.unsqueeze(0)

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
        return self.with_kvcache(
            query.transpose(1, 2),
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=active.lengths_int32,
            cache_batch_idx=active.rows_int32,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap,
            num_splits=1,  # by default the keys are split by the number of rows, and a row's rounding depends on them
        )


def obstacle() -> str | None:
    """The reason why flash-attn cannot be loaded; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return f"flash-attn is not installed ({INSTALL})"
    try:
        library = importlib.import_module("flash_attn")
    except ImportError as error:  # built for another version of torch: symbols are missing
        return (
            f"flash-attn cannot be imported ({error}); build it for this torch: {INSTALL} --force-reinstall --no-deps"
        )
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < (2, 6):
        return f"flash-attn is {library.__version__}, and soft caps need 2.6 or newer ({INSTALL} --upgrade)"
    return None


def load(*, required: bool) -> tuple[FlashAttention, str]:
    """flash-attn where `obstacle` finds none, and its version."""
    library = importlib.import_module("flash_attn")
    flash = FlashAttention(library.flash_attn_varlen_func, library.flash_attn_with_kvcache, required=required)
    return flash, library.__version__


def _window(window: int) -> tuple[int, int]:
    """The window as flash-attn takes it, (positions to the left, to the right), -1 for all.

    A token attends to itself and to the `window` - 1 positions before it.
    """
    return (window - 1, 0) if window else (-1, -1)
