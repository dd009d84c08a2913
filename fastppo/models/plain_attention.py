"""Attention as plain matrix products: for short sequences on the CPU, for masks that no fused kernel takes, and for new
tokens behind those that the sampler's cache holds.

Scores, mask and scale come from one product, and the gradient is written out: autograd would clone the scores for the
mask, and fill zeros around the rows of each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.models.cache import Extension

QUERIES = 128  # of a row whose scores are computed at once

Runs = tuple[tuple[int, int, int], ...]  # of equal sequences: first row, number of sequences, their length


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float, window: int) -> Tensor:
    """Causal softmax attention (Vaswani et al., 2017, eq. 1) of each sequence to itself.

    query (1, heads, N, width), key and value (1, kv heads, N, width), in any memory layout; runs: of all N rows, in
    order; window: number of newest positions that a token attends to, 0: all. Returns (1, N, heads, width).
    """
    output: Tensor = _PlainAttention.apply(query, key, value, runs, scale, window)  # type: ignore[no-untyped-call]
    return output


def attend_extended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    extensions: Sequence[Extension],
    *,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Causal attention of new tokens to all that their rows of the cache hold, themselves included.

    query (1, heads, N, width) of the extensions end to end; keys, values (rows, kv heads, length, width), which hold
    the new ones already; window, softcap: 0 for none. Each row is computed alone, so that it does not depend on the
    others, and some queries at a time, so that scores take little memory. Returns (1, N, heads, width), without
    gradient.
    """
    output, kv_heads = query.new_empty(1, query.shape[2], *query.shape[1::2]), keys.shape[1]
    parts = (
        (start + done, min(QUERIES, length - done), row, before + done)
        for start, length, row, before in extensions
        for done in range(0, length, QUERIES)
    )
    for start, length, row, before in parts:
        q = query[0, :, start : start + length]  # (heads, L, width)
        k, v = (x[row, :, : before + length] for x in (keys, values))
        scores = (q.unflatten(0, (kv_heads, -1)).flatten(1, 2) @ k.transpose(1, 2)).float() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(before + length, device=query.device)
        distance = places[before:, None] - places
        hidden = (distance < 0) | (distance >= (window or before + length))  # (L, before + L)
        weights = scores.unflatten(1, (-1, length)).masked_fill(hidden, float("-inf")).softmax(-1)
        out = weights.to(v.dtype).flatten(1, 2) @ v  # (kv heads, group * L, width)
        output[0, start : start + length] = out.reshape(q.shape).transpose(0, 1)
    return output


class _PlainAttention(torch.autograd.Function):
    """The queries of a group are stacked along the length, so that keys and values are read once and not repeated.

    With B sequences of L tokens, K kv heads and G queries a group the products are of B K matrices: queries (G L,
    width), keys and values (L, width), scores (G L, L).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float, window: int) -> Tensor:
        _, heads, rows, width = query.shape
        kv_heads = key.shape[1]
        output, saved = query.new_empty(1, rows, heads, width), []
        for run in runs:
            q, k, v = _stacked(query, run, kv_heads), _stacked(key, run, kv_heads), _stacked(value, run, kv_heads)
            mask = _mask(run[2], window, query).repeat(heads // kv_heads, 1)
            weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
            _write(output.transpose(1, 2), run, weights @ v)
            saved += [q, k, v, weights] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(*saved)
        ctx.runs, ctx.scale = runs, scale
        ctx.layouts = [torch.empty_like(x, device="meta") for x in (query, key, value)]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In the memory layout of the inputs, which are views of what a projection returned: so are the gradients.
        gradients = [torch.empty_like(x, device=gradient.device) for x in ctx.layouts]
        kv_heads, scale, saved = gradients[1].shape[1], ctx.scale, ctx.saved_tensors
        for i, run in enumerate(ctx.runs):
            q, k, v, weights = saved[4 * i : 4 * i + 4]
            d_out = _stacked(gradient.transpose(1, 2), run, kv_heads)
            d_scores = torch._softmax_backward_data(d_out @ v.transpose(1, 2), weights, -1, weights.dtype)
            products = (
                torch.baddbmm(q.new_zeros(()), d_scores, k, beta=0, alpha=scale),
                torch.baddbmm(q.new_zeros(()), d_scores.transpose(1, 2), q, beta=0, alpha=scale),
                weights.transpose(1, 2) @ d_out,
            )
            for whole, part in zip(gradients, products, strict=True):
                _write(whole, run, part)
        return *gradients, None, None, None


def _stacked(x: Tensor, run: tuple[int, int, int], kv_heads: int) -> Tensor:
    """The rows of a run of x (1, heads, N, width) as (B K, G L, width)."""
    start, count, length = run
    rows = x[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
    matrices: Tensor = rows.reshape(count * kv_heads, -1, x.shape[-1])
    return matrices


def _write(whole: Tensor, run: tuple[int, int, int], part: Tensor) -> None:
    """Write the rows of a run, (B K, G L, width), into `whole` (1, heads, N, width)."""
    start, count, length = run
    rows = whole[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
    rows.copy_(part.view(rows.shape))


def _mask(length: int, window: int, like: Tensor) -> Tensor:
    """(L, L): 0 where a token attends, else -inf, to be added to the scores."""
    mask: Tensor = like.new_full((length, length), float("-inf")).triu_(1)
    if 0 < window < length:
        mask += torch.full_like(mask, float("-inf")).tril_(-window)
    return mask
