"""Stopping on request: SIGTERM, Ctrl-C or the end of the parent process stops a run on all ranks at the same place.

A thread on each rank waits for signals, because a rank may spend minutes in a collective in C++. The thread passes a
request on to the other ranks through the key-value store of the run: DeepSpeed's `launch` sends SIGTERM to one process,
waits until that process ends, and only then goes on to the next. Ranks stop together: all of them call `check` between
two microbatches. Ranks do not wait for each other in sampling, so there each rank stops alone, or with those that it
samples together with, inside `together`, at whose end all ranks agree.

Ctrl-C sends SIGINT to all processes of the terminal, and `launch` then sends SIGTERM to the ranks too. So only another
SIGINT counts as a second Ctrl-C, which ends a rank at once.

Another thread sends this rank's heartbeat and looks for those of the others (`fastppo.distributed.heartbeat`), so that
they do not wait in a collective for a rank that has died.
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

from fastppo.distributed import heartbeat
from fastppo.distributed.heartbeat import POLL
from fastppo.distributed.neighbours import Neighbours
from fastppo.distributed.world import World, all_gather, on_any_rank
from fastppo.errors import FastPPOError, RaisedAlone, another_rank_ended

log = logging.getLogger("fastppo")

KILLED = 2.5  # seconds without a heartbeat after which a rank counts as dead where a collective with it has failed
SAME_CTRL_C = 0.03  # seconds within which two SIGINTs are one Ctrl-C: from the terminal, and passed on by a program
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells use for SIGINT

_watches = count()
_watch: _Watch | None = None


class RankLost(FastPPOError):
    """A collective has failed as another rank has ended. The message names that rank, and the way out."""


class Stopped(Exception):
    """The run was asked to stop; all ranks raise it, and none of them within an update."""


@contextmanager
def watching(world: World) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT do not end the process; `check` and `together` raise `Stopped` instead.

    A second SIGINT ends the process at once. Raises RankLost where a collective fails as another rank has ended.
    """
    global _watch
    main = threading.current_thread() is threading.main_thread()  # only the main thread may set signal handlers
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    _watch = _Watch(world, receiver, sender)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1) if main else -1
    listen()
    _watch.start()
    try:
        yield
        _watch.announce_end()
    except Stopped:
        raise
    except Exception as error:
        if another_rank_ended(error) and (lost := _watch.lost()) is not None:
            raise RankLost(f"another rank has ended: {lost}.") from error
        _watch.announce_error(error)
        raise
    finally:
        sender.send(b"\0")  # wakes the thread
        if main:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        _watch.end()
        _watch = None
        receiver.close()
        sender.close()


def listen() -> None:
    """Set the signal handlers again, in case other code has replaced them, for example a timer in a reward function."""
    if _watch is not None and threading.current_thread() is threading.main_thread():
        # Python writes to the wakeup descriptor only for signals with a handler. The handlers set the flag as well, in
        # case other code replaces the descriptor.
        asked = _watch.asked
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.set())
        signal.set_wakeup_fd(_watch.sender.fileno(), warn_on_full_buffer=False)


def check(world: World) -> None:
    """Raises `Stopped` on all ranks if one of them was asked to stop. All ranks call it at the same place."""
    if _watch is not None and on_any_rank(_watch.asked.is_set(), world):
        raise Stopped


def check_alone() -> None:
    """Raises `Stopped` on this rank only. For work within `together` that has no collectives."""
    if _watch is not None and _watch.asked.is_set():
        raise Stopped


def check_among(neighbours: Neighbours) -> None:
    """As `check_alone`, for work that these ranks do together: all of them call it at the same place, and raise."""
    if _watch is not None and neighbours.any(_watch.asked.is_set()):
        raise Stopped


@contextmanager
def together(world: World) -> Iterator[None]:
    """If one rank leaves this context by `Stopped` (`check_alone`, `check_among`), raise `Stopped` on all ranks; if one
    leaves it by `RaisedAlone`, raise that on all ranks."""
    stopped, error = False, None
    try:
        yield
    except Stopped:
        stopped = True
    except RaisedAlone as raised:
        error = raised
    if on_any_rank(error is not None, world):
        errors = [each for each in all_gather(error, world) if each is not None]
        raise error or errors[0]
    if stopped:
        on_any_rank(True, world)
        raise Stopped
    check(world)


