"""One run at a time in a folder: a lock that ends with the process that holds it, however that ends.

It is a `flock` on a file in the folder, so it holds for every name of the folder, on every machine that shares it, and
goes along when the folder is renamed. Rank 0 holds it for the whole run. Readers, like the report, need none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fastppo.errors import FastPPOError

log = logging.getLogger("fastppo")

NAME = "run.lock"
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # how file systems say that another process has a lock


class FolderInUse(FastPPOError):
    """Another run is in the folder. The message says which, and the ways out."""


@contextmanager
def claiming(rank: int) -> Iterator[None]:
    """Within this context `take` holds locks; at its end they are let go, and their files are gone.

    rank: of this process; only rank 0 takes any.
    """
    global _claim
    before, _claim = _claim, _Claim() if rank == 0 else None
    try:
        yield
    finally:
        if _claim is not None:
            _claim.let_go()
        _claim = before


def take(folder: Path, output: Path) -> None:
    """Hold the lock of this folder, which exists, in the place of another folder's.

    output: the folder by the name that the user gave it. Raises FolderInUse if another run has it. Where a file system
    keeps no locks, or takes no file, the log says that a second run would not be noticed. Does nothing outside of
    `claiming`.
    """
    if _claim is not None:
        _claim.take(folder / NAME, output)


def moved(folder: Path) -> None:
    """The folder whose lock is held is here now."""
    if _claim is not None and _claim.path is not None:
        _claim.path = folder / NAME


class _Claim:
    """The lock that this process holds, if any."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._handle: int | None = None

    def take(self, path: Path, output: Path) -> None:
        if path == self.path and self._handle is not None and _is_at(self._handle, path):
            return
        try:
            handle = _locked(path, output)
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): a second run with output = %s would not be noticed, and would mix its files"
                " with those of this one",
                path,
                error.strerror,
                output,
            )
            return
        self.let_go()
        self.path, self._handle = path, handle

    def let_go(self) -> None:
        """The file goes first: a process that waits for nothing finds it gone, and makes another."""
        if self._handle is not None and self.path is not None:
            with suppress(OSError):
                if _is_at(self._handle, self.path):
                    self.path.unlink()
            os.close(self._handle)
        self.path = self._handle = None

    def forget(self) -> None:
        """In a fork: the lock is its parent's, and ends with it."""
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
        self.path = self._handle = None


_claim: _Claim | None = None
os.register_at_fork(after_in_child=lambda: _claim.forget() if _claim is not None else None)


def _locked(path: Path, output: Path) -> int:
    """A handle of the file that has the lock. Raises FolderInUse, or OSError where there can be none."""
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            if error.errno in HELD:
                raise FolderInUse(_in_use(path, output, holder)) from None
            raise
        if _is_at(handle, path):
            break
        os.close(handle)  # its holder has just let go of it, and taken the file away
    me = {"process": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    with suppress(OSError):  # on a full disk, or in another user's file, the lock holds as well
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
    return handle


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's, which can be locked all the same
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _in_use(path: Path, output: Path, holder: bytes) -> str:
    try:
        said: dict[str, Any] = json.loads(holder)
        who = f"process {said['process']} on {said['host']}, since {said['since']}"
        end = f"end that one (`kill {said['process']}` on {said['host']}; it saves itself)"
    except (ValueError, KeyError, TypeError):  # written in this moment
        who, end = "which has not said yet who it is", "end that one"
    return (
        f"output = {output} is in use by another run ({who}). Two runs in one folder would mix their metrics and"
        f" checkpoints. Give another --output, or {end} and go on in its place with --resume auto. The lock ends with"
        f" the process that holds it; if its machine is gone and a network file system has not noticed, delete {path}."
    )
