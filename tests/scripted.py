"""Conversations with an environment whose actor says what a script has it say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerBase

from fastppo.config import RolloutConfig, SamplingConfig
from fastppo.data import Prompts, PromptSet, Rollout, plain_tokens, template_tokens
from fastppo.environments import ConversationError, Conversations, Environment

SETTING = "rollout.environment = talk.py:talk"
PATIENCE = 30.0  # seconds after which a test has hung

Actor = Callable[[int, int], str]  # (conversation, turn) -> what it says


def environment(
    called: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    tools: tuple[dict[str, Any], ...] = (),
    **limits: Any,
) -> Environment:
    """The function or class as an environment; with tools its actor writes calls as Hermes does."""
    return Environment(
        *(SETTING, called, Path(called.__code__.co_filename).parent if hasattr(called, "__code__") else Path()),
        *(RolloutConfig(environment="talk.py:talk", **limits), tokenizer or tiny.tokenizer()),
        arguments={"tools": list(tools)} if tools else {},
        tools=tools,
        form="hermes" if tools else None,
    )


def plain(*texts: str, **columns: list[Any]) -> PromptSet:
    """Prompts of plain text."""
    return PromptSet(tuple(map(tuple, plain_tokens(texts, tiny.tokenizer()))), texts, columns)


def chats(tokenizer: PreTrainedTokenizerBase, *texts: str, **columns: list[Any]) -> PromptSet:
    """Prompts of one user message each."""
    messages = tuple([{"role": "user", "content": text}] for text in texts)
    tokens = tuple(template_tokens(chat, "here", tokenizer, to_be_answered=True) for chat in messages)
    return PromptSet(tokens, texts, columns, messages)


def conversations(
    environment: Environment, data: PromptSet, *, samples: int = 1, seed: int = 1, max_new_tokens: int = 200
) -> Conversations:
    """Of all rows; a turn ends with the tokenizer's EOS."""
    prompts = Prompts.of(data.tokens, range(len(data)), samples=samples, data=data)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    return Conversations(prompts, environment, sampling, [environment.tokenizer.eos_token_id], seed=seed)


def said(text: str, tokenizer: PreTrainedTokenizerBase, *, ends: bool = True) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id] if ends else tokens


def talk(
    conversations: Conversations,
    count: int,
    actor: Actor = lambda i, turn: f"turn {turn}",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    answered: Callable[[int, Sequence[int] | None], object] = lambda i, tokens: None,
) -> Rollout:
    """Have these conversations; every turn ends with EOS if its limit has room for it. answered: is told of answers."""
    tokenizer = tokenizer or tiny.tokenizer()
    turns = [0] * count

    def speak(i: int) -> None:
        tokens = said(actor(i, turns[i]), tokenizer)[: conversations.limit(i)]
        turns[i] += 1
        conversations.end_turn(i, tokens, [-float(turns[i])] * len(tokens))

    for i in range(count):
        speak(i)
    end = time.monotonic() + PATIENCE
    while conversations.waiting:
        assert time.monotonic() < end, "no answer"
        for i, tokens in conversations.answered(0.5):
            answered(i, tokens)
            if tokens is not None:
                speak(i)
    return conversations.rollout()


def failure(called: Callable[..., Any], count: int = 1, data: PromptSet | None = None, **limits: Any) -> str:
    """The message of the error that ends conversations with it."""
    talking = conversations(environment(called, **limits), data or plain(*["Ask"] * count))
    with pytest.raises(ConversationError) as error:
        talk(talking, count)
    return str(error.value)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)
