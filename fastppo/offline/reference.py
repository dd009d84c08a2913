"""Logprobs of both answers of each pair under the reference: computed once, before training, and part of checkpoints.

The reference is the model as training finds it. In learning no second model is in memory, only two numbers a pair on
the host. Each pair of the training data is computed in the microbatch in which an update first sees it: so the policy
of the first update, which is the reference, has the same logprobs bit for bit, and every margin is exactly 0 there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.config import OfflineConfig
from fastppo.data import Examples, Packed, batches
from fastppo.distributed import World, all_gather, all_sum, stop, watching
from fastppo.models import PrefixStates, adapters_off
from fastppo.offline.heldout import heldout_microbatches
from fastppo.offline.loop import Setup
from fastppo.offline.model import TrainedModel
from fastppo.offline.sft import response_logprobs
from fastppo.offline.updates import microbatches_of

log = logging.getLogger("fastppo")


def answer_logprobs(policy: Any, hidden: Tensor, packed: Packed) -> Tensor:
    """The logprob of each answer, summed over its tokens; hidden (M, H) -> (S,) fp64.

    Each answer is summed separately, so that the rounding does not depend on the rest of the microbatch, and in fp64,
    so that the difference of two long answers keeps its digits.
    """
    logprobs = response_logprobs(policy, hidden, packed.responses).double()  # (M,)
    return torch.stack([one.sum() for one in logprobs.split(packed.response_lengths.tolist())])


@torch.no_grad()
def heldout_logprobs(
    trained: TrainedModel, pairs: Examples, prefix: PrefixStates, config: OfflineConfig, world: World
) -> Tensor:
    """Summed logprobs of the two answers of every pair, (P, 2) fp64 on the CPU, the same on every rank."""
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    with stop.together(world):
        for part in heldout_microbatches(pairs, config, world):
            packed, prefix_states = trained.select(pairs, part, prefix)
            sums = trained.engine(packed, partial(answer_logprobs, packed=packed), prefix_states).cpu()
            if len(part):  # of no pairs it is a pass that keeps in step with other ranks
                found[part] = sums.view(-1, 2)
    return all_sum(found, world).cpu()  # each pair is on one rank


class ReferenceLogprobs:
    """Summed logprobs of chosen and rejected answers under the reference. A `Saved` part of checkpoints."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.training = torch.empty(0, 2, dtype=torch.float64)  # (E, 2), 0 where not known
        self.known = torch.empty(0, dtype=torch.bool)  # (E,): an update of the run sees the pair
        self.heldout = torch.empty(0, 2, dtype=torch.float64)  # (E', 2)

    def save(self, folder: Path, name: str, write: Callable[[Any, Path], None]) -> None:
        """They are the same on every rank, so the first one writes them."""
        if self._world.rank == 0:
            saved = {"training": self.training, "known": self.known, "heldout": self.heldout}
            write(saved, folder / name / "logprobs.pt")

    def load(self, folder: Path, name: str) -> None:
        saved = torch.load(folder / name / "logprobs.pt")
        self.training, self.known, self.heldout = (saved[part] for part in ("training", "known", "heldout"))

    def compute(self, setup: Setup[Any]) -> None:
        """Compute them, unless a checkpoint had them. All ranks call it, before the first update. Raises Stopped.

        Of the pairs that the run will see; with a constant learning rate, of all, since `steps` can be raised then when
        the run is resumed, and the model is not the reference any more.
        """
        config, trained, pairs = setup.config, setup.trained, setup.examples
        if len(self.training):
            return
        self.training = torch.zeros(len(pairs), 2, dtype=torch.float64)
        self.known = torch.zeros(len(pairs), dtype=torch.bool)
        with watching(self._world), _as_reference(trained, config):
            if len(setup.heldout):
                self.heldout = heldout_logprobs(trained, setup.heldout, setup.heldout_prefix, config, self._world)
            self._compute_training(setup)
        if self._world.rank == 0:
            log.info(
                "the reference's logprobs of %d pairs to train on and %d held out are known; %.3f MB on the host",
                *(int(self.known.sum()), len(self.heldout), (self.training.nbytes + self.heldout.nbytes) / 1e6),
            )

    @torch.no_grad()
    def _compute_training(self, setup: Setup[Any]) -> None:
        """Those of the training pairs, each in the microbatch of the first batch that has it.

        The prefix's states are not kept: training keeps them in the order in which a resumed run computes them again.
        """
        trained, pairs, known = setup.trained, setup.examples, self.known.clone()
        mine: list[tuple[Tensor, Tensor]] = [(torch.empty(0, dtype=torch.int64), self.training[:0])]
        for rows in _batches_of(setup):
            for part in microbatches_of(rows, pairs, setup.config, self._world):
                stop.check(self._world)
                packed, prefix_states = trained.select(pairs, part, PrefixStates(keep=False))
                sums = trained.engine(packed, partial(answer_logprobs, packed=packed), prefix_states)
                sums = sums.cpu().view(-1, 2)
                mine.append((part[~known[part]], sums[~known[part]]))
            known[rows] = True
        indices, sums = (torch.cat(parts) for parts in zip(*mine, strict=True))
        for part, found in all_gather((indices, sums), self._world):
            for index, both in zip(part.tolist(), found, strict=True):
                if not self.known[index]:  # a batch may have a pair twice: the first one counts
                    self.training[index], self.known[index] = both, True


def _batches_of(setup: Setup[Any]) -> Iterator[list[int]]:
    """The run's batches up to the one with which all pairs have been seen; with a constant rate, beyond its end too."""
    config, pairs, seen = setup.config, setup.examples, torch.zeros(len(setup.examples), dtype=torch.bool)
    order = batches(pairs, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    for rows in order if config.optim.schedule == "constant" else islice(order, setup.steps):
        yield rows
        seen[rows] = True
        if bool(seen.all()):
            return


def _as_reference(trained: TrainedModel, config: OfflineConfig) -> AbstractContextManager[None]:
    return adapters_off(trained.role.model) if config.model.lora.rank else nullcontext()
