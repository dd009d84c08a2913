"""Errors that a user can put right: shown as one message, with no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn


class FastPPOError(ValueError):
    """Something that the user can put right. The message names what is wrong, its value and the way out."""


class ConfigError(ValueError):
    """A setting, or two settings together, that cannot work. The message says which, why and what to do."""


class ModelError(FastPPOError):
    """A model that cannot be loaded or used. The message names the setting and the way out."""


class TrainingFault(FastPPOError):
    """Training that has broken down. The message says what was seen and what to try."""


# How gloo and NCCL put it that another rank has gone, or has not come.
ANOTHER_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
)

LESS_MEMORY = (
    "Smaller microbatches (ppo.microbatch_tokens; microbatch_tokens outside of PPO), fewer sampling.rows,"
    " optim.activation_checkpointing, a higher zero.stage and zero.offload each take less, and `python -m fastppo.plan`"
    " shows how much every phase needs."
)


@contextmanager
def exit_with_message(rank: int) -> Iterator[None]:
    """Print what went wrong and leave with status 1 at once, so that the launcher ends the other ranks.

    Of a `FastPPOError` the message is shown; of a GPU without memory, where that was and what takes less; a collective
    that broke since another rank failed gets one line, so that the other's error is the one that is seen; anything else
    is a fault of ours and shows its traceback. Ctrl-C comes here where there is nothing yet to save
    (`fastppo.distributed.stop`).
    """
    try:
        yield
    except KeyboardInterrupt:
        if rank == 0:
            _leave(lambda: print("fastppo: interrupted before there was anything to save.", file=sys.stderr), 130)
        _leave(lambda: None, 130)
    except Exception as error:
        _leave(partial(_say, error, rank), 1)


def _say(error: Exception, rank: int) -> None:
    where = "" if rank == 0 else f" (rank {rank})"
    if isinstance(error, FastPPOError):
        print(f"fastppo{where}: {error}", file=sys.stderr)
    elif type(error).__name__ == "OutOfMemoryError":  # torch's; the report imports this module, and no torch
        told, _, _ = str(error).partition(" If reserved")  # what follows is about the allocator's settings
        print(f"fastppo{where}, in {_innermost(error)}: {told} {LESS_MEMORY}", file=sys.stderr)
    elif isinstance(error, RuntimeError) and any(words in str(error) for words in ANOTHER_RANK):
        print(
            f"fastppo (rank {rank}): another rank has ended or does not answer, so this one ends too"
            f" ({str(error).strip().splitlines()[-1]})",
            file=sys.stderr,
        )
    else:
        print(f"fastppo{where}: an error that is not yours to put right:", file=sys.stderr)
        traceback.print_exception(error)


def _leave(say: Callable[[], object], status: int) -> NoReturn:
    """At once: a rank that waits for the others in a collective would hold up an orderly exit for minutes."""
    for last in (say, lambda: sys.stderr.flush(), lambda: sys.stdout.flush()):
        with suppress(Exception):  # a terminal that is gone, or never was
            last()
    os._exit(status)


def _innermost(error: Exception) -> str:
    """The module of fastppo that was at work when the error was raised, as `fastppo/ppo/update.py`."""
    here = Path(__file__).parent
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [file for file in files if here in file.parents and file != Path(__file__)]
    return ours[-1].relative_to(here.parent).as_posix() if ours else "code around it"
