"""Evaluation on examples that are held out of training: of each method's own kind, or of its objective as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastppo.config import OfflineConfig
from fastppo.data import Examples, pack_even
from fastppo.distributed import World, even_passes, stop, sum_groups
from fastppo.models import PrefixStates
from fastppo.offline.model import TrainedModel
from fastppo.offline.updates import Objective


class Evaluation(Protocol):
    """A model on held-out examples."""

    @property
    def loss(self) -> float: ...

    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class MeanEvaluation:
    """An objective on held-out examples: the means of its statistics."""

    means: dict[str, float]  # `loss` among them

    @property
    def loss(self) -> float:
        return self.means["loss"]

    def metrics(self) -> dict[str, float]:
        return self.means


def evaluation_of(
    objective: Objective, statistics: Sequence[str], count: Callable[[Examples, Tensor], int]
) -> Callable[[TrainedModel, Examples, PrefixStates, OfflineConfig, World], MeanEvaluation]:
    """An evaluation by the objective that is learned; statistics and count: as in `loop.run`."""

    @torch.no_grad()
    def evaluate(
        trained: TrainedModel, examples: Examples, prefix: PrefixStates, config: OfflineConfig, world: World
    ) -> MeanEvaluation:
        sums = torch.zeros(len(statistics), dtype=torch.float64, device=world.device)
        with stop.together(world):
            for part in heldout_microbatches(examples, config, world):
                shown = part if len(part) else torch.zeros(1, dtype=torch.int64)  # to keep in step with other ranks
                packed, prefix_states = trained.select(examples, shown, prefix)
                ask = partial(objective, packed=packed, examples=examples, part=shown)
                _, found = trained.engine(packed, ask, prefix_states)
                if len(part):
                    sums += found.double()
        means = sum_groups(sums, world).cpu() / count(examples, torch.arange(len(examples)))
        return MeanEvaluation(dict(zip(statistics, means.tolist(), strict=True)))

    return evaluate


def heldout_microbatches(examples: Examples, config: OfflineConfig, world: World) -> Iterator[Tensor]:
    """The microbatches of all examples that this rank's group has, each example in one group; at ZeRO stage 3 each has
    as many."""
    everything = pack_even(torch.arange(len(examples)), examples.lengths, config.microbatch_tokens, ranks=1)
    for part in even_passes(everything[world.group :: world.groups], config.zero, world):
        if config.zero.stage == 3:  # no rank may leave another alone in a pass
            stop.check(world)
        else:
            stop.check_among(world.sequence)
        yield part
