"""The folder of a run: made anew, gone on in, and its files of lines, which are read while they are written.

A file of lines (JSONL) has one JSON object a line, each with the `step` it belongs to.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastppo.errors import FastPPOError
from fastppo.monitor import lock

log = logging.getLogger("fastppo")

METRICS = "metrics.jsonl"  # a folder with this file is a run's
CONFIG = "config.yaml"
RESPONSES = "responses.jsonl"
ALARMS = "alarms.jsonl"
MOST_WAITING = 64 << 20  # bytes of lines that are kept while a file takes none
LINES = (METRICS, RESPONSES, ALARMS)  # what grows with the steps, and goes back with them when a run is resumed


class RunFolderError(FastPPOError):
    """A folder that cannot be the run's, or a file in it that cannot be read. The message names the way out."""


@contextmanager
def claimed(output: Path, rank: int) -> Iterator[None]:
    """Within this context no other run can begin in `output`, or go on there. For every rank; rank 0 holds the lock.

    A folder that is not there yet is locked where it is made (`fresh_folder`). Raises lock.FolderInUse.
    """
    with lock.claiming(rank):
        if rank == 0 and (output / METRICS).is_file():
            lock.take(output.resolve(), output)
        yield


def check_folder(output: Path) -> None:
    """Whether `fresh_folder` can take `output`, as far as a look tells. For rank 0 alone. Raises RunFolderError."""
    with _told(output):
        if not output.resolve().exists() or _is_unused(output):
            return
        if not (output / METRICS).is_file():
            raise RunFolderError(
                f"output = {output} exists and is not the folder of a run (it has no {METRICS}). Give another --output."
            )
        if Path.cwd().is_relative_to(output.resolve()):
            raise RunFolderError(
                f"output = {output} is the folder that you are in, or above it. Give another --output."
            )


def fresh_folder(output: Path) -> Path:
    """Make `output` an empty run folder and return it; an earlier run there is moved aside to `output`.1, .2, ...

    Where `output` is a symbolic link it stays one, and leads to the new folder; the one it led to is moved aside.
    A run that ended before its first line, like one whose config is wrong, leaves nothing to keep: its folder is taken.
    To be called by rank 0 alone, before the other ranks touch the folder.
    Raises RunFolderError if `output` holds something else than a run, or cannot be made.
    """
    check_folder(output)
    with _told(output):
        where = output.resolve()
        if where.exists():
            lock.take(where, output)
            if not _is_unused(where):
                _move_aside(output)
        where.mkdir(parents=True, exist_ok=True)
        lock.take(where, output)
        (where / METRICS).touch()
    return output


@contextmanager
def _told(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"output = {output} cannot be made ({error.strerror}). Give another --output.") from error
    except RuntimeError as error:  # how Python 3.11 puts it
        raise RunFolderError(f"output = {output} is a symbolic link to itself. Give another --output.") from error


def _is_unused(output: Path) -> bool:
    if not output.is_dir():
        return False
    return {path.name for path in output.iterdir()} <= {METRICS, CONFIG, lock.NAME} and not any(sizes(output).values())


def _move_aside(output: Path) -> None:
    where, n = output.resolve(), 1
    while (aside := where.with_name(f"{where.name}.{n}")).exists():
        n += 1
    where.rename(aside)
    lock.moved(aside)
    log.info("%s held an earlier run, which is now %s", output, aside.name)


def sizes(output: Path) -> dict[str, int]:
    """Bytes of each file of lines in the folder `output`; 0 for one that is not there."""
    return {name: path.stat().st_size if (path := output / name).exists() else 0 for name in LINES}


def begin_folder(output: Path, then: Mapping[str, int] | None, settings: str) -> None:
    """The folder of a run from the start, or of one that goes on where its files had the `sizes` then; its settings.

    To be called by rank 0 alone, before the other ranks touch the folder. Raises RunFolderError.
    """
    fresh_folder(output) if then is None else continue_folder(output, then)
    draft = output / f".{CONFIG}"  # a full disk would leave an empty file in the place of the one that was there
    try:
        draft.write_text(settings, encoding="utf-8")
        draft.replace(output / CONFIG)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if then is None:
            raise RunFolderError(
                f"output = {output}: nothing can be written there ({error.strerror}). Make room, or give another"
                " --output."
            ) from error
        log.error("%s could not be written (%s), and stays as it was", output / CONFIG, error.strerror)


def continue_folder(output: Path, then: Mapping[str, int]) -> None:
    """Bring the files of lines in `output` back to the `sizes` they had then, so that no step is in them twice.

    To be called by rank 0 alone, before the other ranks touch the folder.
    """
    for name, size in then.items():
        if size == 0 and not (output / name).exists():
            continue
        try:
            _cut(output / name, size)
        except OSError as error:
            raise RunFolderError(f"output = {output} cannot be continued ({error}). Make it writable.") from error


def _cut(path: Path, size: int) -> None:
    with open(path, "ab+") as lines:
        if lines.seek(0, 2) < size:  # a machine that lost power may have kept the checkpoint and lost these lines
            log.warning("%s ends before the checkpoint's step; lines are missing", path)
            lines.seek(0)
            size = lines.read().rfind(b"\n") + 1
        lines.truncate(size)


class Lines:
    """A file of lines that grows. What cannot be written waits for the next time, and the file has whole lines only."""

    def __init__(self, path: Path):
        self._path = path.resolve()  # wherever the process goes
        self._waiting = b""

    def add(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Append a line for each record. Raises OSError if they are not all on the disk now."""
        # a lone surrogate is written as \ud800, which is how JSON has it
        lines = "".join(as_line(record) for record in records).encode("utf-8", "backslashreplace")
        if len(self._waiting) + len(lines) <= MOST_WAITING:
            self._waiting += lines
        with open(self._path, "ab", buffering=0) as file:
            size, left = os.fstat(file.fileno()).st_size, memoryview(self._waiting)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
        self._waiting = b""

    def drop(self) -> int:
        """Forget the lines that wait; returns how many."""
        lines, self._waiting = self._waiting.count(b"\n"), b""
        return lines


def as_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, which has no NaN and no infinities: alone or in a list they become null."""
    finite = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of lines; null (None) is a number that was not finite.

    A last line that has no end yet is left out: a run is writing it, or was killed at it. Raises RunFolderError if
    another line is no JSON object, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read ({error.strerror}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise _broken(path, number, f"is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise _broken(path, number, "is no JSON object")
        records.append(record)
    return records


def _broken(path: Path, number: int, what: str) -> RunFolderError:
    return RunFolderError(f"{path}, line {number}: this {what}. Mend the line, or remove it.")
