"""Python functions as sources of reward, plain ones and coroutine functions."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastppo.data import RAISED, FunctionError, import_function, innermost_line
from fastppo.rewards import awaiting
from fastppo.rewards.apart import apart
from fastppo.rewards.responses import Responses, RewardError, checked

Function = Callable[..., Any]

COMPLETIONS = "completions"  # what TRL calls responses


class FunctionSource:
    """A function of the user's that is called with copies of prompts, responses and the columns of the data.

    It is given all columns of the data if it takes `**kwargs`, else those that it names; a parameter `completions`, as
    TRL calls them, gets the responses. Coroutine functions are awaited.
    """

    def __init__(self, name: str, where: str):
        """where: the setting it belongs to, for errors. Raises RewardError for a function that is not there."""
        self._setting = f"{where}.function = {name}"
        module = name.rpartition(":")[0]
        self._apart = apart(str(Path(module).resolve()) if module.endswith(".py") else module)
        with self._apart(importing=True):
            try:
                self._function, self._folder = import_function(name, self._setting)
            except FunctionError as error:
                raise RewardError(str(error)) from error
        self.is_async = _is_async(self._function)

    def __call__(self, responses: Responses) -> list[float]:
        if self.is_async:
            return ask_at_once([self], responses)[self]
        if not responses.texts:
            return []
        wanted = self._copies(responses)
        with self._apart():
            try:
                answer = self._function(**wanted)
                if isinstance(answer, Iterator):  # the function goes on in there
                    answer = list(answer)
            except RAISED as error:
                raise self._failed(error) from error
        if awaiting.is_async(answer):  # of a decorator that hides what it decorates
            answer = awaiting.begin(self._awaited(answer)).result()
        return checked(self._setting, answer, responses.texts)

    async def answer(self, responses: Responses) -> list[float]:
        """Of a coroutine function, or of an asynchronous generator."""
        if not responses.texts:
            return []
        wanted = self._copies(responses)
        torch.set_grad_enabled(True)  # of this thread, where another function may have switched them off
        try:
            answer = self._function(**wanted)
        except RAISED as error:
            raise self._failed(error) from error
        return checked(self._setting, await self._awaited(answer), responses.texts)

    async def _awaited(self, answer: Any) -> Any:
        try:
            return await awaiting.settled(answer)
        except (*RAISED, asyncio.CancelledError) as error:
            raise self._failed(error) from error

    def _copies(self, responses: Responses) -> dict[str, list[Any]]:
        """What it changes is not what the next source sees."""
        said = {"prompts": responses.prompts, "responses": responses.texts} | responses.columns
        return copy.deepcopy(_wanted(self._function, said, self._setting))

    def _failed(self, error: BaseException) -> RewardError:
        what = f"{self._setting} raised {type(error).__name__}: {error} ({innermost_line(error, self._folder)})"
        if isinstance(error, TypeError) and _names_completions(self._function):
            what += ". Its completions are texts here, also for chats, where TRL gives lists of messages"
        return RewardError(what)


def function_source(name: str, where: str = "rewards") -> FunctionSource:
    """`module:function` or `file.py:function`, imported. where: the setting it belongs to, for errors."""
    return FunctionSource(name, where)


def ask_at_once(sources: Sequence[FunctionSource], responses: Responses) -> dict[FunctionSource, list[float]]:
    """What coroutine functions say of the responses, all of them awaited together.

    Raises the RewardError of the first that fails; no other is waited for then.
    """
    with ExitStack() as stack:
        for source in sources:
            stack.enter_context(source._apart())
        asked = {source: awaiting.begin(source.answer(responses)) for source in sources}
        done, pending = wait(asked.values(), return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
    for future in done:
        if (failed := future.exception()) is not None:
            raise failed
    return {source: future.result() for source, future in asked.items()}


def _is_async(function: Function) -> bool:
    called = (function, getattr(function, "__call__", None))  # noqa: B004 - of an object that can be called
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in called)


def _names_completions(function: Function) -> bool:
    try:
        return COMPLETIONS in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _wanted(function: Function, said: Mapping[str, list[Any]], setting: str) -> dict[str, list[Any]]:
    """Of all that can be said, what the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C do not tell
        return dict(said)
    if COMPLETIONS not in said and _names_completions(function):
        said = {**said, COMPLETIONS: said["responses"]}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(said)
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    for p in named:
        if p.default is p.empty and p.name not in said:
            raise RewardError(f"{setting} takes {p.name}, which is no column of the data; there are: {', '.join(said)}")
    return {p.name: said[p.name] for p in named if p.name in said}
