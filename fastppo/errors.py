"""Errors that a user can put right: shown as one message, with no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class FastPPOError(ValueError):
    """Something that the user can put right. The message names what is wrong, its value and the way out."""


@contextmanager
def exit_with_message(rank: int) -> Iterator[None]:
    """Print a `FastPPOError` and leave with status 1 at once, so that the launcher ends the other ranks.

    Anything else is a fault of ours and keeps its traceback.
    """
    try:
        yield
    except FastPPOError as error:
        where = "" if rank == 0 else f" (rank {rank})"
        print(f"fastppo{where}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a rank that waits for the others in a collective would hold up an orderly exit for minutes
