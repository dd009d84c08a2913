"""A Python function as a source of reward."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from fastppo.feedback.responses import Responses, RewardError, Source, checked

Function = Callable[..., Any]

# What a function or a file may raise. Without SystemExit a run would end with no word of why, and on this rank alone.
RAISED = (Exception, SystemExit)


def function_source(name: str, where: str = "rewards") -> Source:
    """`module:function` or `file.py:function`, imported; called with copies of prompts, responses and the columns.

    It is given all columns of the data if it takes `**kwargs`, else those that it names. where: the setting it belongs
    to, for errors.
    """
    setting = f"{where}.function = {name}"
    function, folder = _import_function(name, setting)

    def source(responses: Responses) -> list[float]:
        if not responses.texts:
            return []
        said = {"prompts": responses.prompts, "responses": responses.texts} | responses.columns
        wanted = copy.deepcopy(_wanted(function, said, setting))  # what it changes is not what the next source sees
        try:
            answer = function(**wanted)
            if isinstance(answer, Iterator):  # the function goes on in there
                answer = list(answer)
        except RAISED as error:
            what = f"{setting} raised {type(error).__name__}: {error} ({_line(error, folder)})"
            raise RewardError(what) from error
        return checked(setting, answer, responses.texts)

    return source


def _wanted(function: Function, said: Mapping[str, list[Any]], setting: str) -> dict[str, list[Any]]:
    """Of all that can be said, what the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C do not tell
        return dict(said)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(said)
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    for p in named:
        if p.default is p.empty and p.name not in said:
            raise RewardError(f"{setting} takes {p.name}, which is no column of the data; there are: {', '.join(said)}")
    return {p.name: said[p.name] for p in named if p.name in said}


def _line(error: BaseException, folder: Path) -> str:
    """Where it was raised: the innermost line in a file of the user's, which a library may have been called from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == folder]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _import_function(name: str, setting: str) -> tuple[Function, Path]:
    """`module:function`, the module importable from here, or `path/to/file.py:function`; and the folder it lies in."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise RewardError(f"{setting}: write it as module:function or file.py:function")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    except RAISED as error:
        raise RewardError(
            f"{setting}: {module_name} could not be imported ({type(error).__name__}: {error})"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])) or "none"
        raise RewardError(f"{setting}: {module_name} has no function {attribute}; it has: {found}")
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
