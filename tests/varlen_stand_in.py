"""`torch.nn.attention.varlen.varlen_attn` as this project calls it, on the CPU.

Each call goes to torch's own function first, on meta tensors: its signature, its rules about gradients and heads, and
the layout of its result are real. What its CUDA code checks (`mha_varlen_fwd` of FlashAttention-2 in torch 2.13), or
silently relies on, is checked here, and PyTorch computes the results, one sequence at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_stand_in import HALF, attend_one
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastppo.models.backends.varlen import VarlenAttention


class VarlenStandIn:
    """Counts its calls. dtypes: those that it takes; torch's, if not for a comparison without rounding."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
        self.dtypes = dtypes
        self.packed_calls, self.cached_calls = 0, 0
        self.cu_seqlens: list[Tensor] = []  # of each packed call; one and the same tensor within a forward pass
        self.modes: list[tuple[bool, bool]] = []  # of each backward: deterministic?, fills memory?

    def backend(self, *, required: bool = False) -> VarlenAttention:
        return VarlenAttention(self.varlen_attn, required=required)

    def varlen_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        tensors = (query, key, value, cu_seq_q, cu_seq_k, seqused_k)
        q, k, v, starts_q, starts_k, used = (None if x is None else on_meta(x) for x in tensors)
        options = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa, "num_splits": num_splits}
        layout = varlen_attn(q, k, v, starts_q, starts_k, max_q, max_k, seqused_k=used, **options)

        assert cu_seq_k is not None and return_aux is None and block_table is None
        assert num_splits == 1  # a split that depends on the batch would let a row depend on the others
        assert query.dim() == key.dim() == value.dim() == 3 and key.shape == value.shape
        assert query.dtype == key.dtype == value.dtype and query.dtype in self.dtypes
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert query.shape[2] == key.shape[2] <= 256 and query.shape[2] % 8 == 0
        for numbers in (cu_seq_q, cu_seq_k, *([] if seqused_k is None else [seqused_k])):
            assert numbers.dtype == torch.int32 and numbers.dim() == 1 and numbers.is_contiguous()
            assert numbers.device == query.device
        assert cu_seq_q.shape == cu_seq_k.shape and type(window_size) is tuple and type(max_q) is type(max_k) is int
        queries, slots = cu_seq_q.diff(), cu_seq_k.diff()
        keys = slots if seqused_k is None else seqused_k
        assert int(cu_seq_q[0]) == 0 and int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) <= len(key)
        assert bool((queries > 0).all()) and bool((keys <= slots).all()) and int(keys.max()) <= max_k
        assert max_q == int(queries.max()) and (seqused_k is not None or max_k == int(keys.max()))
        if seqused_k is None:
            assert window_size[1] == 0  # causal
            self.packed_calls += 1
            self.cu_seqlens.append(cu_seq_q)
        else:
            assert keys.shape == queries.shape and max_q == 1 and window_size[1] == -1
            self.cached_calls += 1
        out = torch.empty_strided(layout.shape, layout.stride(), dtype=query.dtype)
        parts = [
            attend_one(query[a : a + n], key[b : b + m], value[b : b + m], scale, window_size, 0.0)
            for a, n, b, m in zip(*(x.tolist() for x in (cu_seq_q[:-1], queries, cu_seq_k[:-1], keys)), strict=True)
        ]
        return _Noting.apply(out.copy_(torch.cat(parts)), self.modes)


class _Noting(torch.autograd.Function):
    """Passes on its argument; notes the process's settings in the backward pass, where the kernel reads them."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, modes: list[tuple[bool, bool]]) -> Tensor:
        ctx.modes = modes
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        fills = torch.utils.deterministic.fill_uninitialized_memory
        ctx.modes.append((torch.are_deterministic_algorithms_enabled(), bool(fills)))
        return gradient, None


def on_meta(x: Tensor) -> Tensor:
    """A meta tensor like this one, strides and gradients included."""
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return like.requires_grad_(x.requires_grad)
