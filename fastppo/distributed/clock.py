"""The clock of a run, which chat templates read that write the date (Llama 3's, with `strftime_now`).

It stands still at the time at which the run began on rank 0, and goes with its checkpoints: all ranks make the same
tokens of a conversation, and so does a run that is resumed another day.
"""

from __future__ import annotations

from datetime import datetime

from fastppo.distributed.world import World, all_gather

_begun: datetime | None = None  # of this process's run


def begin_clock(kept: str | None, world: World) -> None:
    """Set the clock of the run that begins or goes on here. All ranks call it, before they read data.

    kept: what `reading` gave the checkpoint that the run goes on from; None for a run from the start.
    """
    global _begun
    _begun = datetime.fromisoformat(all_gather(kept or _now(), world)[0])


def reading() -> str:
    """The local time at which the run began, as ISO 8601 has it."""
    return _now() if _begun is None else _begun.isoformat()


def strftime_now(format: str) -> str:
    """What templates call by this name, with the run's clock; outside of a run, as in a server, with the time of now.

    format: as of `datetime.strftime`.
    """
    return datetime.fromisoformat(reading()).strftime(format)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
