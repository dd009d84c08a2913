"""What a run keeps of its responses in `responses.jsonl`, for people to read and `fastppo.report` to show.

Each record is one response: `of` (heldout or training), `prompt`, `score`, and then either the text `response`, or its
`tokens` as pieces of text with the `advantages` of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.batch import Experience

Record = dict[str, Any]


def heldout_responses(
    prompts: Sequence[str], responses: Sequence[str], scores: Sequence[float], *, count: int
) -> list[Record]:
    """The first `count` of an evaluation: the same prompts every time, so that steps can be laid side by side."""
    rows = list(zip(prompts, responses, scores, strict=True))[:count]
    return [{"of": "heldout", "prompt": p, "response": r, "score": s} for p, r, s in rows]


def training_responses(experience: Experience, tokenizer: PreTrainedTokenizerBase, *, count: int) -> list[Record]:
    """`count` responses of a batch from the best scored to the worst, evenly spaced in rank."""
    packed, records = experience.packed, []
    for sequence in spread(experience.scores.tolist(), count):
        start, end = packed.cu_seqlens[sequence : sequence + 2].tolist()
        first, last = packed.response_cu_seqlens[sequence : sequence + 2].tolist()
        tokens = packed.tokens[start:end].tolist()
        prompt, response = tokens[: first - last], tokens[first - last :]
        records.append(
            {
                "of": "training",
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "score": float(experience.scores[sequence]),
                "tokens": pieces(tokenizer, response),
                "advantages": [round(a, 4) for a in experience.advantages[first:last].tolist()],
            }
        )
    return records


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Indices of `count` scores (all, if there are fewer), evenly spaced in rank; the highest and the lowest are in."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if count >= len(ranked):
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text of each token, so that together they are the text of all; special tokens are written out.

    A token may be part of a character: the whole character then stands with its last token, and the others are empty.
    """
    texts, start, end = [], 0, 0  # tokens[start:end] were decoded whole, with what stood before them in sight
    for at in range(1, len(tokens) + 1):
        before, now = (str(tokenizer.decode(tokens[start:stop])) for stop in (end, at))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and at < len(tokens):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, end = end, at
    return texts
