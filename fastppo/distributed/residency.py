"""The parts of a run that are in GPU memory in each phase of a step, by the table in `uses`.

The memory plan (`fastppo.planner.online_memory`) uses the same table. A part that a phase does not use is moved to host
memory until a phase needs it again; the kinds in `REMADE` are freed instead, because they are computed again each time.
Moving out frees the storage of a tensor and moving in fills a new one, so all views of the tensor in DeepSpeed and
autograd remain valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

# The kinds of `uses` whose values are not preserved outside of their phases, and that are zeros when they are moved in:
# sampling first fills the gathered copy of the actor, and every update sums its gradients from zero.
REMADE = frozenset({"sampling_weights", "gradients"})


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


class HasStates(Protocol):
    """A role, or a part of one, whose tensors can be moved out of the GPU."""

    def states(self) -> Iterable[Tensor]: ...


@runtime_checkable
class Sleeper(Protocol):
    """A part of a run that manages memory of its own on the GPU."""

    def sleep(self) -> None:
        """Give the memory up, and with it what it holds."""

    def wake(self) -> None:
        """Take memory again."""


@dataclass
class _Part:
    kind: str
    states: Callable[[], Iterable[Tensor]]
    preserve: bool  # whether its values are preserved when it is moved out; else it contains zeros afterwards
    # while it is moved out: (host copy, storage, bytes of the storage) of each tensor
    moved_out: list[tuple[Tensor, torch.UntypedStorage, int]] | None = None

    def move_out(self) -> None:
        self.moved_out = []
        seen: set[int] = set()
        for tensor in self.states():
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in seen:  # an empty partition, or a tied parameter
                continue
            seen.add(storage.data_ptr())
            host = torch.empty(storage.nbytes() if self.preserve else 0, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            if self.preserve:
                host.copy_(_bytes(storage))
            self.moved_out.append((host, storage, storage.nbytes()))
            storage.resize_(0)

    def move_in(self) -> None:
        assert self.moved_out is not None
        for host, storage, size in self.moved_out:
            storage.resize_(size)
            if self.preserve:
                _bytes(storage).copy_(host, non_blocking=True)
            else:
                _bytes(storage).zero_()
        self.moved_out = None


@dataclass
class _SleepingPart:
    """As `_Part`, for an owner that moves its own memory."""

    kind: str
    owner: Sleeper
    moved_out: list[object] | None = None

    def states(self) -> list[Tensor]:
        return []

    def move_out(self) -> None:
        self.owner.sleep()
        self.moved_out = []

    def move_in(self) -> None:
        self.owner.wake()
        self.moved_out = None


class Residency:
    """Moves the parts of a run between GPU and host when a phase begins. Without a GPU nothing is moved."""

    def __init__(self, device: torch.device, *, loss_reads_reference: bool = False):
        self._uses, self._device = uses(loss_reads_reference=loss_reads_reference), device
        self._moves = device.type != "cpu"
        self._parts: list[_Part | _SleepingPart] = []
        self.phase = "loading"  # whose parts are on the GPU

    def add(self, kind: str, owner: HasStates) -> None:
        """Add a part of a kind of `uses`. If the current phase does not use it, it is moved out at once."""

        def on_device() -> list[Tensor]:
            return [x for x in owner.states() if x.device.type == self._device.type]

        self._parts.append(_Part(kind, on_device, kind not in REMADE))
        self.enter(self.phase)

    def add_sleeper(self, kind: str, owner: Sleeper) -> None:
        """As `add`, for an owner that moves its own memory; it sleeps at once if the current phase does not use it."""
        self._parts.append(_SleepingPart(kind, owner))
        self.enter(self.phase)

    @contextmanager
    def holding(self, phase: str) -> Iterator[None]:
        """Within this context the parts that the phase uses are on the GPU; they stay until another phase begins."""
        self.enter(phase)
        yield

    def enter(self, phase: str) -> None:
        """Move the parts that this phase uses to the GPU, and all others out of it."""
        self.phase = phase
        if not self._moves:
            return
        for part in self._parts:  # first out, to free memory
            if part.kind not in self._uses[phase] and part.moved_out is None:
                part.move_out()
        for part in self._parts:
            if part.kind in self._uses[phase] and part.moved_out is not None:
                part.move_in()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
