"""What all offline methods share: updates on packed examples, and where such a run is."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastppo.checkpoint import State, random_state, seed_random
from fastppo.config import QUIET_STEPS, OfflineConfig, TrainingConfig
from fastppo.data import Examples, Packed, pack_even
from fastppo.distributed import World, stop, sum_groups
from fastppo.errors import TrainingFault
from fastppo.models import PrefixStates
from fastppo.monitor import Alarm
from fastppo.offline.model import TrainedModel

log = logging.getLogger("fastppo")


class Objective(Protocol):
    """What an offline method learns from a microbatch.

    Where ranks split its tokens (`parallel.sequence`), each calls the objective with the states of its own rows, and
    the head gives the numbers of all rows.
    """

    def __call__(
        self, role: Any, hidden: Tensor, /, *, packed: Packed, examples: Examples, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of the loss over these examples, and statistics (k,) fp32 that add up over microbatches.

        role: a Policy, whose head gives logprobs, or a RewardModel, whose head gives scores; hidden (R, H): the states
        that its head reads, at each response token of a policy, at the last token of each sequence of a reward model;
        packed: the sequences; part: which of `examples` these are, int64.
        """


@dataclass(frozen=True)
class Watched:
    """A figure of an update that is to stay within a level."""

    figure: str
    value: float
    level: float  # the highest, or the lowest if that is negative
    message: str  # of the alarm if it is beyond

    @property
    def is_beyond(self) -> bool:
        return self.value < self.level if self.level < 0 else self.value > self.level


@dataclass
class Training:
    """A run after `step` updates. The data's order is a function of seed and step, so it needs no state."""

    step: int = 0  # updates done
    skipped: int = 0  # updates in a row that were not applied
    start: float = math.inf  # held-out loss before training
    best: float = math.inf  # lowest held-out loss of a trained model
    best_step: int = -1  # where that was; -1 before the first evaluation of one
    waited: int = 0  # evaluations since the lowest loss of all, the start's included
    evaluated: int = -1  # after which update the last evaluation was
    raised: dict[str, int] = field(default_factory=dict)  # figure -> the step of its last alarm
    within: dict[str, int] = field(default_factory=dict)  # figure -> the last step that was not beyond its level
    random: State = field(default_factory=random_state)

    @staticmethod
    def begin(seed: int, rank: int) -> Training:
        seed_random(seed, rank)
        return Training()

    @property
    def name(self) -> str:
        """Names sort as runs proceed."""
        return f"step-{self.step:08d}"

    @property
    def score(self) -> float | None:
        """What `checkpoint.keep_best` compares: the higher the better; None where this step was not evaluated best."""
        return -self.best if self.best_step == self.step else None

    @property
    def good(self) -> None:
        """Nothing here goes back."""

    def add_evaluation(self, loss: float) -> bool:
        """Whether the held-out loss is the lowest of a trained model so far.

        The start is not exported if nothing is better: it is there already, and a new score head scores at random.
        """
        self.evaluated, self.random = self.step, random_state()
        if self.step == 0:
            self.start = loss
            return False
        self.waited = 0 if loss < min(self.start, self.best) else self.waited + 1
        better = loss < self.best
        if better:
            self.best, self.best_step = loss, self.step
        return better

    def is_done(self, patience: int | None) -> bool:
        """Whether so many evaluations have passed without a lower held-out loss."""
        return patience is not None and self.waited >= patience

    def alarms(self, watched: Sequence[Watched]) -> list[Alarm]:
        """The alarms of the step that ends now, each at most once in `QUIET_STEPS` steps, as PPO's are."""
        found, step = [], self.step + 1
        for figure in watched:
            if not figure.is_beyond:
                self.within[figure.figure] = step
            elif step - self.raised.get(figure.figure, -QUIET_STEPS) >= QUIET_STEPS:
                self.raised[figure.figure] = step
                good = self.within.get(figure.figure, 0)
                found.append(Alarm(step, figure.figure, figure.value, figure.level, "warn", None, good, figure.message))
        return found

    def end_step(self, skipped: int) -> None:
        self.step, self.skipped, self.random = self.step + 1, skipped, random_state()

    def state(self) -> State:
        """Plain values, the same on every rank; `random` is each rank's own."""
        return {name: value for name, value in vars(self).items() if name != "random"}

    def restore(self, state: State, own: State) -> None:
        """What `state` gave; own: this rank's `random`."""
        vars(self).update(state, random=own)


