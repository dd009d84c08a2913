"""The start of a run: each rank waits until all ranks are connected, logs which are missing, and has a time limit.

torch waits without a log line, as long as for a collective: half an hour, in which a RANK that another program left
in the environment would look like a busy run.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from ipaddress import ip_address
from threading import Thread

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from fastppo.config import NEEDED, LaunchError

log = logging.getLogger("fastppo")

# Seconds to wait for the other ranks. The ranks of one machine are started by one command and import the same modules;
# nodes may start minutes apart, for example if one of them downloads an image or waits in a queue.
ON_ONE_MACHINE, ON_SEVERAL = 60.0, 600.0
FIRST_LOG, LOG_INTERVAL = 5.0, 60.0  # seconds until the first log line about missing ranks; longest time between two
STORE_TIMEOUT = 10.0  # seconds for the answer of a store after its port accepts connections
POLL = 0.2  # seconds between two checks


def meet(timeout: float) -> Store | None:
    """Wait until every rank is connected; returns the store, which must be kept until torch has one at this address.

    timeout: seconds, an upper bound on the limits above. Raises LaunchError if a rank does not connect in time, and
    DistNetworkError for a port that is in use.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    waiting = _Waiting(min(ON_ONE_MACHINE if _on_one_machine(host, ranks) else ON_SEVERAL, timeout))
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # started by torchrun
    store: Store | None = None
    if rank == 0 and not agent_has_store:
        # "localhost" is certainly this machine; the next check shows whether MASTER_ADDR is this machine too
        store = TCPStore("localhost", port, ranks, True, timedelta(seconds=STORE_TIMEOUT), False, True)
    waiting.until_none(lambda: _connection_problem(host, port, rank))
    store = store or _client(host, port, rank, ranks)
    connected = PrefixStore("fastppo/here", store)  # rank -> host name
    connected.set(str(rank), socket.gethostname())
    waiting.until_none(lambda: _missing_ranks(connected, rank, ranks, f"{host}:{port}"))
    return store


def _on_one_machine(host: str, ranks: int) -> bool:
    """Whether all ranks run on this machine, from the launcher's variables or a loopback address.

    Host names other than localhost are not resolved: a name may be a loopback address on its own machine only.
    """
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    try:
        return local == str(ranks) or host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Waiting:
    """Waits for the other ranks within one time limit, and logs that it does."""

    def __init__(self, seconds: float):
        self._seconds, self._start = seconds, time.monotonic()
        self._next_log = FIRST_LOG

    def until_none(self, problem: Callable[[], str | None]) -> None:
        """Wait until `problem` returns None. Raises LaunchError with its last result after the time limit."""
        while (message := problem()) is not None:
            waited = time.monotonic() - self._start
            if waited > self._seconds:
                raise LaunchError(f"{message}, within {self._seconds:.0f} s. {_way_out()}")
            if waited > self._next_log:
                self._next_log += min(self._next_log, LOG_INTERVAL)
                log.warning("%s, for %.0f s now and at most %.0f s. %s", message, waited, self._seconds, _way_out())
            time.sleep(POLL)


def _connection_problem(host: str, port: int, rank: int) -> str | None:
    """Why no connection to the address of rank 0 is possible; None if one is."""
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError as error:
        reason = error.strerror or str(error)
        problem = "this machine does not answer at" if rank == 0 else "rank 0 has not answered at"
        return f"{_this_rank(rank)}: {problem} {host}:{port} (MASTER_ADDR, MASTER_PORT: {reason})"
    return None


def _client(host: str, port: int, rank: int, ranks: int) -> Store:
    """Connect to the store, in a thread: if another program listens at the port, torch ignores its timeout."""
    store: Future[Store] = Future()

    def connect() -> None:
        try:
            store.set_result(TCPStore(host, port, ranks, False, timedelta(seconds=STORE_TIMEOUT), False))
        except RuntimeError as error:  # DistError and its subclasses
            store.set_exception(error)

    Thread(target=connect, daemon=True).start()
    try:
        return store.result(STORE_TIMEOUT)
    except (TimeoutError, RuntimeError) as error:
        raise LaunchError(
            f"{_this_rank(rank)}: a program answers at {host}:{port} (MASTER_ADDR, MASTER_PORT), but it is not rank 0"
            f" of a run. {_way_out()}"
        ) from error


def _missing_ranks(connected: Store, rank: int, ranks: int, address: str) -> str | None:
    """A message that names the ranks that have not connected; None if all have."""
    try:
        absent = [other for other in range(ranks) if not connected.check([str(other)])]
    except RuntimeError as error:  # DistError and its subclasses
        raise LaunchError(
            f"{_this_rank(rank)}: rank 0, at {address}, has ended before all ranks were connected."
        ) from error
    if not absent:
        return None
    names = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    subject = f"rank {names} has" if len(absent) == 1 else f"ranks {names} have"
    return f"{_this_rank(rank)}: {subject} not connected to {address}"


def _this_rank(rank: int) -> str:
    return f"this is RANK {rank} of WORLD_SIZE {os.environ['WORLD_SIZE']}"


def _way_out() -> str:
    return (
        "Check that the other ranks have started and can reach this address. If this run should be a single process and"
        f" another program left these variables in the environment: `unset {' '.join(NEEDED)}`."
    )
