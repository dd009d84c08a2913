"""Ranks that do something together, apart from all others: those whose GPUs hold one copy of a model to sample from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastppo.distributed.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Neighbours:
    """`size` consecutive ranks, this one among them, with collectives of their own on the host."""

    index: int  # of this rank among them
    size: int
    group: Any = None  # of torch.distributed, over gloo; None for a rank alone

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


def neighbours_of(world: World, size: int, timeout: float) -> Neighbours:
    """This rank and those beside it, in groups of `size`, which divides the number of ranks. All ranks call it.

    timeout: seconds for which one waits for the others.
    """
    own = Neighbours(world.rank % size, size)
    if size == 1:
        return own
    for first in range(0, world.ranks, size):  # each rank takes part in making every group, or they wait for each other
        ranks = range(first, first + size)
        group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=timeout))
        if world.rank in ranks:
            own = Neighbours(world.rank - first, size, group)
    return own
