"""What checkpoints save of a run: where it is, and the generators that its reward functions may draw from."""

from __future__ import annotations

import random
from typing import Any, Protocol

import numpy
import torch

State = dict[str, Any]


def random_state() -> State:
    """The state of every generator of this process that a reward function could use; the run's own depend on step and
    seed alone."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def seed_random(seed: int, rank: int) -> None:
    """Begin each of those generators at a place of its own for every rank."""
    random.seed(f"{seed}/{rank}")
    number = random.getrandbits(32)
    numpy.random.seed(number)
    torch.manual_seed(number)


def set_random_state(state: State) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Run(Protocol):
    """What checkpoints save: `Progress` of PPO, `Training` of SFT and reward modelling."""

    step: int
    random: State

    @property
    def name(self) -> str: ...

    @property
    def score(self) -> float | None: ...

    @property
    def good(self) -> int | None:
        """The step that an alarm would go back to, or before it; None if none would."""

    def state(self) -> State: ...

    def restore(self, state: State, own: State) -> None: ...
