"""flash-attn (Dao, 2023): the implementation of attention on CUDA where the library is installed.

It is an external library and not a kernel of fastppo, so `fastppo.models.attention` calls it through this module and
not through `ops`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastppo.errors import FastPPOError, log_once

log = logging.getLogger("fastppo")

INSTALL = "pip install flash-attn --no-build-isolation"
DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # the largest head width that its kernels support
OLDEST_GPU = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class FlashAttention:
    """The two functions of flash-attn that are used, called with the layouts of fastppo without copying a tensor.

    flash-attn accepts any strides if the last dimension is contiguous, so the dimension of heads may come before the
    dimension of positions, as it does in the models and in the cache.
    """

    varlen: Callable[..., Tensor]  # flash_attn_varlen_func
    with_kvcache: Callable[..., Tensor]  # flash_attn_with_kvcache
    required: bool = False  # the user asked for flash-attn: attention that it cannot compute is then an error

    def supports(self, module: object, query: Tensor) -> bool:
        """Whether flash-attn computes this module's attention. If not, raise FastPPOError where it is required, and
        else log a line.

        query (batch, heads, length, width)
        """
        width, dtype = query.shape[-1], str(query.dtype).removeprefix("torch.")
        if self.has_kernel(width, query.dtype):
            return True
        reason = (
            f"{type(module).__name__} has heads of width {width} in {dtype}, and flash-attn supports widths up to"
            f" {WIDEST} in bf16 or fp16"
        )
        if self.required:
            raise FastPPOError(f"attention is flash, but {reason}. Set attention to auto or sdpa.")
        log_once(f"attention of {type(module).__name__}: PyTorch's SDPA, because {reason}")
        return False

    @staticmethod
    def has_kernel(width: int, dtype: torch.dtype) -> bool:
        """Whether flash-attn has a kernel for heads of this width in this dtype."""
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
        """Causal attention within each sequence of a packed row, with gradients.

        query (1, heads, N, width); key and value have fewer heads with grouped-query attention; cu_seqlens (B+1,) int32
        on the device; longest: number of tokens of the longest sequence; window: number of newest positions attended
        to, 0 for all; softcap: 0 for none. Returns (1, N, heads, width).
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
        lengths: Tensor,
        rows: Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Append one position to each of R rows of the cache, and attend to all positions of that row.

        query (R, heads, 1, width); key, value (R, kv heads, 1, width); key_cache, value_cache (rows, kv heads, length,
        width), written in place; lengths (R,) int32, the number of positions in each of these rows; rows (R,) int32,
        their indices in the cache. Returns (R, 1, heads, width), without gradient.
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
    """flash-attn for a run in this dtype on this device, or None for PyTorch's SDPA; logs the choice and the reason.

    Raises FastPPOError if the setting is `flash` and flash-attn cannot be used.
    """
    obstacle = "attention is sdpa" if setting == "sdpa" else _obstacle(dtype, device)
    if setting == "flash" and obstacle is not None:
        needs = "" if INSTALL in obstacle else f" It needs a GPU from Ampere on, bf16 and `{INSTALL}`."
        raise FastPPOError(
            f"attention is flash, but {obstacle}.{needs} Set attention to auto or sdpa to run without it."
        )
    if obstacle is not None:
        log.info("attention on %s: PyTorch's SDPA, because %s", device, obstacle)
        return None
    library = importlib.import_module("flash_attn")
    log.info("attention on %s: flash-attn %s", device, library.__version__)
    return FlashAttention(library.flash_attn_varlen_func, library.flash_attn_with_kvcache, required=setting == "flash")


def _obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why flash-attn cannot be used; None if it can."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA and this run uses {device.type}"
    if dtype not in DTYPES:
        return "flash-attn computes in bf16 or fp16 and optim.dtype is fp32"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"flash-attn needs compute capability 8.0 (Ampere) and this GPU has {capability[0]}.{capability[1]}"
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


def _window(window: int) -> tuple[int, int]:
    """The window as flash-attn takes it, (positions to the left, to the right), -1 for all.

    A token attends to itself and to the `window` - 1 positions before it.
    """
    return (window - 1, 0) if window else (-1, -1)
