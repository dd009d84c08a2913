"""Conversations that nobody held, as what sampling with an environment leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tiny
import torch
from made_up_batches import batch

from fastppo.data.batch import Experience, Rollout
from fastppo.data.packed import pack_turns

PROMPTS = ("one", "three", "two")
# what policy and environment said in turn, the policy first and last; and the rewards for the policy's turns
SAID = (("ab", "?", "cd"), ("e",), ("f", "!!", "g", "?", "hi"))
REWARDS = ((0.25, -1.0), (2.0,), (0.0, 0.5, 0.125))
TEXTS = ["ab\ncd", "e", "f\ng\nhi"]  # what the policy wrote


def rollout(
    prompts: Sequence[str] = PROMPTS,
    said: Sequence[Sequence[str]] = SAID,
    rewards: Sequence[Sequence[float]] = REWARDS,
    ended: Sequence[bool] = (True, True, False),
) -> Rollout:
    """A plain-text conversation for each prompt, in tokens of `tiny.tokenizer`, one a byte; EOS where one ended."""
    tokenizer = tiny.tokenizer()
    sequences, masks, of_tokens, conversations = [], [], [], []
    for prompt, parts, of_turns, has_ended in zip(prompts, said, rewards, ended, strict=True):
        tokens = [tokenizer(part)["input_ids"] for part in (prompt, *parts)]
        if has_ended:
            tokens[-1].append(tokenizer.eos_token_id)
        sequences.append([token for part in tokens for token in part])
        masks.append([i % 2 == 1 for i, part in enumerate(tokens) for _ in part])
        for part, reward in zip(tokens[1::2], of_turns, strict=True):
            of_tokens += [0.0] * (len(part) - 1) + [reward]
        roles = ("user", "assistant")
        conversations.append([{"role": roles[i % 2], "content": text} for i, text in enumerate((prompt, *parts))])
    packed = pack_turns(sequences, masks)
    return Rollout(
        packed,
        torch.zeros(len(packed.responses)),
        torch.tensor(list(ended)),
        torch.arange(len(prompts)),
        torch.tensor(of_tokens),
        tuple(conversations),
    )


def experience() -> Experience:
    """From `rollout`, with scores 3, 2, 1 and advantages 0.0, 0.1, ..."""
    said = rollout()
    made_up = batch([[1] * n for n in said.packed.response_lengths.tolist()], scores=[3.0, 2.0, 1.0])
    advantages = torch.arange(11.0) / 10
    return replace(made_up, packed=said.packed, turn_rewards=said.turn_rewards, advantages=advantages)
