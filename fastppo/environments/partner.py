"""What the actor talks to in one conversation: the user's function, or an instance of the user's class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastppo.data import Messages
from fastppo.environments.answers import Answer, check_first_observation, read_answer, read_step
from fastppo.environments.calls import UserCall
from fastppo.environments.environment import Environment


@dataclass(frozen=True)
class Turn:
    """A turn of the actor, as the environment is told of it."""

    number: int  # from 0
    text: str
    calls: list[dict[str, Any]]  # of tools, each with `name` and `arguments`
    ended: bool  # with a stop token, and not cut
    conversation: Messages  # up to this turn, which is the last message


class Partner(Protocol):
    """The environment in one conversation. What it is given are copies, which it may change."""

    def calls(self, turn: Turn, place: str) -> Sequence[UserCall]:
        """The calls of the user's code that answer a turn, in order; place: the turn's, for errors."""

    def read(self, value: Any, place: str) -> Answer:
        """The answer that the last of these calls has returned. Raises ConversationError if it is none."""

    def closing(self) -> Sequence[UserCall]:
        """The calls at the end of a conversation, the first time it is asked."""


class FunctionPartner:
    """A function: it is given the conversation so far, and keeps nothing between its calls."""

    def __init__(self, environment: Environment, seed: int, columns: Mapping[str, Any]):
        self._environment, self._seed, self._columns = environment, seed, columns

    def calls(self, turn: Turn, place: str) -> Sequence[UserCall]:
        own = {
            "conversation": turn.conversation,
            "turn": turn.number,
            "calls": turn.calls,
            "ended": turn.ended,
            "seed": self._seed,
        }
        given = copy.deepcopy(self._environment.signature.select({**self._columns, **own}))
        return [UserCall("", partial(self._environment.called, **given))]

    def read(self, value: Any, place: str) -> Answer:
        return read_answer(value, self._environment.setting, place)

    def closing(self) -> Sequence[UserCall]:
        return []


class InstancePartner:
    """An instance of a class with `reset` and `step`, made when there is a first turn to answer."""

    def __init__(self, environment: Environment, seed: int, columns: Mapping[str, Any]):
        self._environment, self._seed, self._columns = environment, seed, columns
        self._instance: Any = None

    def calls(self, turn: Turn, place: str) -> Sequence[UserCall]:
        step = UserCall("step", lambda: self._instance.step(turn.text))
        if self._instance is not None:
            return [step]
        options = copy.deepcopy(dict(self._columns))
        return [
            UserCall("the class", self._environment.called, self._keep),
            UserCall(
                "reset",
                lambda: self._instance.reset(seed=self._seed, options=options),
                lambda value: check_first_observation(value, self._environment.setting, place),
            ),
            step,
        ]

    def read(self, value: Any, place: str) -> Answer:
        return read_step(value, self._environment.setting, place)

    def closing(self) -> Sequence[UserCall]:
        close, self._instance = getattr(self._instance, "close", None), None
        return [UserCall("close", close)] if callable(close) else []

    def _keep(self, instance: Any) -> None:
        self._instance = instance
