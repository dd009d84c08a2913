"""The responses that a run writes to `responses.jsonl`, for people to read and for `fastppo.report` to show.

Each record is one response: `of` (heldout or training), `prompt`, `score`, and then either the text `response`, or the
text of each token as `tokens`, with the token's `advantages`.

In a run with an environment, `turn_rewards` has a reward for each of the policy's turns. `tokens` are then all that
stand behind the prompt, and `written` tells those of the policy, which alone have an advantage, from observations; and
a held-out `response` has a line or more for each message, which begins with its role, and `said` has the messages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.data import Experience, Measured, Messages, decode_after, decode_pieces, rewards_by_turn

Record = dict[str, Any]
Said = list[dict[str, str]]  # the messages behind a prompt: role and text of each


def heldout_responses(
    prompts: Sequence[str],
    responses: Sequence[str],
    scores: Sequence[float],
    said: Sequence[Said] | None = None,
    turn_rewards: Sequence[Sequence[float]] | None = None,
    *,
    count: int,
) -> list[Record]:
    """Records of the first `count` responses of an evaluation: always the same prompts, so that steps can be compared.

    prompts, responses, scores: of the evaluation's B prompts; said, turn_rewards: with an environment, as long.
    """
    rows = list(zip(prompts, responses, scores, strict=True))[:count]
    records: list[Record] = [{"of": "heldout", "prompt": p, "response": r, "score": s} for p, r, s in rows]
    for name, values in (("said", said), ("turn_rewards", turn_rewards)):
        for record, value in zip(records, values or (), strict=False):
            record[name] = value
    return records


def said_behind(conversation: Messages, asked: Messages | None) -> Said:
    """The messages of a conversation behind its prompt; asked: those of the prompt, None for a prompt of plain text."""
    behind = conversation[1 if asked is None else len(asked) :]
    return [{"role": message["role"], "text": _text_of(message)} for message in behind]


def as_text(said: Said) -> str:
    """A conversation for people to read; each message begins on a line of its own, with its role."""
    return "\n".join(f"{message['role']}: {message['text'].strip()}" for message in said)


def _text_of(message: dict[str, Any]) -> str:
    """What a message says, its tool calls included, as `name {arguments}` on lines of their own."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    calls = [f"{f.get('name')} {_arguments(f.get('arguments'))}" for f in functions]
    return "\n".join([text for text in (message.get("content") or "",) if text.strip() or not calls] + calls)


def _arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def training_responses(batch: Measured, tokenizer: PreTrainedTokenizerBase, *, count: int) -> list[Record]:
    """Records of `count` responses of a batch from the highest score to the lowest, evenly spaced in rank.

    Those of an `Experience` have the advantage of each token. Others have the text alone, or with an environment the
    tokens, to tell what was written from what was observed.
    """
    records = []
    for sequence in spread(batch.scores.tolist(), count):
        prompt, behind, written = _parts(batch, sequence)
        text, score = decode_after([()], [prompt], tokenizer)[0], float(batch.scores[sequence])
        record: Record = {"of": "training", "prompt": text, "score": score}
        if isinstance(batch, Experience) or batch.packed.mask is not None:
            record["tokens"] = decode_pieces(prompt, behind, tokenizer)
        else:
            record["response"] = decode_after([prompt], [behind], tokenizer)[0]
        if isinstance(batch, Experience):
            advantages = iter(_of_response(batch.advantages, batch, sequence).tolist())
            record["advantages"] = [round(next(advantages), 4) if is_written else None for is_written in written]
        if batch.packed.mask is not None:
            record["written"] = written
        if batch.turn_rewards is not None:
            chosen = batch.packed.select(torch.tensor([sequence]))
            record["turn_rewards"] = rewards_by_turn(chosen, _of_response(batch.turn_rewards, batch, sequence))[0]
        records.append(record)
    return records


def _parts(batch: Measured, sequence: int) -> tuple[list[int], list[int], list[bool]]:
    """A sequence's tokens up to the end of its prompt, those behind it, and which of these the policy wrote."""
    packed = batch.packed
    start, end = packed.cu_seqlens[sequence : sequence + 2].tolist()
    first = start + int(packed.prompt_lengths[sequence])
    written = [True] * (end - first) if packed.mask is None else packed.mask[first:end].tolist()
    return packed.tokens[start:first].tolist(), packed.tokens[first:end].tolist(), written


def _of_response(values: Tensor, batch: Measured, sequence: int) -> Tensor:
    """The part of an (M,) tensor that belongs to a response."""
    return batch.packed.select_tokens(values, torch.tensor([sequence]))


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Indices of `count` scores (all, if there are fewer), evenly spaced in rank, with the highest and the lowest."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if count >= len(ranked):
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]
