"""All-to-all before and after attention (Ulysses; Jacobs et al., 2023, section 3.1): tokens for heads, and back.

Before attention each rank has all heads of its tokens, and afterwards again; in between it has all tokens of some
heads, and so any attention over whole sequences is computed as on one rank.
`deepspeed.sequence.layer.DistributedAttention` (0.19.8) does the same for a number of tokens that the ranks divide, and
for as many key heads as ranks or more. A packed row has any number of tokens, and grouped queries often have fewer key
heads than a group has ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.errors import ModelError
from fastppo.models.parallel.group import Split


class Deal(NamedTuple):
    """Which heads each rank of a group computes, in contiguous runs."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]  # of keys and values: those that the rank's queries read; a head may have several readers

    def heads(self, rank: int) -> tuple[int, int]:
        """The numbers of query heads and of key heads of a rank."""
        queries, keys = self.queries[rank], self.keys[rank]
        return queries.stop - queries.start, keys.stop - keys.start

    def width(self, rank: int) -> int:
        """Heads of queries, keys and values together."""
        queries, keys = self.heads(rank)
        return queries + 2 * keys


@cache
def deal_heads(heads: int, key_heads: int, ranks: int) -> Deal:
    """Deal query heads to ranks, as evenly as their number allows. Raises ModelError for fewer heads than ranks."""
    if heads < ranks:
        raise ModelError(
            f"parallel.sequence is {ranks}, and an attention layer of the model has {heads} heads, of which each rank"
            f" of a group computes at least one. Set parallel.sequence to {1 << (heads.bit_length() - 1)} or less."
        )
    group = heads // key_heads  # of queries that read the same keys
    queries = [slice(heads * rank // ranks, heads * (rank + 1) // ranks) for rank in range(ranks)]
    keys = [slice(run.start // group, (run.stop - 1) // group + 1) for run in queries]
    return Deal(tuple(queries), tuple(keys))


def to_heads(query: Tensor, key: Tensor, value: Tensor, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's heads, from all heads of its tokens, less a token that it computes for want of one.

    query (1, heads, n, width), key, value (1, key heads, n, width), n tokens of N -> the same with N tokens and fewer
    heads, not contiguous. Which queries read which keys is in `pieces`. All ranks of the group call it.
    """
    deal = deal_heads(query.shape[1], key.shape[1], split.group.size)
    query, key, value = (x[:, :, : split.counts[split.group.index]] for x in (query, key, value))
    found: tuple[Tensor, Tensor, Tensor] = _ToHeads.apply(query, key, value, split, deal)  # type: ignore[no-untyped-call]
    return found


def to_tokens(out: Tensor, split: Split, heads: int) -> Tensor:
    """All heads of this rank's tokens, from all tokens of its heads.

    out (1, N, own heads, width) -> (1, n, heads, width); heads: of queries, on all ranks together. For a token that a
    rank computes for want of one, 0. All ranks of the group call it.
    """
    deal = deal_heads(heads, heads, split.group.size)
    tokens: Tensor = _ToTokens.apply(out, split, deal)  # type: ignore[no-untyped-call]
    return tokens if tokens.shape[1] else F.pad(tokens, (0, 0, 0, 0, 0, 1))


@cache
def pieces(heads: int, key_heads: int, ranks: int, rank: int) -> list[tuple[slice, slice]]:
    """A rank's query heads and key heads in the fewest pieces in which each key head has as many readers.

    A run of query heads may begin or end within those that read one key head, so there are up to three. To repeat keys
    for each query head instead would take a multiple of their memory.
    """
    deal, group = deal_heads(heads, key_heads, ranks), heads // key_heads
    queries, keys = deal.queries[rank], deal.keys[rank]
    readers = [
        min(queries.stop, (key + 1) * group) - max(queries.start, key * group) for key in range(keys.start, keys.stop)
    ]
    found, first_query, first_key = [], 0, 0
    for count, run in groupby(readers):
        size = len(list(run))
        end = first_query + count * size, first_key + size
        found.append((slice(first_query, end[0]), slice(first_key, end[1])))
        first_query, first_key = end
    return found


def _by_heads(tokens: Sequence[Tensor], runs: Sequence[Sequence[slice]], split: Split) -> Tensor:
    """Exchange all heads of own tokens for all tokens of own heads.

    tokens: tensors (n, heads, width); runs: of each of them, the heads that go to each rank. Returns (N, own heads of
    all of them, width): parts lie in the order of ranks, which is that of tokens, so that nothing is copied behind the
    exchange.
    """
    n, _, width = tokens[0].shape
    counts = [sum(run[rank].stop - run[rank].start for run in runs) for rank in range(split.group.size)]
    sent = [n * count * width for count in counts]
    buffer = tokens[0].new_empty(sum(sent))
    for rank, slot in enumerate(buffer.split(sent)):
        parts = [x[:, run[rank]] for x, run in zip(tokens, runs, strict=True)]
        torch.cat(parts, dim=1, out=slot.view(n, counts[rank], width))
    own = counts[split.group.index]
    received = split.group.exchange(buffer, sent, [count * own * width for count in split.counts])
    return received.view(split.bounds[-1], own, width)


def _by_tokens(heads: Tensor, counts: Sequence[int], split: Split) -> list[Tensor]:
    """Exchange all tokens of own heads for all heads of own tokens.

    heads (N, own heads, width), contiguous; counts: heads of each rank. Returns (n, heads, width) from each rank.
    """
    width, n = heads.shape[2], split.counts[split.group.index]
    sent = [count * heads.shape[1] * width for count in split.counts]
    received = [n * count * width for count in counts]
    parts = split.group.exchange(heads.reshape(-1), sent, received).split(received)
    return [part.view(n, count, width) for part, count in zip(parts, counts, strict=True)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, split: Split, deal: Deal) -> tuple[Tensor, ...]:
        ctx.split, ctx.deal, ctx.key_heads = split, deal, key.shape[1]
        tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
        whole = _by_heads(tokens, (deal.queries, deal.keys, deal.keys), split)
        queries, keys = deal.heads(split.group.index)
        return tuple(x.transpose(0, 1)[None] for x in whole.split([queries, keys, keys], dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        split, deal = ctx.split, ctx.deal
        whole = torch.cat([x[0].transpose(0, 1) for x in gradients], dim=1)
        counts = [deal.width(rank) for rank in range(split.group.size)]
        parts = _by_tokens(whole, counts, split)
        of_ranks = [
            part.split([queries, keys, keys], dim=1)
            for part, (queries, keys) in zip(parts, map(deal.heads, range(split.group.size)), strict=True)
        ]
        d_query = torch.cat([part[0] for part in of_ranks], dim=1)
        summed = [_summed([part[i] for part in of_ranks], deal.keys, ctx.key_heads) for i in (1, 2)]
        return *(x.transpose(0, 1)[None] for x in (d_query, *summed)), None, None


def _summed(parts: Sequence[Tensor], runs: Sequence[slice], heads: int) -> Tensor:
    """The gradient of key heads (n, heads, width), from that of each rank's copies; the sum is in fp32 or wider."""
    shape, dtype = (parts[0].shape[0], heads, parts[0].shape[2]), parts[0].dtype
    total = parts[0].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    for part, run in zip(parts, runs, strict=True):
        total[:, run] += part
    return total.to(dtype)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, split: Split, deal: Deal) -> Tensor:
        ctx.split, ctx.deal = split, deal
        counts = [deal.heads(rank)[0] for rank in range(split.group.size)]
        return torch.cat(_by_tokens(out[0], counts, split), dim=1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _by_heads([gradient[0]], [ctx.deal.queries], ctx.split)[None], None, None
