"""The folder of a run: creating it, continuing in it, and its JSONL files, which can be read while a run writes them.

A JSONL file has one JSON object per line, each with the `step` that it belongs to.
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

METRICS = "metrics.jsonl"  # a folder with this file is the folder of a run
CONFIG = "config.yaml"
RESPONSES = "responses.jsonl"
ALARMS = "alarms.jsonl"
MAX_PENDING_BYTES = 64 << 20  # of lines that are held in memory while a file cannot be written
JSONL_FILES = (METRICS, RESPONSES, ALARMS)  # grow with every step; truncated to the checkpoint's step on resuming


class RunFolderError(FastPPOError):
    """A folder that cannot be used for a run, or a file in it that cannot be read. The message names the way out."""


@contextmanager
def lock_run_dir(output: Path, rank: int) -> Iterator[None]:
    """A context in which no other run can start or continue in `output`. All ranks enter it; rank 0 holds the lock.

    A folder that does not exist yet is locked when `fresh_folder` creates it. Raises lock.FolderInUse.
    """
    with lock.lock_scope(rank):
        if rank == 0 and (output / METRICS).is_file():
            lock.acquire(output.resolve(), output)
        yield


def check_folder(output: Path) -> None:
    """Check, without changing anything, that `fresh_folder` can use `output`. Rank 0 only. Raises RunFolderError."""
    with _explained_errors(output):
        if not output.resolve().exists() or _is_unused(output):
            return
        if not (output / METRICS).is_file():
            raise RunFolderError(
                f"output = {output} exists and is not the folder of a run (it has no {METRICS}). Give another --output."
            )
        if Path.cwd().is_relative_to(output.resolve()):
            raise RunFolderError(
                f"output = {output} is the current folder or one of its parents. Give another --output."
            )


def fresh_folder(output: Path) -> Path:
    """Create `output` as an empty run folder and return it; an earlier run is renamed to `output`.1, .2, ...

    If `output` is a symbolic link it stays one and points to the new folder; the old target is renamed.
    The folder of a run that ended before its first line, for example because of a wrong setting, is reused.
    Rank 0 only, before the other ranks use the folder.
    Raises RunFolderError if `output` contains something other than a run, or cannot be created.
    """
    check_folder(output)
    with _explained_errors(output):
        target = output.resolve()
        if target.exists():
            lock.acquire(target, output)
            if not _is_unused(target):
                _move_aside(output)
        target.mkdir(parents=True, exist_ok=True)
        lock.acquire(target, output)
        (target / METRICS).touch()
    return output


@contextmanager
def _explained_errors(output: Path) -> Iterator[None]:
    """Turn errors of the file system inside this context into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"output = {output} cannot be created ({error.strerror}). Give another --output."
        ) from error
    except RuntimeError as error:  # Python 3.11 raises it for a loop of symbolic links
        raise RunFolderError(f"output = {output} is a symbolic link to itself. Give another --output.") from error


def _is_unused(output: Path) -> bool:
    if not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()}
    return names <= {METRICS, CONFIG, lock.NAME} and not any(file_sizes(output).values())


def _move_aside(output: Path) -> None:
    target, n = output.resolve(), 1
    while (aside := target.with_name(f"{target.name}.{n}")).exists():
        n += 1
    target.rename(aside)
    lock.folder_renamed(aside)
    log.info("%s contained an earlier run; it is renamed to %s", output, aside.name)


def file_sizes(output: Path) -> dict[str, int]:
    """The size in bytes of each JSONL file in the folder `output`; 0 for one that does not exist."""
    return {name: path.stat().st_size if (path := output / name).exists() else 0 for name in JSONL_FILES}


def begin_folder(output: Path, sizes: Mapping[str, int] | None, settings: str) -> None:
    """Create the folder of a new run, or truncate the files of a resumed one; then write its settings.

    sizes: the `file_sizes` at the checkpoint that a run resumes from; None: a new run. settings: the content of
    `config.yaml`. Rank 0 only, before the other ranks use the folder. Raises RunFolderError.
    """
    fresh_folder(output) if sizes is None else continue_folder(output, sizes)
    draft = output / f".{CONFIG}"  # written directly, the old file would be lost if the disk is full
    try:
        draft.write_text(settings, encoding="utf-8")
        draft.replace(output / CONFIG)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if sizes is None:
            raise RunFolderError(
                f"output = {output}: nothing can be written there ({error.strerror}). Free some space, or give another"
                " --output."
            ) from error
        log.error("%s could not be written (%s); the old file stays", output / CONFIG, error.strerror)


def continue_folder(output: Path, sizes: Mapping[str, int]) -> None:
    """Truncate the JSONL files in `output` to `sizes`, those at a checkpoint, so that no step is in them twice.

    Rank 0 only, before the other ranks use the folder. Raises RunFolderError.
    """
    for name, size in sizes.items():
        if size == 0 and not (output / name).exists():
            continue
        try:
            _truncate(output / name, size)
        except OSError as error:
            raise RunFolderError(f"output = {output} cannot be continued ({error}). Make it writable.") from error


def _truncate(path: Path, size: int) -> None:
    """Truncate a file to `size` bytes; one that is shorter, to its last complete line."""
    with open(path, "ab+") as file:
        if (
            file.seek(0, 2) < size
        ):  # possible after a power failure: the checkpoint was on the disk, these lines not yet
            log.warning("%s ends before the checkpoint's step; lines are missing", path)
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
        file.truncate(size)


class JsonlFile:
    """A JSONL file to append to. It contains complete lines only; lines that cannot be written are kept in memory, up
    to `MAX_PENDING_BYTES`, and written with the next ones."""

    def __init__(self, path: Path):
        self._path = path.resolve()  # the working directory of the process may change
        self._pending = b""

    def add(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """Append a line per record, after the pending ones. Raises OSError if not all of them could be written."""
        # a lone surrogate is written as \ud800, as in JSON
        lines = "".join(json_line(record) for record in records).encode("utf-8", "backslashreplace")
        if len(self._pending) + len(lines) <= MAX_PENDING_BYTES:
            self._pending += lines
        with open(self._path, "ab", buffering=0) as file:
            size, remaining = os.fstat(file.fileno()).st_size, memoryview(self._pending)
            try:
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
        self._pending = b""

    def drop_pending(self) -> int:
        """Discard the pending lines; returns their number."""
        lines, self._pending = self._pending.count(b"\n"), b""
        return lines


def json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON. It has no NaN and no infinity: as values or in lists they are written as null."""
    finite = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file; None stands for a number that was not finite.

    A last line without a line end is skipped: a run is writing it, or was killed while writing it. Raises
    RunFolderError if any other line is not a JSON object, or if the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read ({error.strerror}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise _line_error(path, number, f"is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise _line_error(path, number, "is not a JSON object")
        records.append(record)
    return records


def _line_error(path: Path, number: int, problem: str) -> RunFolderError:
    return RunFolderError(f"{path}, line {number}: this {problem}. Correct the line, or remove it.")
