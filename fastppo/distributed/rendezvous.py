"""Where the ranks of a run meet: each waits for all of them, says for whom, and does not wait for ever.

torch waits without a word, as long as for a collective: half an hour, in which a RANK that another program has left in
the environment looks like a run that is busy.
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

# Seconds to wait for the others. Those of one machine are started by one command, and import the same; nodes may be
# minutes apart, while one of them fetches an image or waits in a queue.
ON_ONE_MACHINE, ON_SEVERAL = 60.0, 600.0
FIRST_WORD, LAST_WORD = 5.0, 60.0  # seconds until the log says for whom, and between two such lines in the end
ANSWER = 10.0  # seconds that a store may take to answer, once somebody listens there
POLL = 0.2


def meet(timeout: float) -> Store | None:
    """Wait until every rank is there; returns the store, to be kept until torch has one of its own at that address.

    timeout: seconds, if the bounds above are to be lower. Raises LaunchError if a rank does not come, and
    DistNetworkError for a port that is in use.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    within = _Patience(min(ON_ONE_MACHINE if _on_one_machine(host, ranks) else ON_SEVERAL, timeout))
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store then
    store: Store | None = None
    if rank == 0 and not agents:
        # under a name that is this machine for certain; whether MASTER_ADDR leads here shows next
        store = TCPStore("localhost", port, ranks, True, timedelta(seconds=ANSWER), False, True)
    within.wait(lambda: _unanswered(host, port, rank))
    store = store or _client(host, port, rank, ranks)
    said = PrefixStore("fastppo/here", store)
    said.set(str(rank), socket.gethostname())
    within.wait(lambda: _missing(said, rank, ranks, f"{host}:{port}"))
    return store


def _on_one_machine(host: str, ranks: int) -> bool:
    """By what the launcher says, or an address that is of no other; a name may resolve to such a one at home only."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    try:
        return local == str(ranks) or host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Patience:
    """How long the others are waited for, and when that is said."""

    def __init__(self, seconds: float):
        self._seconds, self._start = seconds, time.monotonic()
        self._word = FIRST_WORD

    def wait(self, missing: Callable[[], str | None]) -> None:
        """Until `missing` says None. Raises LaunchError with what it says once the time is over."""
        while (what := missing()) is not None:
            waited = time.monotonic() - self._start
            if waited > self._seconds:
                raise LaunchError(f"{what}, within {self._seconds:.0f} s. {_way_out()}")
            if waited > self._word:
                self._word += min(self._word, LAST_WORD)
                log.warning("%s, for %.0f s now and at most %.0f s. %s", what, waited, self._seconds, _way_out())
            time.sleep(POLL)


def _unanswered(host: str, port: int, rank: int) -> str | None:
    """Why nobody can be reached at the address where the ranks meet; None if somebody can."""
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError as error:
        why = error.strerror or str(error)
        who = "this machine does not answer to" if rank == 0 else "rank 0 has not answered at"
        return f"{_who(rank)}: {who} {host}:{port} (MASTER_ADDR, MASTER_PORT: {why})"
    return None


def _client(host: str, port: int, rank: int, ranks: int) -> Store:
    """In a thread: with something else than a store at that port, torch would wait for it whatever the timeout."""
    made: Future[Store] = Future()

    def connect() -> None:
        try:
            made.set_result(TCPStore(host, port, ranks, False, timedelta(seconds=ANSWER), False))
        except RuntimeError as error:  # DistError and its kin
            made.set_exception(error)

    Thread(target=connect, daemon=True).start()
    try:
        return made.result(ANSWER)
    except (TimeoutError, RuntimeError) as error:
        raise LaunchError(
            f"{_who(rank)}: something answers at {host}:{port} (MASTER_ADDR, MASTER_PORT), but it is not rank 0 of a"
            f" run. {_way_out()}"
        ) from error


def _missing(said: Store, rank: int, ranks: int, where: str) -> str | None:
    try:
        absent = [other for other in range(ranks) if not said.check([str(other)])]
    except RuntimeError as error:  # DistError and its kin
        raise LaunchError(f"{_who(rank)}: rank 0, at {where}, has ended while it was waited for.") from error
    if not absent:
        return None
    names = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    them = f"rank {names} has" if len(absent) == 1 else f"ranks {names} have"
    return f"{_who(rank)}: {them} not come to {where}"


def _who(rank: int) -> str:
    return f"this is RANK {rank} of WORLD_SIZE {os.environ['WORLD_SIZE']}"


def _way_out() -> str:
    return (
        "See whether the others have started and reach this address. If nobody started them, and these variables are"
        f" left over in the environment: `unset {' '.join(NEEDED)}`."
    )
