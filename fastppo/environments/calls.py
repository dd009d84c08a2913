"""Calls of the user's code in threads of their own, several at once, each with a time limit.

The threads are daemons: one that hangs does not keep the process alive, as those of `concurrent.futures` would. Each
piece of work has a new thread, so that what a call changes of its thread (whether torch keeps gradients, for example)
is gone with it. Coroutines run on the event loop that all functions of the user share; the thread waits for them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

from fastppo.errors import RAISED
from fastppo.user_code import event_loop


class UserCall(NamedTuple):
    """A call of the user's code."""

    name: str  # of what is called, for messages
    function: Callable[[], Any]
    receive: Callable[[Any], object] | None = None  # what is done with its value, awaited if it was awaitable


@dataclass(frozen=True)
class Outcome:
    """How a piece of work has ended."""

    key: int
    call: UserCall  # the last one that was begun
    value: Any = None  # of the last call
    error: BaseException | None = None  # that it raised
    late: bool = False  # it took longer than the time limit, or has not returned yet


@dataclass
class _Running:
    calls: Sequence[UserCall]
    call: UserCall
    start: float  # of that call; the monotonic clock
    future: Future[Any] | None = None  # of a coroutine
    told: bool = False  # that it is late


class Calls:
    """Pieces of work, of one call or several in a row, of which at most `concurrency` run at once."""

    def __init__(self, concurrency: int, time_limit: float, abandoned: Callable[[int], object] | None = None):
        """time_limit: seconds that one call may take from its start; waiting for others does not count. abandoned: is
        called in its thread, with its key, when work returns that ran while this was closed."""
        self._concurrency, self._time_limit, self._abandoned = concurrency, time_limit, abandoned
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Sequence[UserCall]]] = deque()
        self._running: dict[int, _Running] = {}
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._closed = False

    def begin(self, key: int, calls: Sequence[UserCall]) -> None:
        """Start the calls, one after the other in one thread, as soon as there is room; key: names them, once."""
        with self._lock:
            self._waiting.append((key, calls))
            self._start_next()

    def take(self, wait: float) -> list[Outcome]:
        """What has ended since the last `take`; waits up to `wait` seconds for the first. Late ones count as ended."""
        end = time.monotonic() + wait
        while True:
            now = time.monotonic()
            outcomes = self._ended(max(0.0, min(end, self._next_limit(now + wait)) - now))
            outcomes += self._overdue(time.monotonic())
            if outcomes or time.monotonic() >= end:
                return outcomes

    def close(self) -> tuple[set[int], list[tuple[int, Sequence[UserCall]]]]:
        """Begin no more calls, cancel coroutines and abandon what runs: nobody wants to know what becomes of it.

        Returns the keys of what runs, and what has not begun.
        """
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            for running in self._running.values():
                if running.future is not None:
                    running.future.cancel()
            return set(self._running), waiting

    def _ended(self, wait: float) -> list[Outcome]:
        outcomes = []
        try:
            outcomes.append(self._outcomes.get(timeout=wait) if wait else self._outcomes.get_nowait())
            while True:
                outcomes.append(self._outcomes.get_nowait())
        except Empty:
            return outcomes

    def _next_limit(self, latest: float) -> float:
        """The time at which the first of the running calls has used up its limit, if it is before `latest`."""
        with self._lock:
            limits = (r.start + self._time_limit for r in self._running.values() if not r.told)
            return min(limits, default=latest)

    def _overdue(self, now: float) -> list[Outcome]:
        with self._lock:
            late = [(key, r) for key, r in self._running.items() if now - r.start > self._time_limit and not r.told]
            for _, running in late:
                running.told = True
            return [Outcome(key, r.call, late=True) for key, r in late]

    def _start_next(self) -> None:
        """Give the next piece of work a thread if one may run. With the lock held."""
        if self._waiting and len(self._running) < self._concurrency and not self._closed:
            key, calls = self._waiting.popleft()
            self._running[key] = running = _Running(calls, calls[0], time.monotonic())
            threading.Thread(target=self._run, args=(key, running), name="fastppo-environment", daemon=True).start()

    def _run(self, key: int, running: _Running) -> None:
        outcome = self._outcome(key, running)
        with self._lock:
            self._running.pop(key)
            closed = self._closed
            if not (closed or running.told):
                self._outcomes.put(outcome)
            self._start_next()
        if closed and self._abandoned is not None:
            self._abandoned(key)

    def _outcome(self, key: int, running: _Running) -> Outcome:
        value: Any = None
        for call in running.calls:
            with self._lock:
                if self._closed:
                    break
                running.call, running.start = call, time.monotonic()
            error: BaseException | None = None
            try:
                value = call.function()
                if isinstance(value, Awaitable):
                    value, error = self._awaited(value, running)
                if error is None and call.receive is not None:
                    call.receive(value)
            except BaseException as raised:  # in a thread, all that it raises is an answer to the trainer
                error = raised
            late = time.monotonic() - running.start > self._time_limit
            if late or error is not None:
                return Outcome(key, call, error=error, late=late)
        return Outcome(key, running.call, value)

    def _awaited(self, answer: Awaitable[Any], running: _Running) -> tuple[Any, BaseException | None]:
        with self._lock:
            if self._closed:
                return None, asyncio.CancelledError()
            running.future = event_loop.submit(_result(answer))
        value: tuple[Any, BaseException | None] = running.future.result()
        return value


def call_here(call: UserCall) -> None:
    """Make a call in this thread, without a limit. Raises what it raises."""
    value = call.function()
    if isinstance(value, Awaitable):
        _, error = event_loop.submit(_result(value)).result()
        if error is not None:
            raise error


async def _result(answer: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What an awaitable returns or raises; on the loop nothing may raise SystemExit."""
    torch.set_grad_enabled(True)  # in this thread, in which another function may have turned gradients off
    try:
        return await answer, None
    except (*RAISED, asyncio.CancelledError) as error:
        return None, error
