"""`torch.nn.attention.varlen.varlen_attn`: FlashAttention-2 as torch ships it, where flash-attn is not installed.

Two of its parts are left alone. A paged cache (`block_table`) with a split of the keys gives wrong rows in torch 2.13
(pytorch #194167), and a split of its own choice depends on the number of rows, so that a response would depend on the
others: `num_splits` is 1, and the dense cache is read as it lies.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import deterministic

from fastppo.models.backends.backend import DTYPES, WIDEST, heads
from fastppo.models.cache import ActiveRows, as_tokens


@dataclass(frozen=True)
class VarlenAttention:
    """`varlen_attn`, called with the layouts of fastppo without copying a tensor: it takes any strides if the last
    dimension is contiguous."""

    function: Callable[..., Tensor]  # varlen_attn
    required: bool = False
    name = "torch's varlen_attn"
    setting = "varlen"

    def lacks(self, width: int, dtype: torch.dtype, softcap: float) -> str | None:
        if softcap:
            return f"a soft cap of {softcap:g} on its scores, and varlen_attn has none"
        if width <= WIDEST and width % 8 == 0 and dtype in DTYPES:
            return None
        return f"{heads(width, dtype)}, and varlen_attn supports multiples of 8 up to {WIDEST} in bf16 or fp16"

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
        assert not softcap  # see `lacks`
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (N, heads, width)
        out = self.function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=(window - 1 if window else -1, 0),  # positions to the left and to the right; -1 for all
            enable_gqa=q.shape[1] != k.shape[1],
            num_splits=1,
        )
        if out.grad_fn is not None:
            _sum_in_a_fixed_order(out.grad_fn)
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
        assert not softcap  # see `lacks`
        for cache, new in ((key_cache, key), (value_cache, value)):
            cache.transpose(1, 2)[active.rows, active.lengths] = new[:, :, 0]
        out = self.function(
            query[:, :, 0],
            as_tokens(key_cache),
            as_tokens(value_cache),
            active.queries,
            active.starts,
            1,
            key_cache.shape[2],
            scale=scale,
            # The query is the newest position: nothing is to its right. A bound there, 0, would keep the kernel from
            # reading keys once for the queries of a group.
            window_size=(window - 1 if window else -1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=active.lengths_after,
            num_splits=1,
        )
        return out.unsqueeze(1)


def obstacle() -> str | None:
    """The reason why this torch has no `varlen_attn` for its GPU; None if it has."""
    if torch.version.hip is not None:
        return "torch's varlen_attn is used on NVIDIA's GPUs only, and this torch is built for ROCm"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without FlashAttention, which its varlen_attn calls"
    return None


def load(*, required: bool) -> tuple[VarlenAttention, str]:
    """`varlen_attn` where `obstacle` finds none, and torch's version."""
    module = importlib.import_module("torch.nn.attention.varlen")  # late: it takes seconds, as it loads the compiler
    return VarlenAttention(module.varlen_attn, required=required), torch.__version__


def _sum_in_a_fixed_order(node: Node) -> None:
    """Let this node of the backward pass sum in a fixed order, so that resume is bit for bit.

    By default its threads add to the queries' gradients in the order in which they come. `varlen_attn` has no argument
    for it and asks the process; memory is not filled meanwhile, which the process's setting would also do.
    """
    before: list[tuple[int, bool]] = []
    memory: Any = deterministic

    def enter(gradients: Any) -> None:
        before.append((torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory))
        memory.fill_uninitialized_memory = False
        torch.set_deterministic_debug_mode("error")

    def leave(gradients: Any, incoming: Any) -> None:
        mode, memory.fill_uninitialized_memory = before.pop()
        torch.set_deterministic_debug_mode(mode)

    node.register_prehook(enter)
    node.register_hook(leave)
