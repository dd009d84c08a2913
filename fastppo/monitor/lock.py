"""A lock on a run's folder, so that only one run at a time uses it. It ends with its process, even if that is killed.

The lock is a `flock` on a file in the folder. It therefore holds for every path to the folder and for every machine
that shares it, and stays valid when the folder is renamed. Rank 0 holds it for the whole run. Processes that only read
the folder, such as the report, need no lock.
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
# The errors by which file systems report that another process holds the lock.
HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderInUse(FastPPOError):
    """Another run uses the folder. The message names its process and the ways out."""


@contextmanager
def lock_scope(rank: int) -> Iterator[None]:
    """A context in which `acquire` takes locks; at its end they are released and their files deleted.

    rank: of this process; only rank 0 takes locks.
    """
    global _lock
    outer, _lock = _lock, _FolderLock() if rank == 0 else None
    try:
        yield
    finally:
        if _lock is not None:
            _lock.release()
        _lock = outer


def acquire(folder: Path, output: Path) -> None:
    """Lock this folder, which exists, and release the lock of the folder before it. Does nothing outside `lock_scope`.

    output: the path of the folder as the user gave it, for messages. Raises FolderInUse if another run holds the lock.
    If the file system has no locks or the file cannot be created, a warning says that a second run would not be
    noticed.
    """
    if _lock is not None:
        _lock.acquire(folder / NAME, output)


def folder_renamed(folder: Path) -> None:
    """Record the new path of the folder whose lock is held."""
    if _lock is not None and _lock.path is not None:
        _lock.path = folder / NAME


class _FolderLock:
    """The lock that this process holds, if any."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._handle: int | None = None

    def acquire(self, path: Path, output: Path) -> None:
        if path == self.path and self._handle is not None and _is_same_file(self._handle, path):
            return
        try:
            handle = _open_locked(path, output)
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): a second run with output = %s would not be noticed, and would mix its files"
                " with those of this run",
                path,
                error.strerror,
                output,
            )
            return
        self.release()
        self.path, self._handle = path, handle

    def release(self) -> None:
        """Delete the file first, then close it: a process that gets the lock in between sees that the file is gone
        and creates a new one."""
        if self._handle is not None and self.path is not None:
            with suppress(OSError):
                if _is_same_file(self._handle, self.path):
                    self.path.unlink()
            os.close(self._handle)
        self.path = self._handle = None

    def close_in_child(self) -> None:
        """Close a forked child's copy of the handle: the lock belongs to the parent and ends with it."""
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
        self.path = self._handle = None


_lock: _FolderLock | None = None
os.register_at_fork(after_in_child=lambda: _lock.close_in_child() if _lock is not None else None)


def _open_locked(path: Path, output: Path) -> int:
    """Open and lock the file; returns its descriptor. Raises FolderInUse, or OSError if locking is not possible."""
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            if error.errno in HELD_BY_ANOTHER:
                raise FolderInUse(_in_use_message(path, output, holder)) from None
            raise
        if _is_same_file(handle, path):
            break
        os.close(handle)  # the previous holder has deleted the file between the open and the lock
    this_run = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    with suppress(OSError):  # the lock holds even if this cannot be written: full disk, or a file of another user
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(this_run).encode(), 0)
    return handle


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # a file of another user can still be locked
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _in_use_message(path: Path, output: Path, holder: bytes) -> str:
    """The error for the user. holder: the content of the lock file, JSON with process, host and since."""
    try:
        run: dict[str, Any] = json.loads(holder)
        description = f"process {run['process']} on {run['host']}, since {run['since']}"
        end = f"end that run (`kill {run['process']}` on {run['host']}; it saves a checkpoint)"
    except (ValueError, KeyError, TypeError):  # the other run has the lock and is about to write these
        description, end = "its process is not known yet", "end that run"
    return (
        f"output = {output} is in use by another run ({description}). Two runs in one folder would mix their metrics"
        f" and checkpoints. Give another --output, or {end} and continue it with --resume auto. The lock ends with"
        f" the process that holds it; if its machine is gone and a network file system has not noticed, delete {path}."
    )
