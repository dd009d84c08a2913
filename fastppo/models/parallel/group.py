"""The ranks that compute packed rows together, and which tokens of a row each of them has.

The group is that of the process, as its attention is: every role that reads whole sequences is computed by it. Sampling
is not, as its rows are each rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

from fastppo.distributed import ALONE, Neighbours

_group = ALONE


def choose_group(group: Neighbours) -> None:
    """Compute the packed rows of all models of this process in this group (the setting `parallel.sequence`)."""
    global _group
    _group = group


def sequence_group() -> Neighbours:
    """The group in which packed rows are computed."""
    return _group


@contextmanager
def computing_alone() -> Iterator[None]:
    """Within this context each rank computes its packed rows whole, by itself."""
    group_before = _group
    choose_group(ALONE)
    try:
        yield
    finally:
        choose_group(group_before)


@dataclass(frozen=True)
class Split:
    """The N tokens of a packed row in contiguous parts, one for each rank of a group, in the order of ranks.

    Sizes differ by at most one; of a row with fewer tokens than ranks some parts are empty. Most models cannot be
    called without a token, so a rank without one computes the row's first token, and nothing is made of it.
    """

    group: Neighbours
    bounds: tuple[int, ...]  # (size of the group + 1,) from 0 to N

    @staticmethod
    def of(tokens: int, group: Neighbours | None = None) -> Split | None:
        """The split of so many tokens over the group in use, or over another one; None: it is a rank alone."""
        group = group or sequence_group()
        if group.size == 1:
            return None
        each, more = divmod(tokens, group.size)
        return Split(group, tuple(accumulate((each + (rank < more) for rank in range(group.size)), initial=0)))

    @property
    def counts(self) -> list[int]:
        """The number of tokens of each rank."""
        return [end - start for start, end in pairwise(self.bounds)]

    @property
    def own(self) -> slice:
        """The tokens of this rank."""
        return slice(self.bounds[self.group.index], self.bounds[self.group.index + 1])

    @property
    def computed(self) -> slice:
        """The tokens with which this rank calls the model: its own, or one where it has none."""
        return self.own if self.own.stop > self.own.start else slice(0, 1)