@dataclass(frozen=True)
class Update:
    """What one batch did."""

    sums: Tensor  # (k,) fp64, the objective's statistics over all ranks
    gradient_norm: float  # before clipping
    learning_rate: float
    skipped: int  # updates in a row, this one included, that were not applied: the gradient was not finite

    def metrics(self) -> dict[str, float]:
        return {"grad_norm": self.gradient_norm, "lr": self.learning_rate, "skipped_updates": float(self.skipped > 0)}


def total_steps(config: OfflineConfig, examples: Examples) -> int:
    """Updates of the run."""
    return config.steps if config.steps is not None else -(-config.epochs * len(examples) // config.batch_size)


def microbatches_of(
    rows: Sequence[int], examples: Examples, config: TrainingConfig, world: World
) -> tuple[Tensor, ...]:
    """The share of a batch that this rank's group has, in microbatches of examples; each has as many. No example is in
    two of them."""
    return pack_even(torch.tensor(rows), examples.lengths, config.microbatch_tokens, world.groups)[
        world.group :: world.groups
    ]


def update(
    trained: TrainedModel,
    examples: Examples,
    rows: Sequence[int],
    objective: Objective,
    prefix: PrefixStates,
    config: TrainingConfig,
    *,
    normalizer: int,
    rate: float,
    step: int,
    skipped: int,
    world: World,
) -> Update:
    """One step on the examples `rows`, over all ranks. The loss is the objective's sum over them, over `normalizer`.

    rate: the learning rate; step: of the run, counted from 0, for messages; skipped: updates in a row before this one
    that were not applied. Raises TrainingFault when they become too many.
    """
    engine, total = trained.engine, torch.zeros((), dtype=torch.float64, device=world.device)
    mine = microbatches_of(rows, examples, config, world)
    for i, part in enumerate(mine):
        stop.check(world)
        packed, prefix_states = trained.select(examples, part, prefix)
        loss, sums = engine(packed, partial(objective, packed=packed, examples=examples, part=part), prefix_states)
        # engines average gradients over ranks, and the loss is to be a mean over the examples of all of them
        engine.backward(loss * world.ranks / normalizer, last=i + 1 == len(mine))
        total = total + sums.detach().double()
    norm, totals = engine.gradient_norm(), sum_groups(total, world).cpu()
    finite = math.isfinite(norm) and bool(totals.isfinite().all())
    engine.step([rate, rate], apply=finite)
    if not finite:
        skipped = _note_fault(norm, skipped + 1, step, config)
    return Update(totals, norm, rate, skipped if not finite else 0)


def _note_fault(norm: float, skipped: int, step: int, config: TrainingConfig) -> int:
    log.warning("step %d is not applied, as its loss or gradient (norm %.4g) is not finite", step + 1, norm)
    if skipped > config.optim.max_skipped:
        raise TrainingFault(
            f"{skipped} updates in a row had a loss or gradient that is not finite, and optim.max_skipped is"
            f" {config.optim.max_skipped}. A lower {config.names.learning_rate} or optim.max_grad_norm often helps."
        )
    return skipped


def recall_prefix(
    trained: TrainedModel,
    examples: Examples,
    done: Sequence[Sequence[int]],
    config: OfflineConfig,
    world: World,
) -> PrefixStates:
    """The outputs of the frozen prefix for the batches `done`, computed in the same microbatches, bit for bit.

    Where not all of it fits `keep_trunk_gb`, or nothing is to be kept, each microbatch computes its own.
    """
    needed = len(examples.packed.tokens) * trained.bytes_of_state / 1e9
    if needed > config.keep_trunk_gb or not trained.role.prefix_depth:
        return PrefixStates(keep=False)
    prefix = PrefixStates()
    for rows in done:
        for part in microbatches_of(rows, examples, config, world):
            trained.select(examples, part, prefix)
    return prefix
