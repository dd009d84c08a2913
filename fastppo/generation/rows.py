"""A global batch of scored responses as columns, in the form of `fastppo.data.read_scored`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.data import BY_SOURCE, Prompts, PromptSet, Scored, is_reserved, rewards_by_turn
from fastppo.rewards import response_texts


def scored_rows(
    scored: Scored, prompts: Prompts, data: PromptSet, tokenizer: PreTrainedTokenizerBase, samples: int
) -> dict[str, list[Any]]:
    """The columns of B responses, those of the data last; a value for each response, in the order of `prompts`.

    prompts: of all ranks, those that `scored` answers; their streams number prompt and sample. data: the set that they
    are from; samples: responses to a prompt. There is no `score` without a source of reward, no `score/0`, ... with
    only one, no `judge` without one, and no `conversation` and `turn_rewards` without an environment. It has no
    collectives, so that one rank may call it alone.
    """
    rollout, rows = scored.rollout, prompts.sources.tolist()
    if rollout.sources.tolist() != rows:
        raise ValueError("the responses are not those to the prompts, in their order")
    prompts_of_data = prompt_values(data)
    streams, lengths = prompts.streams, rollout.packed.response_lengths.tolist()
    columns: dict[str, list[Any]] = {
        "prompt": [prompts_of_data[row] for row in rows],
        "prompt_index": (streams // samples).tolist(),
        "sample": (streams % samples).tolist(),
        "response": response_texts(rollout.packed, tokenizer),
        "tokens": [part.tolist() for part in rollout.packed.responses.split(lengths)],
        "logprobs": [part.tolist() for part in rollout.logprobs.split(lengths)],
    }
    if rollout.turn_rewards is not None and rollout.conversations is not None:
        columns["conversation"] = list(rollout.conversations)
        columns["turn_rewards"] = rewards_by_turn(rollout.packed, rollout.turn_rewards)
    sources = scored.by_source.shape[1]
    if sources:
        columns["score"] = scored.scores.tolist()
    if sources > 1:
        columns |= {f"{BY_SOURCE}{i}": scored.by_source[:, i].tolist() for i in range(sources)}
    if not scored.judged.isnan().any():  # a judge's own scores are finite
        columns["judge"] = scored.judged.tolist()
    columns["ended"] = rollout.ended.tolist()
    return columns | {name: [values[row] for row in rows] for name, values in own_columns(data).items()}


def prompt_values(data: PromptSet) -> list[Any]:
    """All prompts as in the data: chat messages, or text (only its start with `data.first_tokens`)."""
    chats = data.messages or [None] * len(data)
    return [text if chat is None else chat for text, chat in zip(data.texts, chats, strict=True)]


def own_columns(data: PromptSet) -> dict[str, list[Any]]:
    """The columns of the data that keep their names beside those of a response."""
    return {name: values for name, values in data.columns.items() if not is_reserved(name)}


def columns_left_out(data: PromptSet, prompt_column: str) -> list[str]:
    """The columns of the data that are not written, because their names mean something else in a scored file.

    prompt_column: with the prompts; it is written as `prompt`.
    """
    return [name for name in data.columns if is_reserved(name) and name != prompt_column]
