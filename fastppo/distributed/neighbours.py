"""Ranks that do something together, apart from all others.

They are those whose GPUs hold one copy of a model to sample from, or those that read whole sequences together
(`parallel.sequence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastppo.distributed.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Neighbours:
    """`size` consecutive ranks, this one among them, with collectives of their own."""

    index: int  # of this rank among them
    size: int
    group: Any = None  # of torch.distributed, over gloo; None for a rank alone
    on_device: Any = None  # the same ranks over the device's backend, where tensors are exchanged; None: nothing is

    def gather(self, part: T) -> list[T]:
        """The parts of all of them, in their order, on each of them."""
        parts: list[Any] = [part] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, part, group=self.group)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one of them; the result is the same on each."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def exchange(self, parts: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """All-to-all of tensors on the device: `parts` (sum of `sent`,), contiguous, has what goes to each of them, end
        to end. Returns what comes from each, (sum of `received`,). The numbers of elements may differ, and be 0."""
        out = parts.new_empty(sum(received))
        if self.size == 1:
            return out.copy_(parts)
        dist.all_to_all_single(out, parts, list(received), list(sent), group=self.on_device)
        return out


ALONE = Neighbours(0, 1)


def neighbours_of(world: World, size: int, timeout: float, *, exchanging: bool = False) -> Neighbours:
    """This rank and those beside it, in groups of `size`, which divides the number of ranks. All ranks call it.

    timeout: seconds for which one waits for the others; exchanging: whether they exchange tensors on the device, over
    NCCL if that is a GPU.
    """
    own = Neighbours(world.rank % size, size)
    if size == 1:
        return own
    for first in range(0, world.ranks, size):  # each rank takes part in making every group, or they wait for each other
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=timeout))
        on_device = group if exchanging else None
        if exchanging and world.device.type != "cpu":
            on_device = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))  # of the default backend
        if world.rank in ranks:
            own = Neighbours(world.rank - first, size, group, on_device)
    return own
