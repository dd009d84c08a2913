"""A Python function as a source of reward."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from fastppo.feedback.responses import Responses, RewardError, Source, checked


def function_source(name: str, where: str = "rewards") -> Source:
    """`module:function` or `file.py:function`, imported; called with prompts, responses and the data's columns.

    where: the setting it belongs to, for errors.
    """
    setting = f"{where}.function = {name}"
    function = _import_function(name, setting)

    def source(responses: Responses) -> list[float]:
        if not responses.texts:
            return []
        try:
            answer = function(prompts=responses.prompts, responses=responses.texts, **responses.columns)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            raise RewardError(f"{setting} raised {type(error).__name__}: {error} ({where})") from error
        return checked(setting, answer, responses.texts)

    return source


def _import_function(name: str, setting: str) -> Callable[..., Any]:
    """`module:function`, the module importable from here, or `path/to/file.py:function`."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise RewardError(f"{setting}: write it as module:function or file.py:function")
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name))
        else:
            sys.path.insert(0, str(Path.cwd()))  # the launcher's scripts do not see the folder they were started in
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.pop(0)
    except Exception as error:
        raise RewardError(
            f"{setting}: {module_name} could not be imported ({type(error).__name__}: {error})"
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])) or "none"
        raise RewardError(f"{setting}: {module_name} has no function {attribute}; it has: {found}")
    return cast("Callable[..., Any]", function)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