class _Watch:
    """Two threads: one receives signals and looks after the other, which talks to the other ranks through the store."""

    def __init__(self, world: World, receiver: socket.socket, sender: socket.socket):
        """receiver, sender: the ends of a pair of sockets; Python writes the numbers of signals into `sender`."""
        self.asked = threading.Event()
        self._over, self._soon, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._receiver, self.sender, self._world = receiver, sender, world
        # every rank makes its watches in the same order, so the numbers are the same on all ranks
        self._store = dist.distributed_c10d.PrefixStore(
            f"fastppo/stop/{next(_watches)}", dist.distributed_c10d._get_default_store()
        )
        self._heartbeats = heartbeat.Heartbeats(self._store, world.rank, world.ranks)
        self._interrupted: float | None = None  # time of the first SIGINT
        self._threads = [
            threading.Thread(target=work, name=f"fastppo-{name}", daemon=True)
            for name, work in (("stop", self._listen), ("heartbeat", self._talk))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        self._soon.set()
        for thread in self._threads:
            thread.join(timeout=heartbeat.SILENCE)  # the store may not answer any more

    def announce_end(self) -> None:
        """Tell the other ranks not to expect heartbeats any more: rank 0 may still write files."""
        with suppress(RuntimeError):  # rank 0, which holds the store, has ended
            self._heartbeats.leave()

    def announce_error(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        with suppress(RuntimeError):
            self._store.set(f"ended/{self._world.rank}", f"{type(error).__name__}: {_first_line(error)}"[:300])

    def lost(self) -> str | None:
        """Which rank has ended, and the way out; None if none has. A killed one is known after a few seconds."""
        found = self._find_lost()
        self._outlast_others()
        return found

    def _find_lost(self) -> str | None:
        end = time.monotonic() + 3 * KILLED
        while time.monotonic() < end:
            try:
                for rank in self._heartbeats.others:
                    if self._store.check([f"ended/{rank}"]):
                        return f"rank {rank} ({self._store.get(f'ended/{rank}').decode()})"
                for rank in self._heartbeats.silent(KILLED):
                    return f"{self._named_silent(rank, KILLED)}. {way_out(self._world)}"
            except RuntimeError:
                return f"rank 0, whose store does not answer. {way_out(self._world)}"
            time.sleep(POLL / 2)
        return None

    def _outlast_others(self) -> None:
        """With rank 0 the store ends, from which the others are about to learn the same."""
        if self._world.rank == 0:
            time.sleep(4 * POLL)

    def _named_silent(self, rank: int, seconds: float) -> str:
        place = self._heartbeats.place(rank)
        was = "" if place is None else f", when it was {place}"
        return (
            f"rank {rank} has sent no heartbeat for {seconds:.0f} s{was}: it was killed or stopped (SIGSTOP), or its"
            " machine is down"
        )

    def _listen(self) -> None:
        running = heartbeat.RunningTime()
        answered = running.now()
        while not self._over.is_set():
            ready = select.select([self._receiver], [], [], POLL)[0]
            if ready:
                self._handle(self._receiver.recv(64))
            if self._world.launcher not in (None, os.getppid()):
                self.asked.set()
            if self.asked.is_set():
                self._soon.set()
            now = running.now()
            if self._answered.is_set():
                answered = now
                self._answered.clear()
            elif now - answered > heartbeat.SILENCE and not self._over.is_set():
                reason = f"rank 0, which holds the store of the run, has not answered for {now - answered:.0f} s"
                self._die(f"{reason}: it was killed or stopped (SIGSTOP), or its machine is down")

    def _handle(self, signals: bytes) -> None:
        if signal.SIGTERM in signals or signal.SIGINT in signals:
            self.asked.set()
        if signal.SIGINT not in signals:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            log.info("interrupted: the run saves a checkpoint and ends. Ctrl-C again ends it at once, without saving")
        elif now - self._interrupted > SAME_CTRL_C:
            _print("interrupted again, so nothing more is saved. This rank ends too")
            os._exit(INTERRUPTED)  # the main thread may wait in a collective that will never finish

    def _talk(self) -> None:
        while not self._over.is_set():
            try:
                if self.asked.is_set():
                    self._store.set("asked", "")
                elif self._store.check(["asked"]):
                    self.asked.set()
                self._heartbeats.beat(_begun(self._world.ranks))
                for rank in self._heartbeats.silent(heartbeat.SILENCE):
                    self._die(self._named_silent(rank, heartbeat.SILENCE))
            except RuntimeError as error:  # DistError and its subclasses: rank 0, which holds the store, has ended
                if not self._over.is_set():
                    reason = f"cannot reach the store of the run on rank 0 ({_first_line(error)})"
                    self._die(f"rank {self._world.rank} {reason}")
                return
            self._answered.set()
            self._soon.wait(POLL)
            self._soon.clear()

    def _die(self, reason: str) -> None:
        _print(f"{reason}. {way_out(self._world)}")
        self._outlast_others()
        os._exit(1)


def way_out(world: World) -> str:
    """What to do where a rank is lost."""
    fewer, last = world.fewer(), "This rank ends too. The run goes on with --resume auto"
    if not fewer:
        return f"{last}, on as many ranks as before"
    return f"{last}, on as many ranks as before or on fewer: {fewer} divide the batch (--num_accelerators {fewer})"


def _begun(ranks: int) -> int:
    """Collectives that this rank has begun with all others, in all groups that have all of them."""
    begun = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.size() == ranks:
            begun += group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # not in torch's stubs
    return begun


def _print(reason: str) -> None:
    with suppress(OSError, ValueError):  # the terminal is closed
        print(f"fastppo: {reason}.", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
