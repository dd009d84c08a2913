"""Stopping on request: a SIGTERM, Ctrl-C, or a parent that has vanished, ends a run on all ranks at the same place.

A thread on each rank listens, since a rank may sit in a collective of C++ for minutes. What one rank hears it tells
the others through the run's key-value store: DeepSpeed's `launch` sends SIGTERM to one process, waits until that has
ended, and goes on to the next. Ranks then leave together: `check` is called by all of them between two microbatches,
and `together` lets each leave sampling alone, where ranks never wait for each other, and agree behind it.

Ctrl-C sends SIGINT to all processes of the terminal, so ranks hear it beside the SIGTERM that `launch` then sends them.
Only another SIGINT is a second Ctrl-C, at which a rank ends at once.

The thread also notices a rank that has vanished without a word, so that the others do not wait in a collective for it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import torch.distributed as dist

from fastppo.distributed.world import World, on_any_rank

log = logging.getLogger("fastppo")

POLL = 0.5  # seconds between two looks at the store
SILENCE = 45.0  # seconds without a sign of life after which a rank counts as dead
SAME_CTRL_C = 0.03  # seconds within which two SIGINTs are one: of the terminal, and of a program that passes it on
INTERRUPTED = 128 + signal.SIGINT  # the exit status of shells for it

_watches = count()
_watch: _Watch | None = None


class Stopped(Exception):
    """The run has been asked to stop, all ranks know it, and none is in the middle of an update."""


@contextmanager
def watching(world: World) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT end the process no more; `check` and `together` raise `Stopped` instead.

    A second SIGINT ends it at once.
    """
    global _watch
    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
    heard, speak = socket.socketpair()
    speak.setblocking(False)
    _watch = _Watch(world, heard, speak)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1) if main else -1
    listen()
    _watch.start()
    try:
        yield
        _watch.take_leave()
    finally:
        speak.send(b"\0")  # so that the thread looks up
        if main:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        _watch.end()
        _watch = None
        heard.close()
        speak.close()


def listen() -> None:
    """Hear signals again, whoever has taken them in the meantime; a reward function may have a timer of its own."""
    if _watch is not None and threading.current_thread() is threading.main_thread():
        # without handlers there would be no wake-up; they ask too, for when somebody else has taken that
        asked = _watch.asked
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.set())
        signal.set_wakeup_fd(_watch.speak.fileno(), warn_on_full_buffer=False)


def check(world: World) -> None:
    """To be called by every rank at the same place: raises `Stopped` on all of them once one has been asked to stop."""
    if _watch is not None and on_any_rank(_watch.asked.is_set(), world):
        raise Stopped


def check_alone() -> None:
    """Raises `Stopped` on this rank alone. For work within `together` that has no collectives."""
    if _watch is not None and _watch.asked.is_set():
        raise Stopped


@contextmanager
def together(world: World) -> Iterator[None]:
    """Whatever ranks left the work inside by `check_alone`, all of them leave it by `Stopped`, or none does."""
    try:
        yield
    except Stopped:
        pass
    else:
        check(world)
        return
    on_any_rank(True, world)
    raise Stopped


class _Watch(threading.Thread):
    """Hears the signal, sees the parent and the other ranks vanish, and passes the request to stop on."""

    def __init__(self, world: World, heard: socket.socket, speak: socket.socket):
        """heard, speak: the ends of a pair of sockets; Python writes the signals into `speak`."""
        super().__init__(name="fastppo-stop", daemon=True)
        self.asked = threading.Event()
        self._over = threading.Event()
        self._heard, self.speak, self._world = heard, speak, world
        # every rank makes its watches in the same order, so their numbers agree
        self._store = dist.distributed_c10d.PrefixStore(
            f"fastppo/stop/{next(_watches)}", dist.distributed_c10d._get_default_store()
        )
        self._interrupted: float | None = None  # when the first SIGINT came
        self._alive = {rank: (0, time.monotonic()) for rank in range(world.ranks) if rank != world.rank}

    def end(self) -> None:
        self._over.set()
        self.join()

    def take_leave(self) -> None:
        """The others wait no more for a sign of life: rank 0 may still have files to write."""
        with suppress(RuntimeError):  # rank 0, which keeps the store, is gone
            self._store.set(f"left/{self._world.rank}", "")

    def run(self) -> None:
        while not self._over.is_set():
            ready = select.select([self._heard], [], [], POLL)[0]
            if ready:
                self._hear(self._heard.recv(64))
            if self._world.launcher not in (None, os.getppid()):
                self.asked.set()
            try:
                self._exchange()
            except RuntimeError as error:  # DistError and its kin: rank 0, which keeps the store, is gone
                if not self._over.is_set():
                    _die(f"rank {self._world.rank} has lost the run's store, which rank 0 keeps ({_first_line(error)})")
                return

    def _hear(self, signals: bytes) -> None:
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            self.asked.set()
        if signal.SIGINT not in signals:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            log.info("interrupted: the run saves itself and ends. Ctrl-C again ends it at once, unsaved")
        elif now - self._interrupted > SAME_CTRL_C:
            _die("interrupted again, so nothing more is saved", INTERRUPTED)

    def _exchange(self) -> None:
        if self.asked.is_set():
            self._store.set("asked", "")
        elif self._store.check(["asked"]):
            self.asked.set()
        self._store.add(f"alive/{self._world.rank}", 1)
        now = time.monotonic()
        for rank, (beats, since) in self._alive.items():
            heard = self._store.add(f"alive/{rank}", 0)
            if heard != beats:
                self._alive[rank] = (heard, now)
            elif now - since > SILENCE and not self._store.check([f"left/{rank}"]):
                _die(
                    f"rank {rank} has given no sign of life for {SILENCE:.0f} s: it was killed, or its machine is gone"
                )


def _die(reason: str, status: int = 1) -> None:
    """End this process from a thread: the main one may wait in a collective that nobody will join."""
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(f"fastppo: {reason}. This rank ends too.", file=sys.stderr, flush=True)
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
