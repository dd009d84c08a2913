"""Python functions, plain or coroutine functions, as sources of reward."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch

from fastppo.errors import RAISED, import_user_code, line_of, log_once
from fastppo.rewards.responses import Responses, RewardError, checked
from fastppo.user_code import SharedSettings, event_loop, module_state, signature_of

Function = Callable[..., Any]

COMPLETIONS = "completions"  # TRL's name for responses
CONVERSATIONS = "conversations"  # with `rollout.environment`; without, it may be a column of the data


class FunctionSource:
    """A function of the user, called with copies of the prompts, the responses and the columns of the data.

    A function with `**kwargs` gets all columns of the data, any other those that it has as parameters; a parameter
    `completions`, TRL's name, gets the responses; with an environment `conversations` gets lists of messages, prompts
    and observations included. Coroutine functions are awaited.
    """

    def __init__(self, name: str, where: str):
        """where: the setting with the source, for errors. Raises RewardError if the function cannot be imported."""
        self._setting = f"{where}.function = {name}"
        module = name.rpartition(":")[0]
        self._state = module_state(str(Path(module).resolve()) if module.endswith(".py") else module)
        with self._state(importing=True):
            self._function, self._folder = import_user_code(name, self._setting, error=RewardError)
        self.is_async = _is_async(self._function)

    def __call__(self, responses: Responses) -> list[float]:
        if self.is_async:
            return score_concurrently([self], responses)[self]
        if not responses.texts:
            return []
        arguments = self._arguments(responses)
        with self._in_state():
            try:
                answer = self._function(**arguments)
                if isinstance(answer, Iterator):  # a generator runs the function's code while it is iterated
                    answer = list(answer)
            except RAISED as error:
                raise self._failed(error) from error
        if event_loop.is_async(answer):  # a decorator may hide that the function is a coroutine function
            answer = event_loop.submit(self._resolve(answer)).result()
        return checked(self._setting, answer, responses.texts)

    async def answer(self, responses: Responses) -> list[float]:
        """The scores of a coroutine function or an asynchronous generator function."""
        if not responses.texts:
            return []
        arguments = self._arguments(responses)
        torch.set_grad_enabled(True)  # in this thread, in which another function may have turned gradients off
        try:
            answer = self._function(**arguments)
        except RAISED as error:
            raise self._failed(error) from error
        return checked(self._setting, await self._resolve(answer), responses.texts)

    @contextmanager
    def _in_state(self) -> Iterator[None]:
        """The state of the function's module, for a call in this thread."""
        if current_thread() is main_thread():
            with self._state():
                yield
            return
        try:
            with self._state.beside():
                yield
        except SharedSettings as error:
            raise RewardError(
                f"{self._setting} changes what all threads share ({error}). With ppo.steps_ahead 1 it is called"
                " while the trainer learns, which that would reach. Let the function and its module leave it as it was,"
                " or set ppo.steps_ahead to 0."
            ) from error

    async def _resolve(self, answer: Any) -> Any:
        try:
            return await event_loop.resolve(answer)
        except (*RAISED, asyncio.CancelledError) as error:
            raise self._failed(error) from error

    def _arguments(self, responses: Responses) -> dict[str, list[Any]]:
        """The function's arguments, copied, so that changes by the function do not affect other sources."""
        available = {"prompts": responses.prompts, "responses": responses.texts} | responses.columns
        if COMPLETIONS not in available and _names_completions(self._function):
            available[COMPLETIONS] = responses.texts
        if responses.conversations is not None:
            if CONVERSATIONS in responses.columns:
                log_once(f"{self._setting} does not receive the column {CONVERSATIONS} of the data: a reserved name")
            available[CONVERSATIONS] = list(responses.conversations)
        signature = signature_of(self._function)
        for name in signature.required:
            if name not in available and name == CONVERSATIONS:
                raise RewardError(
                    f"{self._setting} has the parameter {name}, which only a run with rollout.environment has. Set"
                    " rollout.environment, or use prompts and responses: each response is one turn."
                )
            if name not in available:
                raise RewardError(
                    f"{self._setting} has the parameter {name}, which is not a column of the data; these are:"
                    f" {', '.join(available)}"
                )
        return copy.deepcopy(signature.select(available))

    def _failed(self, error: BaseException) -> RewardError:
        what = f"{self._setting} raised {type(error).__name__}: {error} ({line_of(error, self._folder)})"
        if isinstance(error, TypeError) and _names_completions(self._function):
            what += ". Its completions are texts here, also for chats, for which TRL passes lists of messages"
        return RewardError(what)


def function_source(name: str, where: str = "rewards") -> FunctionSource:
    """Import a function. name: `module:function` or `file.py:function`; where: the setting with it, for errors."""
    return FunctionSource(name, where)


def score_concurrently(sources: Sequence[FunctionSource], responses: Responses) -> dict[FunctionSource, list[float]]:
    """Run all coroutine functions at the same time; returns their scores.

    Raises the RewardError of the first one that fails, and cancels the others.
    """
    with ExitStack() as stack:
        for source in sources:
            stack.enter_context(source._in_state())
        futures = {source: event_loop.submit(source.answer(responses)) for source in sources}
        done, pending = wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
    for future in done:
        if (error := future.exception()) is not None:
            raise error
    return {source: future.result() for source, future in futures.items()}


def _is_async(function: Function) -> bool:
    candidates = (function, getattr(function, "__call__", None))  # noqa: B004 - of a callable object
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in candidates)


def _names_completions(function: Function) -> bool:
    return COMPLETIONS in signature_of(function).names
