"""Coroutines of the user's, on one event loop that lasts as long as the process, in a thread of its own.

One loop for all calls: what a function keeps between them, a session or a lock, belongs to the loop it was made on. The
thread that trains only waits, as it does for a plain function, so signals are heard and no loop that runs there, as in
a notebook, is in the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import Any


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="fastppo-rewards", daemon=True).start()
    return loop


def begin(work: Any) -> Future[Any]:
    """Start a coroutine. It must raise no SystemExit, which would end the loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


def is_async(answer: object) -> bool:
    """Whether a function's answer is still to be awaited, as a whole or item by item."""
    return isinstance(answer, Awaitable | AsyncIterator)


async def settled(answer: Any) -> Any:
    """What comes of an answer: itself, what it is awaited to be, or the list of what it gives one by one."""
    if isinstance(answer, Awaitable):
        answer = await answer
    if isinstance(answer, AsyncIterator):
        answer = [item async for item in answer]
    return answer
