"""Guards for outputs that only report a run, such as the terminal: if one fails, the error is logged and the run
continues."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from rich.console import Console

log = logging.getLogger("fastppo")


class OutputGuard:
    """Catches and logs the errors of outputs, by name. Of consecutive failures only the first is logged, and then the
    recovery."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    @contextmanager
    def __call__(self, output: str, reraise: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Catch every exception inside this context, except those of the types `reraise`."""
        try:
            yield
        except reraise:
            raise
        except (Exception, SystemExit) as error:  # rich raises SystemExit if its output is a closed pipe
            if output not in self._failed:
                log.error("%s: %s. The run continues without it.", output, error_summary(error))
            self._failed.add(output)
        else:
            if output in self._failed:
                log.info("%s: works again", output)
            self._failed.discard(output)

    def has_failed(self, output: str) -> bool:
        """Whether the last attempt failed."""
        return output in self._failed


def guard_output(output: str) -> AbstractContextManager[None]:
    """Guard an output that is written once."""
    return OutputGuard()(output)


class Terminal(Console):
    """A rich console that raises BrokenPipeError if its output is a closed pipe; rich itself would end the process."""

    def on_broken_pipe(self) -> None:
        raise  # the exception that is being handled


def error_summary(error: BaseException) -> str:
    """An error in one line: the operating system's text of an OSError; the type and the text of any other."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def ensure_standard_streams() -> None:
    """Make sure that stdin, stdout and stderr are open, which a parent process may have closed, and accept any text.

    Otherwise a file that is opened later could get the descriptor 1 or 2, to which libraries write.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_or_silence_stdout() -> None:
    """Flush stdout; if that fails, silence it. To be called before work that must not fail, as libraries flush stdout
    during their work, such as tqdm at each of its bars."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()


def silence_stdout() -> None:
    """Redirect stdout to the null device, with what it has buffered. Otherwise the next flush would fail, and Python
    would exit with status 120."""
    with suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        sys.stdout.flush()
