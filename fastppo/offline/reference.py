"""Logprobs of both answers of each pair under the reference: computed once, before training, and part of checkpoints.

The reference is the model as training finds it, or a model of its own, which is let go before the other is loaded. In
learning no second model is in memory, only two numbers a pair on the host. Each pair of the training data is computed
in the microbatch in which an update first sees it: so the policy of the first update, if it is the reference, has the
same logprobs bit for bit, and every margin is exactly 0 there.
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

from fastppo.config import DPOConfig, OfflineConfig
from fastppo.data import Examples, Packed, batches
from fastppo.distributed import World, gather_groups, stop, sum_groups, watching
from fastppo.models import PrefixStates, adapters_off
from fastppo.offline.heldout import heldout_microbatches
from fastppo.offline.loop import Setup
from fastppo.offline.model import AskedModel, TrainedModel, assemble_reference
from fastppo.offline.sft import response_logprobs
from fastppo.offline.updates import microbatches_of, total_steps

log = logging.getLogger("fastppo")


def answer_logprobs(policy: Any, hidden: Tensor, packed: Packed) -> Tensor:
    """The logprob of each answer, summed over its tokens; hidden (M, H) -> (S,) fp64.

    Each answer is summed separately, so that the rounding does not depend on the rest of the microbatch, and in fp64,
    so that the difference of two long answers keeps its digits.
    """
    logprobs = response_logprobs(policy, hidden, packed.responses).double()  # (M,)
    return torch.stack([one.sum() for one in logprobs.split(packed.response_lengths_on_host)])


@torch.no_grad()
def heldout_logprobs(
    model: AskedModel, pairs: Examples, prefix: PrefixStates, config: OfflineConfig, world: World
) -> Tensor:
    """Summed logprobs of the two answers of every pair, (P, 2) fp64 on the CPU, the same on every rank."""
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    with stop.together(world):
        for part in heldout_microbatches(pairs, config, world):
            packed, prefix_states = model.select(pairs, part, prefix)
            sums = model.engine(packed, partial(answer_logprobs, packed=packed), prefix_states).cpu()
            if len(part):  # of no pairs it is a pass that keeps in step with other ranks
                found[part] = sums.view(-1, 2)
    return sum_groups(found, world).cpu()  # each pair is in one group


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

    def compute_before(self, config: DPOConfig, pairs: Examples, heldout: Examples) -> None:
        """Compute them with the reference that is a model of its own, if there is one, and let it go.

        All ranks call it, before the model that trains is loaded. Raises Stopped, or ModelError.
        """
        if config.frozen_model is None:
            return
        reference = assemble_reference(config, self._world)
        self._compute(AskedModel(reference), config, pairs, heldout, PrefixStates(keep=False))
        reference.release()
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()

    def compute(self, setup: Setup[Any]) -> None:
        """Compute them with the model as training finds it, unless they are known: from a reference that is a model of
        its own, or from a checkpoint. All ranks call it, before the first update. Raises Stopped."""
        if len(self.training):
            return
        with _as_reference(setup.trained, setup.config):
            self._compute(setup.trained, setup.config, setup.examples, setup.heldout, setup.heldout_prefix)

    def _compute(
        self, model: AskedModel, config: OfflineConfig, pairs: Examples, heldout: Examples, prefix: PrefixStates
    ) -> None:
        """Those of the held-out pairs, whose states `prefix` has, and of the pairs that the run will see; with a
        constant learning rate, of all, since `steps` can be raised then when the run is resumed, and the model is not
        the reference any more.
        """
        self.training = torch.zeros(len(pairs), 2, dtype=torch.float64)
        self.known = torch.zeros(len(pairs), dtype=torch.bool)
        with watching(self._world):
            if len(heldout):
                self.heldout = heldout_logprobs(model, heldout, prefix, config, self._world)
            self._compute_training(model, config, pairs)
        if self._world.rank == 0:
            log.info(
                "the reference's logprobs of %d pairs to train on and %d held out are known; %.3f MB on the host",
                *(int(self.known.sum()), len(self.heldout), (self.training.nbytes + self.heldout.nbytes) / 1e6),
            )

    @torch.no_grad()
    def _compute_training(self, model: AskedModel, config: OfflineConfig, pairs: Examples) -> None:
        """Those of the training pairs, each in the microbatch of the first batch that has it.

        The prefix's states are not kept: training keeps them in the order in which a resumed run computes them again.
        """
        known = self.known.clone()
        mine: list[tuple[Tensor, Tensor]] = [(torch.empty(0, dtype=torch.int64), self.training[:0])]
        for rows in _batches_of(config, pairs):
            for part in microbatches_of(rows, pairs, config, self._world):
                stop.check(self._world)
                packed, prefix_states = model.select(pairs, part, PrefixStates(keep=False))
                sums = model.engine(packed, partial(answer_logprobs, packed=packed), prefix_states)
                sums = sums.cpu().view(-1, 2)
                mine.append((part[~known[part]], sums[~known[part]]))
            known[rows] = True
        indices, sums = (torch.cat(parts) for parts in zip(*mine, strict=True))
        for part, found in gather_groups((indices, sums), self._world):
            for index, both in zip(part.tolist(), found, strict=True):
                if not self.known[index]:  # a batch may have a pair twice: the first one counts
                    self.training[index], self.known[index] = both, True


def _batches_of(config: OfflineConfig, pairs: Examples) -> Iterator[list[int]]:
    """The run's batches up to the one with which all pairs have been seen; with a constant rate, beyond its end too."""
    seen = torch.zeros(len(pairs), dtype=torch.bool)
    order = batches(pairs, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    for rows in order if config.optim.schedule == "constant" else islice(order, total_steps(config, pairs)):
        yield rows
        seen[rows] = True
        if bool(seen.all()):
            return


def _as_reference(trained: TrainedModel, config: OfflineConfig) -> AbstractContextManager[None]:
    return adapters_off(trained.role.model) if config.model.lora.rank else nullcontext()
