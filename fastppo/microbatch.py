"""Who computes what, when: a batch into epochs, minibatches and packed microbatches, spread evenly over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.batch import pack
from fastppo.config import Config

# Read by a rank that has nothing left to read while others have, where each forward pass takes all ranks.
IDLE = pack([(0, 0)], [1])


@dataclass(frozen=True)
class Minibatch:
    """The sequences of one update, in microbatches. Rank r of W takes microbatches r, r + W, ...; each has as many."""

    microbatches: tuple[Tensor, ...]  # int64 indices of sequences; disjoint, none empty

    def of_rank(self, rank: int, ranks: int) -> tuple[Tensor, ...]:
        return self.microbatches[rank::ranks]


def plan_epochs(
    lengths: Tensor, *, epochs: int, minibatches: int, budget: int, ranks: int, generator: torch.Generator
) -> list[list[Minibatch]]:
    """Shuffle the B sequences anew in each epoch, cut them into minibatches, and pack each into microbatches.

    lengths (B,) int64, tokens of each sequence; budget: the most tokens in a microbatch. The plan depends on its
    arguments alone, so every rank makes the same one. Which sequences a minibatch holds does not depend on `ranks`.
    """
    plan = []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator)
        plan.append([Minibatch(pack_even(part, lengths, budget, ranks)) for part in order.chunk(minibatches)])
    return plan


def plan_step(lengths: Tensor, config: Config, step: int, ranks: int) -> list[list[Minibatch]]:
    """The plan of PPO step `step`, counted from 0: a function of the run's seed, the step and the B lengths."""
    return plan_epochs(
        lengths,
        epochs=config.ppo.epochs,
        minibatches=config.ppo.minibatches,
        budget=config.ppo.microbatch_tokens,
        ranks=ranks,
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step),
    )


def pack_even(sequences: Tensor, lengths: Tensor, budget: int, ranks: int) -> tuple[Tensor, ...]:
    """Spread sequences over the fewest microbatches that the budget allows, a multiple of `ranks`, evenly in tokens.

    Longest first into the emptiest microbatch (Graham, 1969: at most 4/3 of the best spread). Within a microbatch
    sequences stand in order of length, so that packed attention takes those of equal length in one call.
    """
    sizes = lengths[sequences].tolist()
    if max(sizes) > budget:
        raise ValueError(
            f"a sequence of {max(sizes)} tokens does not fit into ppo.microbatch_tokens = {budget}; raise it, or lower"
            " data.max_prompt_tokens or sampling.max_new_tokens"
        )
    if len(sizes) % ranks:
        raise ValueError(f"a minibatch of {len(sizes)} responses cannot be spread evenly over {ranks} ranks")
    count = max(-(-sum(sizes) // (budget * ranks)), 1) * ranks
    while (bins := _fill_bins(sizes, count, budget)) is None:
        count += ranks
    return tuple(sequences[torch.tensor(b)] for b in bins)


def pack_alone(lengths: Tensor, budget: int) -> tuple[Tensor, ...]:
    """All B sequences of one rank in microbatches; a sequence beyond the budget does not break it. None for B = 0."""
    if not len(lengths):
        return ()
    return pack_even(torch.arange(len(lengths)), lengths, max(budget, int(lengths.max())), ranks=1)


def _fill_bins(sizes: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """Indices into sizes for each of `count` bins; None if a bin would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = min(range(count), key=lambda b: (loads[b], len(bins[b]), b))
        bins[emptiest].append(i)
        loads[emptiest] += sizes[i]
    return None if max(loads) > budget else bins
