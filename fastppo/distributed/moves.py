"""Moves of a part of a run between GPU and host: what is copied, on which stream, and when memory is free again.

Moving out frees the storage of a tensor and moving in fills a new one, so all views of the tensor in DeepSpeed and
autograd remain valid.

There are two streams of work on a GPU, the one that computes and one for copies beside it. Why no copy reads or writes
memory that the other stream uses:

- A copy beside computing begins after all that was computed before (`SideStream.begin` waits), so it reads what the
  last computation wrote, and it fills memory that no earlier computation still reads: PyTorch's allocator may hand out
  a block of the computing stream while kernels of that stream are still reading it.
- What a phase uses is waited for when the phase begins, and what it does not use nothing reads or writes. So a copy
  beside a phase is of a part that this phase does not use.
- Memory is freed only when the computing stream waits for the copy that reads or fills it. The allocator hands a freed
  block to the stream that it was allocated for, which is the computing one, in that stream's order: what is computed in
  it comes after the wait. Therefore no `record_stream` is needed, and the memory can be used again at once.
- A host copy is written and read by copies alone. Those of the side stream are in order, and there is one of the
  computing stream only of a part that was used, or whose memory was freed, and so was waited for.

The host waits for none of these: pinned memory is copied without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

PartName = tuple[str, str]  # a kind of `residency.uses`, and the role that has it, as the memory plan names it

LEAST_PIECE = 1 << 20  # bytes


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


class SideStream:
    """The stream of copies beside computing. On the CPU there is none: a copy is done when `begin` returns."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, copy: Callable[[], None]) -> torch.cuda.Event | None:
        """Queue copies, after all that was computed so far; returns what `wait` is to wait for."""
        if self._stream is None:
            copy()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy()
            copied: torch.cuda.Event = self._stream.record_event()
            return copied

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let what is computed from here on wait for the copies. The host goes on."""
        if self._stream is not None and copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(copied)


@dataclass
class MovedPart:
    """A part whose tensors are moved."""

    name: PartName
    states: Callable[[], Iterable[Tensor]]
    side: SideStream
    preserve: bool  # whether its values are preserved when it is moved out; else it contains zeros afterwards
    frozen: bool  # whether its values never change, so that it is copied to the host once
    moved_out: bool = False
    copied: bool = False  # whether the host copy has its present values
    _storages: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)  # each with its bytes
    _host: list[list[Tensor]] = field(default_factory=list)  # the host copy of each storage, in pieces
    _beside: list[torch.cuda.Event | None] = field(default_factory=list)  # copies that were not waited for

    @property
    def host_bytes(self) -> int:
        """Host memory that it takes, also while it is on the GPU."""
        return sum(piece.nbytes for pieces in self._host for piece in pieces)

    def copy_out(self, *, beside: bool) -> None:
        """Make the host copy, if its values are to be preserved and it has not got them. beside: while the GPU computes
        what neither changes nor frees the part."""
        if self.copied and self.preserve:
            return
        self._storages = list(self._found())
        if not self.preserve:
            return
        self.copied = True
        for i, (storage, size) in enumerate(self._storages):
            if i == len(self._host) or sum(piece.nbytes for piece in self._host[i]) != size:
                self._host[i:] = [_host_memory(size, pinned=storage.device.type == "cuda")]
        del self._host[len(self._storages) :]
        self._copy(self._to_host, beside=beside)

    def move_out(self) -> None:
        """Free its memory on the GPU."""
        self.copy_out(beside=False)
        self.wait()
        for storage, _ in self._storages:
            storage.resize_(0)
        self.moved_out = True

    def move_in(self, *, beside: bool) -> None:
        """Take memory on the GPU again and fill it. beside: while the GPU computes; `wait` comes before its use."""
        for storage, size in self._storages:
            storage.resize_(size)
        self.moved_out = False
        self._copy(self._from_host if self.preserve else self._zero, beside=beside)

    def wait(self) -> None:
        """Let what is computed from here on find it complete, and what is freed from here on be read by no copy."""
        while self._beside:
            self.side.wait(self._beside.pop(0))

    def use(self) -> None:
        """It is used from here on, and so may change."""
        self.wait()
        self.copied = self.copied and self.frozen

    def _copy(self, copy: Callable[[], None], *, beside: bool) -> None:
        if beside:
            self._beside.append(self.side.begin(copy))
        else:
            copy()

    def _found(self) -> Iterable[tuple[torch.UntypedStorage, int]]:
        seen: set[int] = set()
        for tensor in self.states():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:  # else an empty partition, or a tied parameter
                seen.add(storage.data_ptr())
                yield storage, storage.nbytes()

    def _to_host(self) -> None:
        for (storage, _), pieces in zip(self._storages, self._host, strict=True):
            for piece, values in zip(pieces, _bytes(storage).split([p.nbytes for p in pieces]), strict=True):
                piece.copy_(values, non_blocking=True)

    def _from_host(self) -> None:
        for (storage, _), pieces in zip(self._storages, self._host, strict=True):
            for piece, values in zip(pieces, _bytes(storage).split([p.nbytes for p in pieces]), strict=True):
                values.copy_(piece, non_blocking=True)

    def _zero(self) -> None:
        for storage, _ in self._storages:
            _bytes(storage).zero_()


@dataclass
class SleepingPart:
    """As `MovedPart`, for an owner that moves its own memory; nothing is done beside."""

    name: PartName
    owner: Sleeper
    moved_out: bool = False

    def states(self) -> list[Tensor]:
        return []

    def copy_out(self, *, beside: bool) -> None: ...

    def move_out(self) -> None:
        self.owner.sleep()
        self.moved_out = True

    def move_in(self, *, beside: bool) -> None:
        self.owner.wake()
        self.moved_out = False

    def use(self) -> None: ...


def _host_memory(size: int, *, pinned: bool) -> list[Tensor]:
    """Bytes in pieces of falling powers of two.

    PyTorch rounds a block of pinned memory up to a power of two (`CachingHostAllocator`), which for one block of 9 GB
    would be 17 GB.
    """
    pieces = []
    while size:
        piece = size if size <= LEAST_PIECE else 1 << (size.bit_length() - 1)
        pieces.append(torch.empty(piece, dtype=torch.uint8, pin_memory=pinned))
        size -= piece
    return pieces


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
