"""Errors that a user can put right: shown as one message, with no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class FastPPOError(ValueError):
    """Something that the user can put right. The message names what is wrong, its value and the way out."""


# How gloo and NCCL put it that another rank has gone, or has not come.
ANOTHER_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
)


@contextmanager
def exit_with_message(rank: int) -> Iterator[None]:
    """Print what went wrong and leave with status 1 at once, so that the launcher ends the other ranks.

    Of a `FastPPOError` the message is shown; a collective that broke since another rank failed gets one line, so that
    the other's error is the one that is seen; anything else is a fault of ours and shows its traceback.
    """
    try:
        yield
    except Exception as error:
        where = "" if rank == 0 else f" (rank {rank})"
        if isinstance(error, FastPPOError):
            print(f"fastppo{where}: {error}", file=sys.stderr)
        elif isinstance(error, RuntimeError) and any(words in str(error) for words in ANOTHER_RANK):
            print(
                f"fastppo (rank {rank}): another rank has ended or does not answer, so this one ends too"
                f" ({str(error).strip().splitlines()[-1]})",
                file=sys.stderr,
            )
        else:
            print(f"fastppo{where}: an error that is not yours to put right:", file=sys.stderr)
            traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)  # a rank that waits for the others in a collective would hold up an orderly exit for minutes
