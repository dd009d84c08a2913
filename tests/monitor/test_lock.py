"""fastppo.monitor.lock: one run at a time in a folder, whatever it is called and however the other one ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fastppo.monitor import lock
from fastppo.monitor.lock import FolderInUse
from fastppo.monitor.run_dir import begin_folder, fresh_folder, lock_run_dir

HOLDER = """
import os, sys, time
from pathlib import Path
from fastppo.monitor.run_dir import lock_run_dir, fresh_folder
output = Path(sys.argv[1])
with lock_run_dir(output, 0):
    fresh_folder(output)
    (output / "metrics.jsonl").write_text('{"step": 1}\\n')
    heard, say = os.pipe()
    if sys.argv[2] == "forks":
        if os.fork() == 0:
            os.write(say, b"here")
            time.sleep(600)
        os.read(heard, 4)
    print("here", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(output: Path, how: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another run in the folder, in its first steps."""
    command = [sys.executable, "-c", HOLDER, str(output), how]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout is not None and run.stdout.readline() == "here\n"
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def begin(output: Path) -> None:
    with lock_run_dir(output, 0):
        fresh_folder(output)


def go_on(output: Path) -> None:
    with lock_run_dir(output, 0):
        begin_folder(output, {"metrics.jsonl": 0}, "")


@pytest.mark.parametrize("start", [begin, go_on])
def test_a_folder_in_use_is_refused_by_each_of_its_names_with_the_others_process_and_host(tmp_path, start):
    output, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(output)
    with another(output) as other:
        before = names(tmp_path)
        who = rf"process {other.pid} on {socket.gethostname()}, since 20.*kill {other.pid}.*--resume auto.*delete"
        for name in (output, link):
            with pytest.raises(FolderInUse, match=rf"^output = {name} is in use by another run \({who}"):
                start(name)
        assert names(tmp_path) == before and (output / "metrics.jsonl").read_text()


@pytest.mark.parametrize("how", ["", "forks"])
def test_a_run_that_was_killed_holds_no_lock_and_its_folder_is_an_earlier_runs(tmp_path, how):
    with another(tmp_path / "run", how) as other:
        other.kill()
        other.wait()
        begin(tmp_path / "run")
    assert names(tmp_path) == ["metrics.jsonl", "metrics.jsonl", "run", "run.1"]


def test_a_folder_that_another_run_makes_meanwhile_is_refused(tmp_path):
    output = tmp_path / "run"
    with (
        lock_run_dir(output, 0),
        another(output),
        pytest.raises(FolderInUse),
    ):  # the other began while this one looked around
        fresh_folder(output)


def test_the_new_folder_is_held_once_the_earlier_run_is_moved_aside_and_no_lock_stays(tmp_path):
    output = tmp_path / "run"
    begin(output)
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    with lock_run_dir(output, 0):
        fresh_folder(output)
        assert names(tmp_path / "run") == ["metrics.jsonl", "run.lock"] and names(tmp_path / "run.1") == [
            "metrics.jsonl"
        ]
        found = subprocess.run([sys.executable, "-c", HOLDER, str(output), ""], capture_output=True, text=True)
        assert f"FolderInUse: output = {output} is in use by another run (process {os.getpid()}" in found.stderr
    assert "run.lock" not in names(tmp_path)


def test_only_rank_0_holds_it(tmp_path):
    begin(tmp_path / "run")
    with lock_run_dir(tmp_path / "run", 1):
        assert names(tmp_path / "run") == ["metrics.jsonl"]
    with lock_run_dir(tmp_path / "run", 0):
        assert names(tmp_path / "run") == ["metrics.jsonl", "run.lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path, number, monkeypatch, caplog):
    def refuse(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    begin(tmp_path / "run")
    assert f"cannot be locked ({os.strerror(number)}): a second run" in caplog.text


def test_a_lock_of_another_user_and_one_on_a_full_disk_hold(tmp_path, monkeypatch):
    real = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, mode)

    output = fresh_folder(tmp_path / "run")
    (output / lock.NAME).touch()
    monkeypatch.setattr(os, "open", read_only)
    with lock_run_dir(output, 0), pytest.raises(FolderInUse, match="its process is not known yet"):
        lock._open_locked(output / lock.NAME, output)
