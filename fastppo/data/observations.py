"""Observations as tokens: what an environment answers to a turn of the actor, as the continuation of its tokens.

What the actor wrote is never written again: chat templates strip and reorder what they are given and drop the thoughts
of earlier turns, so that its tokens would become others than those that it sampled. A template is asked for what
follows a turn, by a word in the turn's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastppo.config import DataConfig
from fastppo.data.continuation import encode_behind, special_ids
from fastppo.data.conversations import (
    NO_ARGUMENTS,
    Messages,
    calls_tools,
    rendered_tokens,
    template_arguments,
    template_text,
)
from fastppo.data.tables import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "TURN"  # the word in a turn's place
END_OF_CALL, END_OF_TURN = "<|eom_id|>", "<|eot_id|>"  # of Llama-3, which ends a turn with the first if it waits


def observation_tokens(
    conversation: Messages,
    observation: Messages,
    turn: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> tuple[int, ...]:
    """The tokens that follow the tokens `turn` in a chat: `observation` and the generation prompt of the next turn.

    conversation: up to the assistant's message that `turn` is; observation: one message or more; arguments: of the chat
    template; where: the place, for messages. They begin with what the template writes to end a turn, unless the turn
    has written that itself: a turn that was cut is ended by the observation. Raises DataError if the template refuses
    the messages, or leaves the assistant's message or all that follows it out.
    """
    text = _behind_turn(conversation[:-1], observation, tokenizer, where, arguments)
    start = text.lstrip()  # some templates write a space before the token that ends a turn
    tokens = rendered_tokens(start, tokenizer)
    if not tokens or tokens[0] not in special_ids(tokenizer):
        return text_observation_tokens(text, turn, tokenizer)
    # Behind a special token the tokens are those that they are within the whole text, with the space that some
    # tokenizers put there; `encode_behind` would try to avoid it.
    if turn and turn[-1] in (tokens[0], _in_place_of(tokens[0], tokenizer)):
        return tokens[1:]
    return text_observation_tokens(text[: len(text) - len(start)], turn, tokenizer) + tokens


def text_observation_tokens(text: str, turn: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of an observation in a conversation of plain text, as the continuation of the tokens `turn`."""
    return tuple(encode_behind([turn], [text], tokenizer)[0])


def check_observations(tokenizer: PreTrainedTokenizerBase, config: DataConfig, chat: bool) -> None:
    """Check, before a model is loaded, that the chat template writes the observations of an environment.

    chat: whether the prompts are chat; plain text has no template to check. The answers of `data.tools` are messages of
    the role tool. Raises DataError.
    """
    for role in ("user", "tool") if chat and config.tools else ("user",) if chat else ():
        asked, observation = [{"role": "user", "content": "Question"}], {"role": role, "content": "Observation"}
        where = f"rollout.environment: a message of the role {role} after one of the assistant"
        text = _behind_turn(asked, [observation], tokenizer, where, template_arguments(config))
        if observation["content"] not in text:
            raise DataError(
                f"{where} is left out by the tokenizer's chat template, so the actor would not see the observation. Use"
                " a model whose template writes it, or give the tokenizer another template."
            )


def _behind_turn(
    before: Messages,
    observation: Messages,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    arguments: Mapping[str, Any],
) -> str:
    """What the template writes behind a turn of the assistant that is followed by the observation.

    Earlier turns are given without their tool calls, of which some templates refuse several in a turn: what is before
    the turn is not used.
    """
    before = [{"role": "assistant", "content": ""} if calls_tools(message) else message for message in before]
    # A word that is in none of the messages: the last place where it stands is then that of the turn.
    contents, number = repr([*before, *observation, dict(arguments)]), 0
    while (word := f"{PLACE}{number}") in contents:
        number += 1
    chat = [*before, {"role": "assistant", "content": word}, *observation]
    whole = template_text(chat, where, tokenizer, to_be_answered=True, arguments=arguments)
    _, found, behind = whole.rpartition(word)
    if not found:
        raise DataError(
            f"{where}: the tokenizer's chat template leaves out the assistant's message before it (the roles are"
            f" {', '.join(message['role'] for message in chat)}). Use a model whose template writes earlier turns, or"
            " give the tokenizer another template."
        )
    if not behind.strip():
        raise DataError(
            f"{where}: the tokenizer's chat template writes nothing behind the assistant's message (the roles are"
            f" {', '.join(message['role'] for message in chat)}). Use a model whose template writes them, or give the"
            " tokenizer another template."
        )
    return behind


def _in_place_of(end: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the actor may have ended a turn that the template ends with another."""
    if tokenizer.convert_ids_to_tokens(end) != END_OF_TURN:
        return None
    added: dict[str, int] = tokenizer.get_added_vocab()
    return added.get(END_OF_CALL)
