"""What only tells of a run must not end it: an output that fails is a line in the log, and the run goes on."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from rich.console import Console

log = logging.getLogger("fastppo")


class Telling:
    """Guards outputs by name; the log has the first of several failures in a row, and that it works again."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    @contextmanager
    def __call__(self, output: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Within this context nothing is raised that the output fails with, except for `but`."""
        try:
            yield
        except but:
            raise
        except (Exception, SystemExit) as error:  # rich leaves by SystemExit where nobody reads its terminal
            if output not in self._failed:
                log.error("%s: %s. The run goes on without.", output, reason(error))
            self._failed.add(output)
        else:
            if output in self._failed:
                log.info("%s: works again", output)
            self._failed.discard(output)

    def has_failed(self, output: str) -> bool:
        """Whether it failed the last time."""
        return output in self._failed


def only_tells(output: str) -> AbstractContextManager[None]:
    """For something that is written once."""
    return Telling()(output)


class Terminal(Console):
    """Where nobody reads what it writes any more, it raises what Python raises; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise  # what is handled just now


def reason(error: BaseException) -> str:
    """An error in a line: what a system says of a disk without a name in front, anything else by its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def steady_streams() -> None:
    """Standard streams that take any text, and that are there: a parent may have closed them.

    A file that is opened later must not get the number of one of them, which libraries write to.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def settle_stdout() -> None:
    """Before something that must not fail: libraries flush stdout whatever they write, tqdm with each of its bars."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()


def silence_stdout() -> None:
    """Drop what stdout has not taken, and what comes: a flush would fail, and Python leave with status 120."""
    with suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        sys.stdout.flush()
