"""The processes in which answers are compared: few, started when there is something to compare, replaced when one ends.

They are programs of their own, not forks: the trainer's process holds threads, devices and pipes that a fork would
share. They end when their stdin does, at the latest when the process that started them has ended in any way.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from queue import LifoQueue
from threading import Lock
from typing import Any, NamedTuple

import torch

from fastppo.config import MOST_VERIFIERS
from fastppo.rewards.responses import RewardError

STARTING = 300.0  # seconds in which a process imports SymPy, on a machine that has much else to do
TRIES = 2  # of a task or a start whose process ends by something else than the limit, such as another program's signal

log = logging.getLogger("fastppo")


class Task(NamedTuple):
    """An answer to compare with a reference; without an answer, a reference to be read."""

    answer: str | None
    found: bool  # False: the answer is still to be found in the text
    reference: str


def verdicts(tasks: Sequence[Task], seconds: float) -> list[bool | None]:
    """For each task whether the answer equals the reference, or the reference can be read; None if the task took more
    than `seconds` of processor time, or twice ended its process.

    Raises RewardError if no process can be started.
    """
    return _pool(os.getpid()).run(tasks, seconds)


@cache
def _pool(pid: int) -> Pool:
    """The processes of this one; a fork of it starts its own."""
    return Pool(pid, max(min(MOST_VERIFIERS, torch.get_num_threads()), 1))


class Pool:
    """Processes that work on the tasks of one caller at a time."""

    def __init__(self, owner: int, size: int):
        self._owner, self._one_caller = owner, Lock()
        self._workers = [_Worker() for _ in range(size)]
        self._idle = LifoQueue[_Worker]()  # the last one that worked is the first to work, so few are started for few
        for worker in reversed(self._workers):
            self._idle.put(worker)
        atexit.register(self.close)

    def run(self, tasks: Sequence[Task], seconds: float) -> list[bool | None]:
        if not tasks:
            return []
        with self._one_caller, ThreadPoolExecutor(min(len(self._workers), len(tasks))) as threads:
            return list(threads.map(partial(self._verdict, seconds=seconds), tasks))

    def close(self) -> None:
        if os.getpid() == self._owner:
            for worker in self._workers:
                worker.stop()

    def _verdict(self, task: Task, seconds: float) -> bool | None:
        worker = self._idle.get()
        try:
            for _ in range(TRIES):
                try:
                    return worker.ask(task, seconds)
                except _OverLimitError:
                    return None
                except _EndedError:
                    continue
            return None
        finally:
            self._idle.put(worker)


class _EndedError(Exception):
    """The process has ended."""


class _OverLimitError(Exception):
    """The kernel has ended the process, since its task has used its processor time."""


class _Worker:
    """One process, with a task at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task, seconds: float) -> bool:
        """The verdict on a task. Raises _OverLimitError, _EndedError, or RewardError if no process can be started."""
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**task._asdict(), "seconds": seconds}).encode() + b"\n")
            process.stdin.flush()
            # Processor time is what is limited, and it takes its time where many processes share a core.
            said = _line(process, 20 * seconds + 60)
        except (_EndedError, OSError) as error:
            status = self.stop()
            raise (_OverLimitError if status == -signal.SIGPROF else _EndedError) from error
        if said["last"]:
            self.stop()
        return bool(said["verdict"])

    def stop(self) -> int | None:
        """End the process; returns its exit status, that of a kill if it had to be killed."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            status = process.wait(0.5)  # it ends when its stdin does, unless a task is at work
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        assert process.stdout is not None
        process.stdout.close()
        return status

    def _start(self, tries: int = TRIES) -> subprocess.Popen[bytes]:
        here = os.pathsep.join(path for path in sys.path if path)
        # Hashes decide in which order SymPy takes the parts of a set: with the same ones, all processes do the same.
        environment = {**os.environ, "PYTHONPATH": here, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-m", "fastppo.rewards.verify.worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self._process = subprocess.Popen(command, env=environment, **pipes)
            said = _line(self._process, STARTING)
        except (_EndedError, OSError) as error:
            status = self.stop() or 0
            ended = isinstance(error, _EndedError)
            if ended and status < 0 and tries > 1:
                log.warning("a process that verifies answers got signal %d while it started: started again", -status)
                return self._start(tries - 1)
            what = f"it ended with status {status}" if ended else str(error)
            raise RewardError(f"a process that verifies answers could not be started: {what}") from error
        if "error" in said:
            self.stop()
            raise RewardError(f"a process that verifies answers could not be started: {said['error']}")
        assert self._process is not None
        return self._process


def _line(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """The next line that a process writes. Raises _EndedError without one, TimeoutError after `seconds`."""
    assert process.stdout is not None
    handle, end, text = process.stdout.fileno(), time.monotonic() + seconds, b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([handle], [], [], max(end - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"it did not answer in {seconds:.0f} s")
        part = os.read(handle, 4096)
        if not part:
            raise _EndedError
        text += part
    said: dict[str, Any] = json.loads(text)
    return said
