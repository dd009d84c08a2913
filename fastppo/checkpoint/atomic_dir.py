"""Folders that are either whole or not there, whatever happens while they are written.

A folder is filled under a temporary name beside its own, each file synced to the disk, then a manifest with the size
and the hash of every file, then the folders; renaming it comes last. So a name without the prefix of unfinished ones
belongs to a folder that was written to its end, and the manifest tells whether it still is what was written.
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
UNFINISHED = ".unfinished-"  # a folder on its way in, or out


@dataclass(frozen=True)
class File:
    """What a file must be to count as whole."""

    name: str  # below the folder, with /
    bytes: int
    sha256: str


class Writer:
    """Writes one rank's files of a folder. A failure is kept in `error`, and nothing is written after it.

    It is not raised, since that could be where DeepSpeed asks for a file: the other ranks would then wait in a
    collective.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[File] = []
        self.error: str | None = None

    def save(self, state: Any, path: Path) -> None:
        """`torch.save` to a path below the folder."""
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
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of some
            self.error = f"{path.name}: {getattr(error, 'strerror', None) or error}"
            return
        name = path.relative_to(self.folder).as_posix()
        self.files.append(File(name, file.size, file.digest.hexdigest()))


class _Hashed:
    """A file that knows the hash of what it was given, which a full disk or a bad one may not hold afterwards."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._error = raw, None  # type: BinaryIO, OSError | None
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Errors wait for `finish`: torch's C++ writer, which calls this, does not survive them."""
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
    """An empty folder under the temporary name of `folder`."""
    draft = unfinished(folder)
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    return draft


def finish(draft: Path, folder: Path, files: Iterable[File]) -> None:
    """Make the draft, which holds these files, all synced, the folder. Raises OSError."""
    writer = Writer(draft)
    manifest = {"format": FORMAT, "files": [asdict(file) for file in files]}
    writer.save_text(json.dumps(manifest, indent=1), draft / MANIFEST)
    if writer.error is not None:
        raise OSError(writer.error)
    for prefix_states in [draft, *(path for path in draft.rglob("*") if path.is_dir())]:
        sync(prefix_states)
    draft.rename(folder)
    sync(folder.parent)


def replace(draft: Path, folder: Path) -> None:
    """Make the draft the folder, once it is on the disk; what was there gives way then. Raises OSError."""
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    old = unfinished(folder.with_name(f"{folder.name}-old"))
    if old.exists():
        shutil.rmtree(old)
    if folder.is_symlink():  # the folder that it leads to is somebody's, and no part of the run's
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
    """Delete a folder; cut off in the middle it is no longer one that counts as whole."""
    draft = unfinished(folder)
    if draft.exists():
        shutil.rmtree(draft)
    folder.rename(draft)
    shutil.rmtree(draft)


def remove_unfinished(parent: Path) -> None:
    """Delete what earlier attempts left behind."""
    for path in parent.glob(UNFINISHED + "*"):
        with contextlib.suppress(OSError):  # it is in nobody's way
            shutil.rmtree(path)


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder, None if nothing is. Reading it all takes time: `part` of `parts` takes its share."""
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
                return f"{file.name} has {size} bytes and not {file.bytes}"
            with open(path, "rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    return f"{file.name} is damaged (its hash is not the one in {MANIFEST})"
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
    return None


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
