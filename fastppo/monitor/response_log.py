"""The responses that a run writes to `responses.jsonl`, for people to read and for `fastppo.report` to show.

Each record is one response: `of` (heldout or training), `prompt`, `score`, and then either the text `response`, or the
text of each token as `tokens`, with the token's `advantages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.data import Experience, Measured, decode_after, decode_pieces

Record = dict[str, Any]


def heldout_responses(
    prompts: Sequence[str], responses: Sequence[str], scores: Sequence[float], *, count: int
) -> list[Record]:
    """Records of the first `count` responses of an evaluation: always the same prompts, so that steps can be compared.

    prompts, responses, scores: of the evaluation's B prompts.
    """
    rows = list(zip(prompts, responses, scores, strict=True))[:count]
    return [{"of": "heldout", "prompt": p, "response": r, "score": s} for p, r, s in rows]


def training_responses(batch: Measured, tokenizer: PreTrainedTokenizerBase, *, count: int) -> list[Record]:
    """Records of `count` responses of a batch from the highest score to the lowest, evenly spaced in rank.

    Those of an `Experience` have the advantage of each token, others the text alone.
    """
    packed, records = batch.packed, []
    for sequence in spread(batch.scores.tolist(), count):
        start, end = packed.cu_seqlens[sequence : sequence + 2].tolist()
        first, last = packed.response_cu_seqlens[sequence : sequence + 2].tolist()
        tokens = packed.tokens[start:end].tolist()
        prompt, response = tokens[: first - last], tokens[first - last :]
        text, score = decode_after([()], [prompt], tokenizer)[0], float(batch.scores[sequence])
        record: Record = {"of": "training", "prompt": text, "score": score}
        if isinstance(batch, Experience):
            record["tokens"] = decode_pieces(prompt, response, tokenizer)
            record["advantages"] = [round(a, 4) for a in batch.advantages[first:last].tolist()]
        else:
            record["response"] = decode_after([prompt], [response], tokenizer)[0]
        records.append(record)
    return records


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Indices of `count` scores (all, if there are fewer), evenly spaced in rank, with the highest and the lowest."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if count >= len(ranked):
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]
