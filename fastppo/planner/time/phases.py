"""The phases of a step: what each takes, and what all phases are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from fastppo.config import AnyConfig
from fastppo.planner.constants.values import Constants, Seconds
from fastppo.planner.machine import Machine
from fastppo.planner.memory import Role
from fastppo.planner.time.collectives import Group, Zero, exchanged
from fastppo.planner.time.passes import Passes
from fastppo.planner.time.work import Work

# What a phase is made of, in the order of the table.
PARTS = (
    *("products", "attention", "memory", "launches"),  # kernels, and what lies between them
    "collectives",  # of ZeRO, and of vLLM
    "exchange",  # of ranks that share sequences
    "copies",  # between GPU, host and NVMe
    "optimizer",
    "waiting",  # for functions and services
    "hidden",  # of these what runs beside something else, negative
)


@dataclass(frozen=True)
class Lengths:
    """What the settings do not say of a run. All prompts are as long as their mean, and so are all responses."""

    prompt: int  # tokens
    response: int
    reward_seconds: float = 0.0  # that functions and services take for the responses of a step

    @property
    def whole(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: Seconds
    work: Work  # of a rank's kernels


@dataclass(frozen=True)
class Step:
    """The seconds of a step on the slowest rank."""

    phases: tuple[Phase, ...]
    tokens: float  # that all ranks write or learn from in it
    unit: str  # what these are
    beside: float = 0.0  # seconds of functions and services that run beside learning, a step ahead

    @property
    def seconds(self) -> float:
        return sum(phase.seconds.total for phase in self.phases) - self.beside

    @property
    def work(self) -> Work:
        return sum((phase.work for phase in self.phases), Work())

    @property
    def parts(self) -> dict[str, float]:
        whole = sum((phase.seconds for phase in self.phases), Seconds())
        return {name: whole.parts.get(name, 0.0) for name in PARTS}

    @property
    def slowest(self) -> tuple[str, float]:
        """What takes the most seconds, and its share of the step."""
        name = max((name for name in PARTS if name != "hidden"), key=lambda part: self.parts[part])
        return name, self.parts[name] / self.seconds if self.seconds else 0.0


@dataclass
class Tally:
    """Adds up a phase: work of kernels, and seconds of everything else."""

    constants: Constants
    seconds: Seconds = field(default_factory=Seconds)
    work: Work = field(default_factory=Work)

    def add(self, work: Work, times: float = 1, *, in_graph: bool = False) -> None:
        self.work += times * work
        self.seconds += times * self.constants.of_work(work, in_graph=in_graph)

    def include(self, other: Tally, times: float) -> None:
        """What another has added up, so many times."""
        self.work += times * other.work
        self.seconds += times * other.seconds

    def spend(self, seconds: Seconds, times: float = 1) -> None:
        self.seconds += times * seconds

    def phase(self, name: str) -> Phase:
        return Phase(name, self.seconds, self.work)

    def hide(self, before: Seconds) -> None:
        """Let collectives and copies since `before` run beside the kernels since then, as far as the machine can."""
        compute = self.seconds.of(*PARTS[:4]) - before.of(*PARTS[:4])
        beside = self.seconds.of("collectives", "copies") - before.of("collectives", "copies")
        if beside:
            self.seconds += Seconds({"hidden": -min(self.constants["hidden"] * beside, compute)})


@dataclass(frozen=True)
class Rank:
    """What one rank computes with one role, in seconds."""

    role: Role
    config: AnyConfig
    machine: Machine
    constants: Constants

    @cached_property
    def passes(self) -> Passes:
        return Passes(self.role.size, sequence=self.sequence)

    @cached_property
    def zero(self) -> Zero:
        return Zero(self.role, self.config, self.machine)

    @property
    def sequence(self) -> int:
        return int(getattr(self.config, "sequence_ranks", 1))

    @property
    def recomputed(self) -> int:
        return self.config.optim.recomputed_layers(self.role.size.layers)

    def asks(self, tally: Tally, sequences: int, length: int, head: Work, *, depth: int | None = None) -> None:
        """A pass without gradient, and its head. depth: of the layers from above; None: all."""
        before = tally.seconds
        tally.add(self.passes.forward(sequences, length, depth))
        tally.add(head)
        tally.spend(self.zero.forward(self.constants))
        tally.hide(before)
        self._exchange(tally, sequences * length, 1)

    def learns(self, tally: Tally, sequences: int, length: int, head: Work, *, kept: bool) -> None:
        """A microbatch forward and backward. kept: whether the outputs of frozen lower layers are there."""
        before = tally.seconds
        tally.add(self.passes.learn(sequences, length, kept=kept, recomputed=self.recomputed))
        tally.add(head)
        tally.spend(self.zero.learn(self.constants))
        tally.hide(before)
        self._exchange(
            tally, sequences * length, 2 + min(self.recomputed, self.role.size.layers) / self.role.size.layers
        )

    def _exchange(self, tally: Tally, tokens: int, times: float) -> None:
        if self.sequence > 1:
            nodes = max(1, self.sequence // self.machine.gpus)
            group = Group(self.sequence, nodes)
            sent = exchanged(self.role, tokens, group)
            tally.spend(Seconds({"exchange": times * group.seconds(sent, self.constants)}))


def groups_of(config: AnyConfig, machine: Machine) -> int:
    """Among how many ranks, or groups of ranks that share sequences, an update is divided."""
    return max(machine.ranks // int(getattr(config, "sequence_ranks", 1)), 1)


def microbatches(sequences: int, length: int, budget: int) -> Iterator[tuple[int, int]]:
    """(sequences of a microbatch, how many such microbatches) of a rank's sequences of an update, as `pack_even`
    spreads sequences of equal length: the fewest microbatches, which differ by one sequence at most."""
    if not sequences:
        return
    count = -(-sequences // max(budget // length, 1))
    fewer, more = divmod(sequences, count)
    if more:
        yield fewer + 1, more
    if count > more and fewer:
        yield fewer, count - more
