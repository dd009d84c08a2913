"""The parts of a run that are in GPU memory in each phase of a step, by the table in `uses` and the plan's choice.

A part that a phase uses is there. Whether it is there in the other phases too is the plan's choice, a `Placement`
(`fastppo.planner.placement`), of which plan and run have the same one: where all parts fit at once nothing is moved.
Without a plan a part is there only in the phases that use it. Kinds in `REMADE` are freed rather than moved, as they
are computed again each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastppo.distributed.moves import HasStates, MovedPart, PartName, SideStream, Sleeper, SleepingPart

# The kinds of `uses` whose values are not preserved outside of their phases, and that are zeros when they are moved in:
# sampling first fills the gathered copy of the actor, and every update sums its gradients from zero.
REMADE = frozenset({"sampling_weights", "gradients"})
# The kinds whose values never change. Their copy in the host's memory stays there.
FROZEN = frozenset({"reference", "rewards", "sampled"})
# The kinds that give their own memory up, and take it again; they do so wherever there is room or not.
SLEEPING = frozenset({"sampler"})

# The phase after one that is followed by no other; after the others `Residency.enter` is told if it is known.
NEXT = {"sampling": "feedback"}


def uses(*, loss_reads_reference: bool) -> dict[str, set[str]]:
    """The kinds of parts that each phase reads or writes. `sampled` is a model to sample from that does not train.

    Trained parameters are in no set: at ZeRO stages 0 to 2 every phase but feedback reads them, and at ZeRO stage 3 a
    rank has only its partition of them, which `zero.offload_parameters` may move to the host.
    """
    learning = {"optimizers", "gradients"} | ({"reference"} if loss_reads_reference else set())
    return {
        "loading": set(),
        "sampling": {"sampler", "sampling_weights", "sampled"},
        "feedback": {"rewards"},
        "experience": {"reference"},
        "learning": learning,
        "health": learning,  # it uses none of them and takes milliseconds, so nothing is moved
        "checkpoint": {"optimizers"},  # written and read between two updates
        "export": {"sampling_weights"},
    }


@dataclass(frozen=True)
class Placement:
    """The phases in which each part is on the GPU."""

    uses: Mapping[str, set[str]]  # as the function gives it
    # Parts that are there in some phases only; None: all of them, in the phases that use them.
    moved: frozenset[PartName] | None = None
    # By phase the moved parts that are there though it does not use them: the next phase does, or the last one did, and
    # there is room to copy them while this one computes.
    beside: Mapping[str, frozenset[PartName]] = field(default_factory=dict)

    def uses_in(self, phase: str, part: PartName) -> bool:
        return part[0] in self.uses[phase]

    def holds(self, phase: str, part: PartName) -> bool:
        """Whether the part may be on the GPU in this phase."""
        if self.uses_in(phase, part) or part in self.beside.get(phase, ()):
            return True
        return self.moved is not None and part not in self.moved and part[0] not in SLEEPING

    def copied(self, part: PartName) -> bool:
        """Whether the host has memory for the part's values, in all phases."""
        return part[0] not in REMADE and (self.moved is None or part in self.moved)


class Residency:
    """Moves the parts of a run between GPU and host when a phase begins. Without a GPU nothing is moved."""

    def __init__(self, device: torch.device, placement: Placement | None = None):
        """placement: of the plan; without one a part is there only while it is used, and no loss reads a reference."""
        self._placement, self._device = placement or Placement(uses(loss_reads_reference=False)), device
        self._moves = device.type != "cpu"
        self._side = SideStream(device)
        self._parts: list[MovedPart | SleepingPart] = []
        self.phase = "loading"  # whose parts are on the GPU

    def add(self, kind: str, owner: HasStates, role: str) -> None:
        """Add a part of a kind of `uses`, of a role as the plan names it. If it is not to be on the GPU in the current
        phase, it is moved out at once."""

        def on_device() -> list[Tensor]:
            return [x for x in owner.states() if x.device.type == self._device.type]

        part = MovedPart((kind, role), on_device, self._side, preserve=kind not in REMADE, frozen=kind in FROZEN)
        self._parts.append(part)
        self.enter(self.phase)

    def add_sleeper(self, kind: str, owner: Sleeper) -> None:
        """As `add`, for an owner that moves its own memory; it sleeps at once if the current phase does not use it."""
        self._parts.append(SleepingPart((kind, ""), owner))
        self.enter(self.phase)

    @contextmanager
    def holding(self, phase: str, then: str | None = None) -> Iterator[None]:
        """Within this context the parts that the phase uses are on the GPU; they stay until another phase begins.

        then: the phase that follows, if it is known. What that one uses is brought in while this one computes, if the
        placement has room for it.
        """
        self.enter(phase, then)
        yield

    def enter(self, phase: str, then: str | None = None) -> None:
        """Bring the parts that this phase uses to the GPU, and move out those that have no room beside them.

        then: see `holding`.
        """
        self.phase, table, following = phase, self._placement, then or NEXT.get(phase)
        if not self._moves:
            return
        for part in self._parts:  # first out, to free memory
            if not part.moved_out and not table.holds(phase, part.name):
                part.move_out()
        used = [part for part in self._parts if table.uses_in(phase, part.name)]
        for part in used:
            if part.moved_out:
                part.move_in(beside=False)
            part.use()
        if following is not None:
            self._begin_copies(phase, following)

    def _begin_copies(self, phase: str, following: str) -> None:
        """Begin to copy, while this phase computes, what the phase that follows uses or has no room for."""
        table = self._placement
        for part in self._parts:
            if table.uses_in(phase, part.name) or not table.holds(phase, part.name):
                continue
            if part.moved_out and table.uses_in(following, part.name):
                part.move_in(beside=True)
            elif not part.moved_out and not table.holds(following, part.name):
                part.copy_out(beside=True)
