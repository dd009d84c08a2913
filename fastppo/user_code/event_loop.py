"""The event loop for coroutines of the user: one per process, in a separate thread.

All calls use the same loop because objects that a function keeps between calls, such as a session or a lock, belong to
the loop on which they were created. The training thread only waits, as for a plain function, so that signals are
handled; an event loop that already runs in that thread, as in a notebook, is no problem.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from functools import cache
from threading import Lock, Thread
from typing import Any

_starting = Lock()  # threads may ask for the loop at the same time


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="fastppo-user-code", daemon=True).start()
    return loop


def submit(coroutine: Any) -> Future[Any]:
    """Start a coroutine on the loop. It must not raise SystemExit, which would end the loop."""
    with _starting:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop)


def is_async(answer: object) -> bool:
    """Whether a function's return value must be awaited, or iterated asynchronously."""
    return isinstance(answer, Awaitable | AsyncIterator)


async def resolve(answer: Any) -> Any:
    """The value of a function's return value: awaited if it is awaitable, and as a list if it is an asynchronous
    iterator."""
    if isinstance(answer, Awaitable):
        answer = await answer
    if isinstance(answer, AsyncIterator):
        answer = [item async for item in answer]
    return answer
