"""flash-attn's two functions as this project calls them, on the CPU: the same signatures, arguments checked as the
library does (or as its kernels silently rely on), and the results by PyTorch, one sequence at a time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.models.backends.flash import FlashAttention

HALF = (torch.float16, torch.bfloat16)


class FlashStandIn:
    """Counts its calls. dtypes: those that it takes; the library's, if not for a comparison without rounding."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
        self.dtypes = dtypes
        self.packed_calls, self.cached_calls = 0, 0
        self.cu_seqlens: list[Tensor] = []  # of each call; one and the same tensor within a forward pass

    def backend(self, *, required: bool = False) -> FlashAttention:
        return FlashAttention(self.flash_attn_varlen_func, self.flash_attn_with_kvcache, required=required)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert q.dim() == k.dim() == v.dim() == 3
        assert q.dtype == k.dtype == v.dtype and q.dtype in self.dtypes
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]
        assert q.shape[1] % k.shape[1] == 0 and q.shape[2] <= 256
        for starts, total, longest in ((cu_seqlens_q, len(q), max_seqlen_q), (cu_seqlens_k, len(k), max_seqlen_k)):
            assert starts.dtype == torch.int32 and starts.dim() == 1 and starts.is_contiguous()
            assert starts.device == q.device
            assert int(starts[0]) == 0 and int(starts[-1]) == total and bool((starts.diff() > 0).all())
            assert type(longest) is int and longest == int(starts.diff().max())
        assert dropout_p == 0.0 and causal and alibi_slopes is None and block_table is None and not return_attn_probs
        self.packed_calls += 1
        self.cu_seqlens.append(cu_seqlens_q)
        bounds = cu_seqlens_q.tolist()
        return torch.cat(
            [attend_one(q[a:b], k[a:b], v[a:b], softmax_scale, window_size, softcap) for a, b in pairwise(bounds)]
        )

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        cache_seqlens: Tensor | int | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        block_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        alibi_slopes: Tensor | None = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Tensor:
        assert k is not None and v is not None and isinstance(cache_seqlens, Tensor) and cache_batch_idx is not None
        rows, positions, heads, width = q.shape
        assert positions == 1 and k.shape == v.shape == (rows, 1, k_cache.shape[2], width)
        assert k_cache.shape == v_cache.shape and k_cache.shape[3] == width and heads % k_cache.shape[2] == 0
        assert len({x.dtype for x in (q, k, v, k_cache, v_cache)}) == 1 and q.dtype in self.dtypes
        assert all(x.stride(-1) == 1 for x in (q, k, v, k_cache, v_cache))
        for numbers in (cache_seqlens, cache_batch_idx):
            assert numbers.dtype == torch.int32 and numbers.shape == (rows,) and numbers.is_contiguous()
        assert int(cache_seqlens.max()) < k_cache.shape[1] and int(cache_batch_idx.max()) < len(k_cache)
        assert len(set(cache_batch_idx.tolist())) == rows
        assert rotary_cos is rotary_sin is cache_leftpad is block_table is alibi_slopes is None and causal
        assert num_splits == 1  # a split that depends on the batch would let a row depend on the others
        assert not torch.is_grad_enabled() or not q.requires_grad
        self.cached_calls += 1
        out = torch.empty_like(q)
        for i, (row, held) in enumerate(zip(cache_batch_idx.tolist(), cache_seqlens.tolist(), strict=True)):
            k_cache[row, held], v_cache[row, held] = k[i, 0], v[i, 0]
            keys, values = k_cache[row, : held + 1], v_cache[row, : held + 1]
            out[i] = attend_one(q[i], keys, values, softmax_scale, window_size, softcap)
        return out


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window_size: tuple[int, int], softcap: float
) -> Tensor:
    """One sequence, (length, heads, width); the last query stands at the last key. window_size: as in flash-attn."""
    queries, keys = len(q), len(k)
    at = torch.arange(queries)[:, None] + keys - queries
    others = torch.arange(keys)
    left, right = window_size
    seen = others <= at
    if left >= 0:
        seen &= others >= at - left
    if right >= 0:
        seen &= others <= at + right
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if not softcap:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    scores = q.float() @ k.float().transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * (scores / softcap).tanh()).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype).transpose(0, 1)
