"""What a file of responses is to the run that writes it, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError

T = TypeVar("T")

FOLDER = "responses"  # of Parquet parts, in the folder of a run; the JSONL file has this name too


class Store(Protocol):
    """The responses that a run has written. All ranks call each method at the same place; rank 0 reads and writes."""

    @property
    def place(self) -> Path: ...

    def whole(self, counts: Sequence[int]) -> int:
        """How many batches are there, whole, from the first on. counts: the rows of each batch of the run.

        Raises DataError for what this run cannot have written.
        """

    def keep(self, batches: int) -> None:
        """Remove what comes after the first `batches`, at most as many as `whole` has found. Raises DataError."""

    def write(self, number: int, columns: Mapping[str, Sequence[Any]] | None) -> None:
        """Write a batch; it is on the disk when this returns. columns: of `scored_rows`, wanted on rank 0 only.

        Raises DataError if it cannot be written; what was written before is as it was.
        """


def agreed(answer: T | FastPPOError, world: World) -> T:
    """What rank 0 found, on all ranks; raised on all if it is an error, so that none waits for it."""
    first = all_gather(answer, world)[0]
    if isinstance(first, FastPPOError):
        raise first
    return first
