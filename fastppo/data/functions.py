"""Functions of the user's that a setting names: `module:function` or `file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from fastppo.errors import FastPPOError

Function = Callable[..., Any]
F = TypeVar("F")

# What a function or a file may raise. Without SystemExit a run would end with no word of why, and on this rank alone.
RAISED = (Exception, SystemExit)


class FunctionError(FastPPOError):
    """A function of the user's that is not there, fails, or returns what cannot be used."""


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's; what it raises becomes a FunctionError that names the setting and the line."""

    setting: str  # as in `ppo.loss = file.py:function`
    function: Function
    folder: Path  # that it lies in

    def __call__(self, *args: Any) -> Any:
        try:
            return self.function(*args)
        except torch.OutOfMemoryError:  # has a message of its own (`fastppo.errors`)
            raise
        except RAISED as error:
            what = f"{type(error).__name__}: {error}"
            raise FunctionError(f"{self.setting} raised {what} ({innermost_line(error, self.folder)})") from error


def named_function(name: str, setting: str, table: Mapping[str, F]) -> F | UserFunction:
    """The function of a table by its name, else the user's own as `module:function` or `file.py:function`.

    setting: the setting that names it. Raises FunctionError, which lists the names of the table.
    """
    if name in table:
        return table[name]
    setting = f"{setting} = {name}"
    if ":" not in name:
        raise FunctionError(
            f"{setting}: there is no such name. Take one of {', '.join(table)}, or a function of your own as"
            " module:function or file.py:function."
        )
    return UserFunction(setting, *import_function(name, setting))


def innermost_line(error: BaseException, folder: Path) -> str:
    """Where it was raised: the innermost line in a file of the user's, which a library may have been called from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == folder]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def import_function(name: str, setting: str) -> tuple[Function, Path]:
    """`module:function`, the module importable from here, or `path/to/file.py:function`; and the folder it lies in.

    setting: the setting that names it, with the name, for errors. Raises FunctionError.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise FunctionError(f"{setting}: write it as module:function or file.py:function")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    except RAISED as error:
        raise FunctionError(
            f"{setting}: {module_name} could not be imported ({type(error).__name__}: {error})"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])) or "none"
        raise FunctionError(f"{setting}: {module_name} has no function {attribute}; it has: {found}")
    return cast("Function", function), Path(getattr(module, "__file__", None) or module_name).parent


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # the launcher's scripts do not see the folder they were started in
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    """The file as the module of its name, imported once; where another module has that name, with a number behind it.

    Its folder goes to the end of Python's path, so that it finds modules beside it and hides none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # the file may be newer than what Python knows of its folder
    stem = name = path.stem.replace(".", "_")
    others = count(2)
    while (spec := importlib.util.find_spec(name)) is not None:
        if spec.origin is not None and Path(spec.origin).resolve() == path:
            return importlib.import_module(name)
        name = f"{stem}_{next(others)}"
    return _import_as(name, path)


def _import_as(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
