"""What an environment answers to a turn, and whether it may: anything else is an error that says what it must be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastppo.data import Messages, are_messages
from fastppo.errors import RaisedAlone

LARGEST = float(np.finfo(np.float32).max)  # the largest absolute value of a turn's reward
MUST_BE = "it must return None, a text, a chat message (a dict with role and content), a list of these, or a pair"


class ConversationError(RaisedAlone):
    """An environment that is missing, fails, does not answer in time, or answers what is no observation."""


class Answer(NamedTuple):
    """What an environment says to a turn."""

    observation: str | Messages | None  # None: the conversation is over
    reward: float = 0.0  # of the turn
    cut: bool = False  # it is over, but has not come to its end


def read_answer(value: Any, setting: str, place: str) -> Answer:
    """What a function returns: None, an observation, or a pair of one of these and a reward.

    setting: `rollout.environment` and its value; place: the turn and its conversation, for errors. Raises
    ConversationError.
    """
    reward: Any = 0.0
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ConversationError(
                f"{setting} returned a tuple of {len(value)} for {place}: {shown(value)}; {MUST_BE} of an observation"
                " (or None) and a reward."
            )
        value, reward = value
    observation = None if value is None else _observation(value, setting, place)
    return Answer(observation, _reward(reward, setting, place))


def read_step(value: Any, setting: str, place: str) -> Answer:
    """What a class's `step` returns, after Gymnasium: (observation, reward, terminated, truncated, info).

    The observation of the last step is nobody's to read, and may be anything. Raises ConversationError.
    """
    if not isinstance(value, tuple) or len(value) != 5:
        raise ConversationError(
            f"{setting}: step returned {shown(value)} for {place}; it must return a tuple of five: observation, reward,"
            " terminated, truncated and info."
        )
    observation, reward, terminated, truncated, _ = value
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise ConversationError(
                f"{setting}: step returned {shown(flag)} as {name} for {place}; it must be True or False."
            )
    amount = _reward(reward, setting, place)
    if terminated or truncated:
        return Answer(None, amount, cut=not terminated)
    if observation is None:
        raise ConversationError(
            f"{setting}: step returned None as observation for {place}, and neither terminated nor truncated. Return an"
            " observation, or True as terminated to end the conversation."
        )
    return Answer(_observation(observation, setting, place), amount)


def check_first_observation(value: Any, setting: str, place: str) -> None:
    """Raises ConversationError if a class's `reset` has something to say: conversations begin with their prompts."""
    observation = value[0] if isinstance(value, tuple) and len(value) == 2 else value
    if not (observation is None or (isinstance(observation, str) and observation == "")):
        raise ConversationError(
            f"{setting}: reset returned the observation {shown(observation)} for {place}, but a conversation begins"
            ' with the prompt of the data. Return ("", {}), and put what the actor shall read first into data.path.'
        )


def messages_of(observation: str | Messages, role: str) -> Messages:
    """The observation as chat messages; a text has the given role."""
    return [{"role": role, "content": observation}] if isinstance(observation, str) else observation


def shown(value: Any) -> str:
    """A value and its type, for an error."""
    try:
        text = repr(value)[:120]
    except Exception:  # repr may be the user's
        text = "a value that cannot be shown"
    return f"{text} ({type(value).__name__})"


def _observation(value: Any, setting: str, place: str) -> str | Messages:
    if isinstance(value, dict):
        value = [value]
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise _empty(value, setting, place)
    if isinstance(value, str):
        return value
    if not are_messages(value):
        raise ConversationError(
            f"{setting} returned {shown(value)} for {place}; {MUST_BE} of one of these and a reward."
        )
    if any(message["role"] == "assistant" for message in value):
        raise ConversationError(
            f"{setting} returned a message of the role assistant for {place}: that role is the actor's. Give it"
            " another, such as user or tool."
        )
    if not any(message["content"].strip() for message in value):
        raise _empty(value, setting, place)
    return list(value)


def _empty(value: Any, setting: str, place: str) -> ConversationError:
    return ConversationError(
        f"{setting} returned the empty observation {shown(value)} for {place}. Return None to end the conversation, or"
        " a text that says that there is nothing."
    )


def _reward(value: Any, setting: str, place: str) -> float:
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except Exception:  # conversions of other libraries' numbers may raise anything
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ConversationError(
            f"{setting} returned the reward {shown(value)} for {place}; it must be a finite number within fp32."
        )
    return number
