"""What the ranks of a run tell each other beside their work: that they are alive, where they are, and how far.

A rank that others wait for is told apart from one that is dead by its heartbeat: a slow one is named in the log and
waited for, and after one that is silent the others end. How far a rank is, is the number of collectives that it has
begun: all ranks begin the same ones in the same order, so that those with more wait for those with fewer.

All times are of this process alone, of its monotonic clock: clocks of ranks may be apart. Time in which it did not run,
because it or its machine was suspended, does not count.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

log = logging.getLogger("fastppo")

POLL = 0.5  # seconds between two heartbeats
SILENCE = 45.0  # seconds without a heartbeat after which a rank counts as dead
SLOW = 60.0  # seconds for which the others wait for a rank before it is named, and then twice as long each time

_phase: tuple[str, float] = ("no phase", time.monotonic())  # "no": between two of them


@contextmanager
def in_phase(name: str) -> Iterator[None]:
    """Within this context the other ranks are told that this one is in the phase `name`."""
    global _phase
    outer = _phase
    _phase = name, time.monotonic()
    try:
        yield
    finally:
        _phase = outer[0], time.monotonic()


class Store(Protocol):
    """What is used of the key-value store of the run (`torch.distributed.Store`)."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class RunningTime:
    """Seconds for which this process has run, as `now` is called every `POLL` seconds or so."""

    def __init__(self) -> None:
        self._last, self._seconds = time.monotonic(), 0.0

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._seconds += min(self._last - last, max(4 * POLL, SILENCE / 9))  # more: it was suspended in between
        return self._seconds


class Place(NamedTuple):
    """Where a rank was at its last heartbeat."""

    phase: str
    seconds: float  # for which it had been there
    begun: int  # collectives since its start

    def __str__(self) -> str:
        return f"in {self.phase} for {self.seconds:.0f} s"


class Heartbeats:
    """The heartbeats of all ranks, this one's included."""

    def __init__(self, store: Store, rank: int, ranks: int):
        self._store, self._rank, self._time = store, rank, RunningTime()
        self.others = [other for other in range(ranks) if other != rank]
        # rank -> number of its heartbeats, and when the last one came
        self._last = dict.fromkeys(self.others, (0, self._time.now()))
        self._waiting: dict[int, _Wait] = {}

    def beat(self, begun: int) -> None:
        """Send one, and look for those of the others. begun: collectives of all ranks that this one has begun."""
        phase, since = _phase
        place = Place(phase, time.monotonic() - since, begun)
        self._store.set(f"place/{self._rank}", json.dumps(place))
        self._store.add(f"alive/{self._rank}", 1)
        now = self._time.now()
        for rank, (beats, _) in self._last.items():
            if (newest := self._store.add(f"alive/{rank}", 0)) != beats:
                self._last[rank] = newest, now
        if self._rank == 0:
            self._name_slow([place, *(self.place(rank) for rank in self.others)], now)

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have sent no heartbeat for so long, the longest silence first, without those that have left."""
        now = self._time.now()
        since = sorted((last, rank) for rank, (_, last) in self._last.items() if now - last > seconds)
        return [rank for _, rank in since if not self._store.check([f"left/{rank}"])]

    def leave(self) -> None:
        """Tell the other ranks not to expect heartbeats any more."""
        self._store.set(f"left/{self._rank}", "")

    def place(self, rank: int) -> Place | None:
        """None before the rank's first heartbeat."""
        if not self._store.check([f"place/{rank}"]):
            return None
        return Place(*json.loads(self._store.get(f"place/{rank}")))

    def _name_slow(self, places: list[Place | None], now: float) -> None:
        """Log which ranks the others wait for: those alive that have begun the fewest collectives, and no more."""
        begun = {rank: place.begun for rank, place in enumerate(places) if place is not None}
        fewest = min(begun.values())
        behind = {rank for rank, count in begun.items() if count == fewest < max(begun.values())}
        self._waiting = {rank: wait for rank, wait in self._waiting.items() if rank in behind and wait.at == fewest}
        for rank in sorted(behind - set(self.silent(4 * POLL))):
            wait = self._waiting.setdefault(rank, _Wait(fewest, now, SLOW))
            if now - wait.since >= wait.next:
                log.warning("waiting %.0f s for rank %d, which is %s", now - wait.since, rank, places[rank])
                self._waiting[rank] = wait._replace(next=2 * wait.next)


class _Wait(NamedTuple):
    at: int  # collectives that the rank had begun
    since: float
    next: float  # seconds of waiting at which it is named
