"""What occupies the GPU in each stage. The table in `uses` decides, here and in `fastppo.planner.ppo_memory`.

What a stage does not use rests in the host's memory until one comes that does, or is given up where it is made anew
each time (`REMADE`). Moving out frees the storage below a tensor and moving in fills a new one, so that every view that
DeepSpeed or autograd has of it stays good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastppo.config import Config

# The kinds of `uses` of which nothing is kept while they are away, and that come back as zeros: whoever samples fills
# the copy to sample from first, and every update adds up its gradients from zero.
REMADE = frozenset({"gathered", "gradients"})


def uses(config: Config) -> dict[str, set[str]]:
    """What each stage reads or writes.

    Trained parameters are in no list: at ZeRO stages 0 to 2 every stage but feedback reads them, and at stage 3 a rank
    has a small part of them, which `zero.offload_parameters` keeps on the host.
    """
    learning = {"optimizers", "gradients"} | ({"reference"} if config.ppo.loss_reads_reference else set())
    return {
        "loading": set(),
        "sampling": {"gathered"},
        "feedback": {"rewards"},
        "experience": {"reference"},
        "learning": learning,
        "health": learning,  # it needs nothing, and nothing is to move for its milliseconds
        "checkpoint": {"optimizers"},  # written and read between two updates
    }


class HasStates(Protocol):
    """A role, or a part of one, that can leave the GPU."""

    def states(self) -> Iterable[Tensor]: ...


@dataclass
class _Part:
    kind: str
    states: Callable[[], Iterable[Tensor]]
    keep: bool  # whether what it holds must be the same when it comes back; else it comes back as zeros
    away: list[tuple[Tensor, torch.UntypedStorage, int]] | None = None  # host copy, storage, its bytes

    def leave(self) -> None:
        self.away = []
        seen: set[int] = set()
        for tensor in self.states():
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in seen:  # empty at a rank without a part, or tied
                continue
            seen.add(storage.data_ptr())
            host = torch.empty(storage.nbytes() if self.keep else 0, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            if self.keep:
                host.copy_(_bytes(storage))
            self.away.append((host, storage, storage.nbytes()))
            storage.resize_(0)

    def come(self) -> None:
        assert self.away is not None
        for host, storage, size in self.away:
            storage.resize_(size)
            if self.keep:
                _bytes(storage).copy_(host, non_blocking=True)
            else:
                _bytes(storage).zero_()
        self.away = None


class Residency:
    """Moves the parts of a run between GPU and host as the stages change. Without a GPU there is nothing to move."""

    def __init__(self, config: Config, device: torch.device):
        self._uses, self._device = uses(config), device
        self._moves = device.type != "cpu"
        self._parts: list[_Part] = []
        self._stage = "loading"

    def add(self, kind: str, owner: HasStates) -> None:
        """kind: as in `uses`. What the stage of now does not use leaves at once, to make room for what loads next."""

        def on_device() -> list[Tensor]:
            return [x for x in owner.states() if x.device.type == self._device.type]

        self._parts.append(_Part(kind, on_device, kind not in REMADE))
        self.enter(self._stage)

    @contextmanager
    def holding(self, phase: str) -> Iterator[None]:
        """Within this context what the phase uses is on the GPU. It stays there until another phase is entered."""
        self.enter(phase)
        yield

    def enter(self, stage: str) -> None:
        """From here on only what this stage uses is on the GPU, whatever was there before."""
        self._stage = stage
        if not self._moves:
            return
        for part in self._parts:  # what leaves makes room for what comes
            if part.kind not in self._uses[stage] and part.away is None:
                part.leave()
        for part in self._parts:
            if part.kind in self._uses[stage] and part.away is not None:
                part.come()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
