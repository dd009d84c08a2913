"""The user's own functions and classes, which settings name as `module:NAME` or `file.py:NAME`."""

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
from typing import Any, NamedTuple, TypeVar

from fastppo.errors.messages import ANOTHER_RANK_ENDED, FastPPOError

F = TypeVar("F")

# What user code may raise. SystemExit is included: otherwise this rank would end without a message.
RAISED = (Exception, SystemExit)


class FunctionError(FastPPOError):
    """The user's function does not exist, raises an exception, or returns a value that cannot be used."""


class UserCode(NamedTuple):
    """A function or class of the user, and the folder of its file."""

    called: Callable[..., Any]
    folder: Path


@dataclass(frozen=True)
class UserFunction:
    """A function of the user; an exception in it becomes a FunctionError with the setting and the line."""

    setting: str  # as in `ppo.loss = file.py:function`
    function: Callable[..., Any]
    folder: Path  # of its file

    def __call__(self, *args: Any) -> Any:
        try:
            return self.function(*args)
        except RAISED as error:
            if has_own_message(error):
                raise
            what = f"{type(error).__name__}: {error}"
            raise FunctionError(f"{self.setting} raised {what} ({line_of(error, self.folder)})") from error


def named_function(name: str, setting: str, table: Mapping[str, F]) -> F | UserFunction:
    """The entry `name` of a table, or the user's function `module:function` or `file.py:function`.

    setting: the setting that has the name. Raises FunctionError.
    """
    if name in table:
        return table[name]
    setting = f"{setting} = {name}"
    return UserFunction(setting, *import_user_code(name, setting, error=FunctionError))


def import_user_code(
    name: str, setting: str, kind: str = "function", error: type[FastPPOError] = FastPPOError
) -> UserCode:
    """`module:NAME`, the module importable from here, or `path/to/file.py:NAME`.

    setting: the setting and its value, for the error. kind: `function` or `class`. Raises `error` if it does not exist,
    cannot be imported or cannot be called.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise error(f"{setting}: write it as module:{kind} or file.py:{kind}")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    except RAISED as raised:
        raise error(f"{setting}: {module_name} could not be imported ({type(raised).__name__}: {raised})") from raised
    called: Any = getattr(module, attribute, None)
    if not callable(called):
        names = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])) or "none"
        raise error(f"{setting}: {module_name} has no {kind} {attribute}; it has: {names}")
    return UserCode(called, Path(getattr(module, "__file__", None) or module_name).parent)


def has_own_message(error: BaseException) -> bool:
    """Whether `fastppo.errors` explains the error: the GPU's memory is full, or another rank has ended."""
    full = type(error).__name__ == "OutOfMemoryError"
    return full or any(words in str(error) for words in ANOTHER_RANK_ENDED)


def line_of(error: BaseException, folder: Path) -> str:
    """Where it was raised, as `file.py:12`: the innermost frame in a file of the user's folder, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    of_user = [frame for frame in frames if Path(frame.filename).parent == folder]
    frame = (of_user or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


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
