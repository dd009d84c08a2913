"""Who computes what, when: a batch into epochs, minibatches and packed microbatches, spread evenly over the ranks.

Even means the work: a sequence's tokens and, as attention looks back from each of them, a term in their square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.data.batch import pack

# Read by a rank that has nothing left to read while others have, where each forward pass takes all ranks.
IDLE = pack([(0, 0)], [1])


@dataclass(frozen=True)
class Minibatch:
    """The sequences of one update, in microbatches. Rank r of W takes microbatches r, r + W, ...; each has as many.

    So microbatches i W to (i + 1) W - 1 are a round that the ranks compute side by side. Under ZeRO-3 they wait for
    each other in every layer of it, and a rank that had one microbatch more would wait for ever.
    """

    microbatches: tuple[Tensor, ...]  # int64 indices of sequences; disjoint, none empty

    def of_rank(self, rank: int, ranks: int) -> tuple[Tensor, ...]:
        return self.microbatches[rank::ranks]


def work(lengths: Tensor, attention: float) -> Tensor:
    """The work of each sequence, (B,) fp64, in tokens of a model without attention.

    A forward pass takes 2 P FLOPs a token in the P weights of the layers, and 2 n d t in attention at position t of
    its sequence, twice (scores, and the sum of values), with n layers and d = heads x width of a head (Kaplan et al.,
    2020, table 1). Over a sequence of L tokens that is 2 P L + 2 n d L^2, so in tokens L + (n d / P) L^2. A backward
    pass has twice as much of both. attention: n d / P, see `models.attention_ratio`; lengths (B,) int64.
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
    """Shuffle the B sequences anew in each epoch, cut them into minibatches, and pack each into microbatches.

    lengths (B,) int64, tokens of each sequence; budget: the most tokens in a microbatch; attention: as in `work`. The
    plan depends on its arguments alone, so every rank makes the same one. Which sequences a minibatch holds does not
    depend on `ranks`.
    """
    plan = []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator)
        plan.append(
            [Minibatch(pack_even(part, lengths, budget, ranks, attention)) for part in order.chunk(minibatches)]
        )
    return plan


def plan_step(lengths: Tensor, config: Config, step: int, ranks: int, attention: float) -> list[list[Minibatch]]:
    """The plan of PPO step `step`, counted from 0: a function of the run's seed, the step and the B lengths."""
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
    """How much longer the plan takes than one that is perfectly even, 1 or more.

    In each round the slowest rank decides. Their work over all rounds, divided by the mean work of a rank.
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
    """Spread sequences over the fewest microbatches that the budget allows, a multiple of `ranks`, evenly in work.

    Largest first into the microbatch with the least work that has room (Graham, 1969: at most 4/3 of the best spread
    where there is room in all). Within a microbatch sequences stand in order of length, so that packed attention takes
    those of equal length in one call. Microbatches of similar work are computed side by side.
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
    """All B sequences of one rank in microbatches; a sequence beyond the budget does not break it. None for B = 0."""
    if not len(lengths):
        return ()
    return pack_even(torch.arange(len(lengths)), lengths, max(budget, int(lengths.max())), ranks=1)


def _fill_bins(sizes: Sequence[int], costs: Sequence[float], count: int, budget: int) -> list[list[int]] | None:
    """Indices into sizes for each of `count` bins; None if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, tokens = [0.0] * count, [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = [b for b in range(count) if tokens[b] + sizes[i] <= budget]
        if not room:
            return None
        least = min(room, key=lambda b: (loads[b], len(bins[b]), b))
        bins[least].append(i)
        loads[least] += costs[i]
        tokens[least] += sizes[i]
    return bins


def _in_rounds(bins: list[list[int]], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The bins by falling work, so that those of a round are alike; within a round the most goes to the rank that has
    the least so far.
    """
    loads = [sum(costs[i] for i in b) for b in bins]
    falling = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    ordered, totals = [], [0.0] * ranks
    for start in range(0, len(bins), ranks):
        takers = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        taken = dict(zip(takers, falling[start : start + ranks], strict=True))
        for rank in range(ranks):
            totals[rank] += loads[taken[rank]]
            ordered.append(bins[taken[rank]])
    return ordered
