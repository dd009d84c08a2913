"""From what the sources say of each response to the score that PPO maximises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.config import PPOConfig
from fastppo.data import Moments, Packed, PromptSet, Rollout, Scored, concatenate, decode_after
from fastppo.distributed import World, all_gather
from fastppo.rewards.function import FunctionSource, ask_at_once
from fastppo.rewards.responses import LARGEST, Responses, RewardError, Source

SMALLEST_STD = 1e-6  # a source that says the same of all responses would be divided by 0


def score(
    rollout: Rollout,
    prompts: PromptSet,
    sources: Sequence[tuple[Source, float]],
    tokenizer: PreTrainedTokenizerBase,
    ppo: PPOConfig,
    moments: Moments,
    world: World,
    judge: Sequence[tuple[Source, float]] = (),
) -> Scored:
    """Ask the sources about this rank's responses; returns those of all ranks, in the order of the prompts.

    moments: of the scores that the run has had; judge: sources that nothing learns from. Raises RewardError on every
    rank if a source failed on one of them, so that none is left waiting for it, or if a weighted sum is beyond fp32.
    """
    rows = rollout.sources.tolist()
    responses = Responses(
        prompts=[prompts.texts[row] for row in rows],
        texts=response_texts(rollout.packed, tokenizer),
        ended=rollout.ended.tolist(),
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
        packed=rollout.packed,
        messages=prompts.messages_of(rows),
    )
    by_source, scores = _ask_all("rewards", sources, responses, world)
    judged = _ask_all("health.judge", judge, responses, world)[1] if judge else torch.full_like(scores, math.nan)
    everyone = concatenate(all_gather(rollout, world))
    moments = moments.add(scores)
    return Scored(everyone, by_source, scores, shape(scores, everyone, moments, ppo), moments, judged)


def shape(scores: Tensor, rollout: Rollout, moments: Moments, ppo: PPOConfig) -> Tensor:
    """scores (B,) -> (B,) as PPO learns from them.

    In this order: brought to mean 0 and standard deviation 1 over all scores of the run so far (`moments`), clipped,
    less the penalties for a response that was cut and for each token beyond the soft limit.
    """
    if ppo.score_normalise:
        scores = (scores - moments.mean) / max(moments.std, SMALLEST_STD)
    if ppo.score_clip is not None:
        scores = scores.clamp(-ppo.score_clip, ppo.score_clip)
    scores = scores - ppo.truncation_penalty * (~rollout.ended).float()
    if ppo.length_limit is not None:
        scores = scores - ppo.length_penalty * (rollout.packed.response_lengths - ppo.length_limit).clamp(min=0)
    return scores


def _ask_all(
    where: str, sources: Sequence[tuple[Source, float]], responses: Responses, world: World
) -> tuple[Tensor, Tensor]:
    """What each of the S sources says of the responses of all ranks, (B, S) fp32, and the weighted sum, (B,) fp32.

    where: the setting that the sources belong to, for errors.
    """
    awaited = _awaited([source for source, _ in sources], responses)
    by_source = torch.stack([_ask(awaited.get(source, source), responses, world) for source, _ in sources], dim=1)
    weights = [weight for _, weight in sources]
    sums = by_source.double() @ torch.tensor(weights, dtype=torch.float64)
    for i in (sums.abs() > LARGEST).nonzero().flatten().tolist()[:1]:
        said = [f"{weight:g} * {x:g}" for weight, x in zip(weights, by_source[i].tolist(), strict=True)]
        raise RewardError(
            f"{where}: the weighted sum for response {i} of the batch is {' + '.join(said)} = {float(sums[i]):g},"
            " beyond what fp32 holds. Lower the weights, or scale what the sources say."
        )
    return by_source, sums.float()


def _awaited(sources: Sequence[Source], responses: Responses) -> dict[Source, Source]:
    """For each coroutine function a source that says what it has answered, or why one of them has not.

    They are awaited together, so several services that each takes its time over are asked at once.
    """
    functions = [source for source in sources if isinstance(source, FunctionSource) and source.is_async]
    try:
        answers = ask_at_once(functions, responses)
    except RewardError as error:
        return dict.fromkeys(functions, partial(_raise, error))
    return {source: partial(_said, answer) for source, answer in answers.items()}


def _raise(error: RewardError, responses: Responses) -> Sequence[float]:
    raise error


def _said(answer: Sequence[float], responses: Responses) -> Sequence[float]:
    return answer


def _ask(source: Source, responses: Responses, world: World) -> Tensor:
    """What a source says of the responses of all ranks, (B,) fp32."""
    answer: Tensor | RewardError
    try:
        answer = torch.tensor(source(responses), dtype=torch.float32)
    except RewardError as error:
        answer = error
    answers = all_gather(answer, world)
    for failed in answers:
        if isinstance(failed, RewardError):
            raise failed
    return torch.cat([answer for answer in answers if isinstance(answer, Tensor)])


def response_texts(packed: Packed, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text by which each response goes on from its prompt, without special tokens."""
    sequences = [part.tolist() for part in packed.tokens.split(packed.lengths.tolist())] if len(packed) else []
    pairs = list(zip(sequences, packed.response_lengths.tolist(), strict=True))
    return decode_after([ids[:-n] for ids, n in pairs], [ids[-n:] for ids, n in pairs], tokenizer)
