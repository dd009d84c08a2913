"""The state of a run in a checkpoint: its progress, and the random generators that reward functions may use."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch

from fastppo.distributed import World

log = logging.getLogger("fastppo")

State = dict[str, Any]


def random_state() -> State:
    """The states of this process's global random generators, which a reward function may use.

    The trainer's random numbers depend on step and seed only and need no state.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def seed_random(seed: int | str, rank: int) -> None:
    """Seed the global random generators, with a different sequence on every rank."""
    random.seed(f"{seed}/{rank}")
    number = random.getrandbits(32)
    numpy.random.seed(number)
    torch.manual_seed(number)


def set_random_state(state: State) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # of as many GPUs as the machine had then
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def saved_random_state(checkpoint: Path, ranks: int, seed: int, world: World) -> State:
    """This rank's random state in a checkpoint of so many ranks.

    A rank that did not exist then begins with a state of its own, seeded from the run's seed, where the checkpoint is
    (the name of its folder), and the rank. States of ranks that there are no more are dropped. Both are logged. Changes
    the global generators.
    """
    if ranks != world.ranks and world.rank == 0:
        rule = f"begin anew, seeded from (seed {seed}, {checkpoint.name}, rank)"
        first, last, change = (ranks, world.ranks, rule) if ranks < world.ranks else (world.ranks, ranks, "are dropped")
        named = f"rank {first}" if last - first == 1 else f"ranks {first} to {last - 1}"
        log.warning("the random generators that a reward function may use: those of %s %s", named, change)
    if world.rank < ranks:
        state: State = torch.load(checkpoint / f"rank-{world.rank:05d}.pt", weights_only=False)
        return state
    seed_random(f"{seed}/{checkpoint.name}", world.rank)
    return random_state()


class Run(Protocol):
    """The interface of what checkpoints save: `Progress` in PPO, `Training` in SFT and reward modelling."""

    step: int
    random: State

    @property
    def name(self) -> str: ...

    @property
    def score(self) -> float | None: ...

    @property
    def good(self) -> int | None:
        """The last step whose checkpoint an alarm could roll back to; None if no alarm rolls back."""

    def state(self) -> State: ...

    def restore(self, state: State, rank_state: State) -> None: ...
