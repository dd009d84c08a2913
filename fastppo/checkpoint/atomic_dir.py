"""Directories that appear atomically: complete or not at all, even if the process or the machine dies while writing.

The files are written into a directory with a temporary name beside the final one and synced to the disk; then a
manifest with the size and the SHA-256 of every file is written, the directories are synced, and the temporary directory
is renamed. A directory without the temporary prefix is therefore complete, and the manifest shows later damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MANIFEST = "manifest.json"
FORMAT = 1
UNFINISHED = ".unfinished-"  # prefix of a folder that is being written, or deleted


@dataclass(frozen=True)
class File:
    """The size and the hash of a complete file, as in the manifest."""

    name: str  # relative to the folder, with / as separator
    bytes: int
    sha256: str


class Writer:
    """Writes one rank's files of a folder. The first failure is stored in `error`; after it nothing is written.

    It is not raised because DeepSpeed calls `save` between collectives: the other ranks would wait for this rank.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[File] = []
        self.error: str | None = None

    def save(self, state: Any, path: Path) -> None:
        """Save `state` with `torch.save`. path: inside the folder."""
        self._write(path, lambda file: torch.save(state, file))

    def save_text(self, text: str, path: Path) -> None:
        self._write(path, lambda file: file.write(text.encode()))

    def _write(self, path: Path, fill: Any) -> None:
        if self.error is not None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as raw:
                file = _Hashed(raw)
                fill(file)
                file.finish()
        except (OSError, RuntimeError) as error:  # torch turns some OSErrors into RuntimeErrors
            self.error = f"{path.name}: {getattr(error, 'strerror', None) or error}"
            return
        name = path.relative_to(self.folder).as_posix()
        self.files.append(File(name, file.size, file.digest.hexdigest()))


class _Hashed:
    """A file that computes the hash of the data passed to it; a full or faulty disk may store something else."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._error = raw, None  # type: BinaryIO, OSError | None
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write; an error is raised later, by `finish`, since torch's C++ writer, which calls this, would crash."""
        if self._error is None:
            try:
                self._raw.write(content)
                self.digest.update(content)
                self.size += memoryview(content).nbytes
            except OSError as error:
                self._error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        self._raw.flush()
        os.fsync(self._raw.fileno())


def unfinished(folder: Path) -> Path:
    """The temporary name of a folder."""
    return folder.with_name(UNFINISHED + folder.name)


def begin(folder: Path) -> Path:
    """Create an empty folder under the temporary name of `folder`."""
    draft = unfinished(folder)
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    return draft


def finish(draft: Path, folder: Path, files: Iterable[File]) -> None:
    """Write the manifest and rename `draft` to `folder`. files: those in `draft`, all synced. Raises OSError."""
    writer = Writer(draft)
    manifest = {"format": FORMAT, "files": [asdict(file) for file in files]}
    writer.save_text(json.dumps(manifest, indent=1), draft / MANIFEST)
    if writer.error is not None:
        raise OSError(writer.error)
    for directory in [draft, *(path for path in draft.rglob("*") if path.is_dir())]:
        sync(directory)
    draft.rename(folder)
    sync(folder.parent)


def replace(draft: Path, folder: Path) -> None:
    """Sync `draft` and rename it to `folder`, then delete the earlier content of `folder`. Raises OSError."""
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    old = unfinished(folder.with_name(f"{folder.name}-old"))
    if old.exists():
        shutil.rmtree(old)
    if folder.is_symlink():  # the target of the link is not part of the run's folder and stays
        folder.unlink()
    elif folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that after an interruption it does not count as complete."""
    draft = unfinished(folder)
    if draft.exists():
        shutil.rmtree(draft)
    folder.rename(draft)
    shutil.rmtree(draft)


def remove_unfinished(parent: Path) -> None:
    """Delete the incomplete folders of earlier attempts."""
    for path in parent.glob(UNFINISHED + "*"):
        with contextlib.suppress(OSError):  # an incomplete folder that stays does no harm
            shutil.rmtree(path)


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Compare a folder with its manifest; returns a description of the damage, None if there is none.

    Hashing takes time, so that ranks can share it: this call checks every `parts`-th file from index `part`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, and this version of fastppo reads format {FORMAT}"
        files = [File(**file) for file in manifest["files"]]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for file in files[part::parts]:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                return f"{file.name} has {size} bytes instead of {file.bytes}"
            with open(path, "rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    return f"{file.name} is damaged (its hash is not the one in {MANIFEST})"
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
    return None


def sync(path: Path) -> None:
    """Write a file's content, or a folder's entries, from the system's cache to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
