"""Where a ReST run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from fastppo.checkpoint import State, random_state, seed_random
from fastppo.config import RestConfig
from fastppo.data import Measured, Packed
from fastppo.offline import Update
from fastppo.online import Progress


@dataclass
class Improved:
    """What an Improve has done so far."""

    kept: int  # responses that it learns from
    prompts: int  # that have at least one of them
    threshold: float
    updates: int = 0
    tokens: int = 0  # of responses and demonstrations, in all updates
    loss: float = 0.0  # summed over these tokens, nats
    gradient_norm: float = 0.0  # summed over updates
    unapplied: int = 0  # updates whose loss or gradient was not finite

    def add(self, update: Update, tokens: int) -> None:
        """Count an update on so many tokens; the loss and gradient of one that was not applied do not count."""
        self.updates += 1
        if update.skipped:
            self.unapplied += 1
        else:
            self.tokens += tokens
            self.loss += float(update.sums[0])
            self.gradient_norm += update.gradient_norm


@dataclass
class RestProgress(Progress):
    """A run after `step` Grows with their Improves, and as far as it is with the next.

    Data order, sampling and the order of learning are functions of the seed and of numbers that stand here.
    """

    updates: int = 0  # of the whole run, for the warm-up and the demonstrations
    grown: list[Measured] = field(default_factory=list)  # batches of the next step's Grow
    improves: list[Improved] = field(default_factory=list)  # of the next step, the last one perhaps not done

    @staticmethod
    def begin(config: RestConfig, rank: int) -> RestProgress:
        seed_random(config.seed, rank)
        return RestProgress()

    @property
    def within_step(self) -> str:
        if self.improves:
            return f"-update-{sum(improve.updates for improve in self.improves):06d}"
        return f"-grow-{len(self.grown):06d}" if self.grown else ""

    def add_batch(self, batch: Measured) -> None:
        self.grown.append(batch)
        self.random = random_state()

    def end_step(self) -> None:
        self.step += 1
        self.grown, self.improves, self.random = [], [], random_state()

    def state(self) -> State:
        return super().state() | {
            "updates": self.updates,
            "grown": [_plain(batch) for batch in self.grown],
            "improves": [asdict(improve) for improve in self.improves],
        }

    def restore(self, state: State, own: State) -> None:
        super().restore(state, own)
        self.updates = state["updates"]
        self.grown = [Measured(**batch | {"packed": Packed(**batch["packed"])}) for batch in state["grown"]]
        self.improves = [Improved(**improve) for improve in state["improves"]]


def _plain(batch: Measured) -> State:
    packed = {f.name: getattr(batch.packed, f.name) for f in fields(Packed)}
    return {f.name: getattr(batch, f.name) for f in fields(Measured)} | {"packed": packed}
