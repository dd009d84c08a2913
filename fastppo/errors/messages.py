"""Errors that a user can correct: they are shown as one message, without a traceback."""

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
    """An error that the user can correct. The message names the cause, its value and the way out."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that is not valid. The message gives the reason and the way out."""


class RaisedAlone(FastPPOError):
    """An error of one rank in work that it does alone. `stop.together` raises it on all ranks, so that none waits for
    this one, and the run can be saved. It is pickled, so it has a message and nothing else."""


class ModelError(FastPPOError):
    """A model that cannot be loaded or used. The message names the setting and the way out."""


class TrainingFault(FastPPOError):
    """Training that has failed. The message says what was observed and what to try."""


# Parts of messages of gloo and NCCL after another rank has ended, or has not connected.
ANOTHER_RANK_ENDED = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
)

LESS_MEMORY = (
    "To use less memory: smaller microbatches (ppo.microbatch_tokens; microbatch_tokens outside of PPO),"
    " fewer sampling.rows, optim.activation_checkpointing, a higher zero.stage or zero.offload."
    " `python -m fastppo.plan` shows how much memory each phase needs."
)


@contextmanager
def exit_with_message(rank: int) -> Iterator[None]:
    """Within this context, print an exception and exit with status 1 at once, so that the launcher ends the others.

    A `FastPPOError` is printed as its message; an out-of-memory error of the GPU with its place and settings that need
    less memory; a collective that failed because another rank ended as one line, so that the error of that rank stands
    out; any other exception is a bug of fastppo and is printed with its traceback. Ctrl-C is handled here only before
    a run has anything to save (`fastppo.distributed.stop`).
    """
    try:
        yield
    except KeyboardInterrupt:
        if rank == 0:
            _exit(lambda: print("fastppo: interrupted before there was anything to save.", file=sys.stderr), 130)
        _exit(lambda: None, 130)
    except Exception as error:
        _exit(partial(_print_error, error, rank), 1)


def another_rank_ended(error: Exception) -> bool:
    """Whether a collective has failed as another rank has ended, or does not answer."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ANOTHER_RANK_ENDED)


def _print_error(error: Exception, rank: int) -> None:
    which_rank = "" if rank == 0 else f" (rank {rank})"
    if isinstance(error, FastPPOError):
        print(f"fastppo{which_rank}: {error}", file=sys.stderr)
    elif type(error).__name__ == "OutOfMemoryError":  # of torch, which this module must not import (for the report)
        message, _, _ = str(error).partition(" If reserved")  # the rest is about settings of the allocator
        print(f"fastppo{which_rank}, in {_innermost_module(error)}: {message} {LESS_MEMORY}", file=sys.stderr)
    elif another_rank_ended(error):
        print(
            f"fastppo (rank {rank}): another rank has ended or does not answer, so this one ends too"
            f" ({str(error).strip().splitlines()[-1]})",
            file=sys.stderr,
        )
    else:
        print(f"fastppo{which_rank}: an error that you cannot correct, a bug in fastppo:", file=sys.stderr)
        traceback.print_exception(error)


def _exit(print_message: Callable[[], object], status: int) -> NoReturn:
    """Exit without cleanup: a rank that waits for others in a collective would delay a normal exit for minutes."""
    for action in (print_message, lambda: sys.stderr.flush(), lambda: sys.stdout.flush()):
        with suppress(Exception):  # the terminal is closed, or there is none
            action()
    os._exit(status)


def _innermost_module(error: Exception) -> str:
    """The innermost module of fastppo in the traceback of an error, for example `fastppo/ppo/update.py`."""
    package = Path(__file__).parents[1]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    modules = [file for file in files if package in file.parents and file != Path(__file__)]
    return modules[-1].relative_to(package.parent).as_posix() if modules else "code outside of fastppo"
