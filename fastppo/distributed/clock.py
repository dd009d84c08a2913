"""The date for chat templates that write one (that of Llama 3, with `strftime_now`).

It is the time at which the run started on rank 0, and it is saved in checkpoints: all ranks encode a conversation as
the same tokens, and so does a run that is resumed on another day.
"""

from __future__ import annotations

from datetime import datetime

from fastppo.distributed.world import World, all_gather

_start: datetime | None = None  # start of the run of this process


def begin_clock(saved: str | None, world: World) -> None:
    """Set the clock of a run that starts or resumes. All ranks call it, before they read data.

    saved: the result of `reading` in the checkpoint from which the run resumes; None for a new run.
    """
    global _start
    _start = datetime.fromisoformat(all_gather(saved or _now(), world)[0])


def reading() -> str:
    """The local time at which the run started, in ISO 8601; outside of a run the current time."""
    return _now() if _start is None else _start.isoformat()


def strftime_now(format: str) -> str:
    """The function that chat templates call by this name: the time of `reading` in the given format.

    format: for `datetime.strftime`.
    """
    return datetime.fromisoformat(reading()).strftime(format)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
