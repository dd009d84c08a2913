"""Between tokens and messages: a turn of the actor as the environment reads it, its observation as the actor does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastppo.data import Messages, decode_after, observation_tokens, text_observation_tokens
from fastppo.environments.answers import ConversationError
from fastppo.environments.environment import Environment
from fastppo.environments.tool_calls import call_texts, parse_calls


class ReadTurn(NamedTuple):
    """What the tokens of a turn say."""

    text: str  # as a class's `step` is given it; with tool calls as they were written
    message: dict[str, Any]  # of the role assistant, with `tool_calls` in OpenAI's form if there are any
    calls: list[dict[str, Any]]  # the same, each with `name` and `arguments`
    problem: str | None  # of a tool call that cannot be read, as the actor is told


def read_turn(environment: Environment, before: Sequence[int], tokens: Sequence[int], *, is_chat: bool) -> ReadTurn:
    """Read a turn; before: all tokens of the conversation before it."""
    if not (environment.form and is_chat):
        text = decode_after([before], [tokens], environment.tokenizer)[0]
        return ReadTurn(text, {"role": "assistant", "content": text}, [], None)
    text = call_texts([before], [tokens], environment.tokenizer, environment.form)[0]
    content, parsed, problem = parse_calls(text, environment.form, environment.tools)
    calls = [{"name": call.name, "arguments": call.arguments} for call in parsed]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return ReadTurn(text, message, calls, problem)


def observed(
    environment: Environment,
    conversation: Messages,
    observation: Messages,
    turn: Sequence[int],
    where: str,
    *,
    is_chat: bool,
) -> tuple[int, ...]:
    """The tokens of an observation behind those of the newest turn; in chat with what leads to the next turn.

    conversation: up to that turn, without the observation; where: the setting and the turn, for errors. Raises
    ConversationError if plain text is answered by more than a text or the tokenizer has no token for it, and DataError
    if the chat template refuses the messages.
    """
    if is_chat:
        tokens = observation_tokens(
            conversation, observation, turn, environment.tokenizer, where, environment.arguments
        )
    else:
        tokens = text_observation_tokens(observation[0]["content"], turn, environment.tokenizer)
    if not tokens:
        raise ConversationError(
            f"{where}: the actor's tokenizer has no token for the observation. Write it differently."
        )
    return tokens
