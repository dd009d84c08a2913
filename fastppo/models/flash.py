"""flash-attn (Dao, 2023): what computes attention on CUDA where it is installed.

It is a library and no kernel of ours, so `fastppo.models.attention` calls it from here and not through `ops`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fastppo.errors import FastPPOError

log = logging.getLogger("fastppo")

INSTALL = "pip install flash-attn --no-build-isolation"
DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # the widest head that its kernels take
OLDEST_GPU = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class FlashAttention:
    """The two functions of flash-attn that are used, called by our layouts. No tensor is copied on the way.

    It takes a tensor of any strides as long as its last dimension is contiguous, so heads may stand before positions
    as they do in the models and in the cache.
    """

    varlen: Callable[..., Tensor]  # flash_attn_varlen_func
    with_kvcache: Callable[..., Tensor]  # flash_attn_with_kvcache
    required: bool = False  # the user asked for it: what it cannot compute is then an error

    def takes(self, module: object, query: Tensor) -> bool:
        """Whether it computes this module's attention; if not, an error where it is required, else a line in the log.

        query (batch, heads, length, width)
        """
        width, dtype = query.shape[-1], str(query.dtype).removeprefix("torch.")
        if self.can(width, query.dtype):
            return True
        reason = (
            f"{type(module).__name__} has heads of width {width} in {dtype}, and flash-attn takes widths up to"
            f" {WIDEST} in bf16 or fp16"
        )
        if self.required:
            raise FastPPOError(f"attention is flash, but {reason}. Set attention to auto or sdpa.")
        _log_once(f"attention of {type(module).__name__}: PyTorch's SDPA, as {reason}")
        return False

    @staticmethod
    def can(width: int, dtype: torch.dtype) -> bool:
        """Whether it has a kernel for heads of this width."""
        return width <= WIDEST and dtype in DTYPES

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
        """Causal attention of every sequence of a packed row to itself, with gradients.

        query (1, heads, N, width), fewer heads in key and value where the model groups them; cu_seqlens (B+1,) int32 on
        the device; longest: tokens of the longest sequence; window: newest positions seen, 0 for all; softcap: 0 for
        none. Returns (1, N, heads, width).
        """
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, width)
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
            deterministic=True,  # a resumed run must go on bit for bit; by default its backward pass adds in any order
        )
        return out.unsqueeze(0)

    def cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        lengths: Tensor,
        rows: Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Append one position to each of R rows of the cache, and attend to all positions of that row.

        query (R, heads, 1, width); key, value (R, kv heads, 1, width); key_cache, value_cache (rows, kv heads, length,
        width), written in place; lengths (R,) int32, positions that each of these rows holds; rows (R,) int32, their
        places in the cache. Returns (R, 1, heads, width), without gradient.
        """
        return self.with_kvcache(
            query.transpose(1, 2),
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=lengths,
            cache_batch_idx=rows,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap,
        )


def choose_flash(
    setting: Literal["auto", "flash", "sdpa"], dtype: torch.dtype, device: torch.device
) -> FlashAttention | None:
    """flash-attn for a run in this dtype on this device, or None for PyTorch's SDPA. One log line says which, and why.

    Raises FastPPOError where the setting is `flash` and it cannot be used.
    """
    obstacle = "attention is sdpa" if setting == "sdpa" else _obstacle(dtype, device)
    if setting == "flash" and obstacle is not None:
        needs = "" if INSTALL in obstacle else f" It needs a GPU from Ampere on, bf16 and `{INSTALL}`."
        raise FastPPOError(
            f"attention is flash, but {obstacle}.{needs} Set attention to auto or sdpa to do without it."
        )
    if obstacle is not None:
        log.info("attention on %s: PyTorch's SDPA, as %s", device, obstacle)
        return None
    library = importlib.import_module("flash_attn")
    log.info("attention on %s: flash-attn %s", device, library.__version__)
    return FlashAttention(library.flash_attn_varlen_func, library.flash_attn_with_kvcache, required=setting == "flash")


def _obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """What stands in the way of flash-attn; None if nothing does."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA and this run on {device.type}"
    if dtype not in DTYPES:
        return "flash-attn computes in bf16 or fp16 and optim.dtype is fp32"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"flash-attn needs compute capability 8.0 (Ampere) and this GPU has {found[0]}.{found[1]}"
    if importlib.util.find_spec("flash_attn") is None:
        return f"flash-attn is not installed ({INSTALL})"
    try:
        library = importlib.import_module("flash_attn")
    except ImportError as error:  # built for another torch: its symbols are missing
        return (
            f"flash-attn cannot be imported ({error}); build it for this torch: {INSTALL} --force-reinstall --no-deps"
        )
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < (2, 6):
        return f"flash-attn is {library.__version__}, and soft caps came with 2.6 ({INSTALL} --upgrade)"
    return None


def _window(window: int) -> tuple[int, int]:
    """A token sees itself and `window` - 1 before it; flash-attn counts those to the left and right, -1 being all."""
    return (window - 1, 0) if window else (-1, -1)


@cache
def _log_once(message: str) -> None:
    log.info(message)
