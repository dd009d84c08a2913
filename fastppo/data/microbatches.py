"""Division of a batch into epochs, minibatches and packed microbatches, with equal work for all ranks.

The work of a sequence has a term in its number of tokens and, for attention, a term in the square of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.data.packed import pack

# The input of a rank without a sequence in a forward pass that is a collective of all ranks.
IDLE = pack([(0, 0)], [1])


@dataclass(frozen=True)
class Minibatch:
    """The sequences of one update, in microbatches. Rank r of W computes microbatches r, r + W, ...

    All ranks have the same number of microbatches. The ranks compute microbatches i W to (i + 1) W - 1, a round, at the
    same time. Under ZeRO-3 they synchronise in every layer, so a rank with one microbatch more would wait for ever.
    Where ranks share microbatches (`parallel.sequence`), each of their groups is one rank here.
    """

    microbatches: tuple[Tensor, ...]  # int64 indices of sequences; disjoint, none empty

    def of_group(self, group: int, groups: int) -> tuple[Tensor, ...]:
        return self.microbatches[group::groups]


def work(lengths: Tensor, attention: float) -> Tensor:
    """The work of each sequence, (B,) fp64, in units of one token of a model without attention.

    A forward pass takes 2 P FLOPs a token in the P weights of the layers, and twice 2 n d t in attention at position t
    of its sequence (scores, and the sum of values), with n layers and d = heads x width of a head (Kaplan et al., 2020,
    table 1). Over a sequence of L tokens this is 2 P L + 2 n d L^2, or L + (n d / P) L^2 in units of a token. A
    backward pass takes twice as much of both. attention: n d / P (`fastppo.models.attention_ratio`); lengths (B,)
    int64.
    """
    tokens = lengths.double()
    return tokens + attention * tokens.square()


def plan_epochs(
    lengths: Tensor,
    *,
    epochs: int,
    minibatches: int,
    budget: int,
    ranks: int,
    generator: torch.Generator,
    attention: float = 0.0,
) -> list[list[Minibatch]]:
    """For each epoch, shuffle the B sequences, divide them into minibatches, and pack each into microbatches.

    lengths (B,) int64, tokens of each sequence; budget: the largest number of tokens in a microbatch; attention: as in
    `work`. The plan depends on the arguments only, so every rank makes the same one. The sequences of a minibatch do
    not depend on `ranks`.
    """
    plan = []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator)
        plan.append(
            [Minibatch(pack_even(part, lengths, budget, ranks, attention)) for part in order.chunk(minibatches)]
        )
    return plan


def plan_step(lengths: Tensor, config: Config, step: int, ranks: int, attention: float) -> list[list[Minibatch]]:
    """The plan of PPO step `step`, counted from 0: a function of the seed of the run, the step and the B lengths."""
    return plan_epochs(
        lengths,
        epochs=config.ppo.epochs,
        minibatches=config.ppo.minibatches,
        budget=config.ppo.microbatch_tokens,
        ranks=ranks,
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step),
        attention=attention,
    )


def imbalance(plan: list[list[Minibatch]], lengths: Tensor, ranks: int, attention: float) -> float:
    """The time of the plan over that of a plan with equal work for all ranks, 1 or more.

    The slowest rank determines the time of a round: the sum of its work over all rounds, over the mean work of a rank.
    """
    slowest, total = 0.0, 0.0
    for minibatch in (minibatch for epoch in plan for minibatch in epoch):
        loads = torch.stack([work(lengths[part], attention).sum() for part in minibatch.microbatches])
        slowest += float(loads.unflatten(0, (-1, ranks)).amax(1).sum())
        total += float(loads.sum())
    return slowest * ranks / total


def pack_even(
    sequences: Tensor, lengths: Tensor, budget: int, ranks: int, attention: float = 0.0
) -> tuple[Tensor, ...]:
    """Pack sequences into the fewest microbatches that the budget allows, a multiple of `ranks`, with equal work.

    The largest sequence first, each into the microbatch with the least work that has room for it (Graham, 1969: at most
    4/3 of the best distribution if all have room). A microbatch is ordered by length, so that packed attention computes
    sequences of equal length in one call. Microbatches of similar work are computed in the same round.
    """
    sizes = lengths[sequences].tolist()
    if max(sizes) > budget:
        raise ValueError(
            f"a sequence of {max(sizes)} tokens does not fit into ppo.microbatch_tokens = {budget}; raise it, or lower"
            " data.max_prompt_tokens or sampling.max_new_tokens"
        )
    if len(sizes) % ranks:
        raise ValueError(f"a minibatch of {len(sizes)} responses cannot be spread evenly over {ranks} ranks")
    costs = work(lengths[sequences], attention).tolist()
    count = max(-(-sum(sizes) // (budget * ranks)), 1) * ranks
    while (bins := _fill_bins(sizes, costs, count, budget)) is None:
        count += ranks
    return tuple(sequences[torch.tensor(b)] for b in _in_rounds(bins, costs, ranks))


def pack_alone(lengths: Tensor, budget: int) -> tuple[Tensor, ...]:
    """Pack all B sequences of one rank; a sequence longer than the budget raises it. No microbatch for B = 0."""
    if not len(lengths):
        return ()
    return pack_even(torch.arange(len(lengths)), lengths, max(budget, int(lengths.max())), ranks=1)


def _fill_bins(sizes: Sequence[int], costs: Sequence[float], count: int, budget: int) -> list[list[int]] | None:
    """Indices into sizes for each of `count` bins; None if an item does not fit into any bin."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, tokens = [0.0] * count, [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        with_room = [b for b in range(count) if tokens[b] + sizes[i] <= budget]
        if not with_room:
            return None
        least = min(with_room, key=lambda b: (loads[b], len(bins[b]), b))
        bins[least].append(i)
        loads[least] += costs[i]
        tokens[least] += sizes[i]
    return bins


def _in_rounds(bins: list[list[int]], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The bins in order of decreasing work, so that those of a round are similar; within a round the bin with the most
    work goes to the rank with the least work so far.
    """
    loads = [sum(costs[i] for i in b) for b in bins]
    decreasing = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    ordered, totals = [], [0.0] * ranks
    for start in range(0, len(bins), ranks):
        by_total = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        bin_of_rank = dict(zip(by_total, decreasing[start : start + ranks], strict=True))
        for rank in range(ranks):
            totals[rank] += loads[bin_of_rank[rank]]
            ordered.append(bins[bin_of_rank[rank]])
    return ordered
