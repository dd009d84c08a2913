"""The score of each response, computed from the scores of all sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.config import PPOConfig
from fastppo.data import Moments, Packed, PromptSet, Rollout, Scored, concatenate, decode_after
from fastppo.distributed import World, all_gather
from fastppo.rewards.functions.function import FunctionSource, score_concurrently
from fastppo.rewards.model import Ensemble, ModelSource
from fastppo.rewards.responses import LARGEST, Responses, RewardError, Source

SMALLEST_STD = 1e-6  # avoids a division by 0 if all scores are equal
OF_ALL_RANKS = (ModelSource, Ensemble)  # sources that all ranks ask together, where the trainer computes


@dataclass(frozen=True)
class Answered:
    """A rank's responses, and what the sources that it asks alone have said of them."""

    responses: Responses
    answers: Mapping[Source, Source]  # for each of these a source that returns its scores, or raises its error


def responses_of_rank(rollout: Rollout, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase) -> Responses:
    """The input of sources. prompts: what the responses answer, with the other columns of the data."""
    rows = rollout.sources.tolist()
    return Responses(
        prompts=[prompts.texts[row] for row in rows],
        texts=response_texts(rollout.packed, tokenizer),
        ended=rollout.ended.tolist(),
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
        packed=rollout.packed,
        messages=prompts.messages_of(rows),
        conversations=rollout.conversations,
    )


def ask(
    responses: Responses, sources: Sequence[tuple[Source, float]], judge: Sequence[tuple[Source, float]] = ()
) -> Answered:
    """Ask functions and services of this rank's responses, in the order in which `score` would; what is after an error
    is not asked. No collectives, so that it may run in a thread beside the trainer's."""
    answers: dict[Source, Source] = {}
    try:
        for group in (sources, judge):
            alone = [source for source, _ in group if not isinstance(source, OF_ALL_RANKS)]
            answers |= _resolve_async(alone, responses)
            for source in alone:
                answers[source] = partial(_return, answers.get(source, source)(responses))
    except RewardError as error:
        answers[source] = partial(_raise, error)
    return Answered(responses, answers)


def score(
    rollout: Rollout,
    prompts: PromptSet,
    sources: Sequence[tuple[Source, float]],
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    judge: Sequence[tuple[Source, float]] = (),
    *,
    judge_setting: str = "health.judge",
    asked: Answered | None = None,
) -> Scored:
    """Score this rank's responses with all sources; returns the responses of all ranks, in the order of the prompts.

    sources, judge: pairs of a source and its weight; the judge's scores are not part of the reward. The rewards that an
    environment gave to turns are part of the score, as a last source of weight 1. judge_setting: the judge's name in
    messages; asked: what `ask` has found of these responses. Raises RewardError on every rank if a source failed on one
    of them, so that no rank waits for it, or if a sum is outside the range of fp32.
    """
    if asked is None:
        asked = Answered(responses_of_rank(rollout, prompts, tokenizer), {})
    by_source, scores = _score_all("rewards", sources, asked, world)
    judged = _score_all(judge_setting, judge, asked, world)[1] if judge else torch.full_like(scores, math.nan)
    global_rollout = concatenate(all_gather(rollout, world))
    if global_rollout.turn_rewards is None:
        return Scored(global_rollout, by_source, scores, judged)
    of_turns = _of_turns(global_rollout)
    whole = scores + of_turns
    for i in whole.isinf().nonzero().flatten().tolist()[:1]:
        raise RewardError(
            f"rewards and rollout.environment: response {i} of the batch scores {float(scores[i]):g} at its end and"
            f" {float(of_turns[i]):g} for its turns, in sum outside the range of fp32. Return smaller rewards."
        )
    return Scored(global_rollout, torch.cat([by_source, of_turns[:, None]], dim=1), whole, judged, scores)


def shape(scored: Scored, moments: Moments, ppo: PPOConfig) -> Tensor:
    """The scores (B,) fp32 at the end of a response that PPO learns from; an environment's rewards for turns are not
    among them, and reach PPO as they are.

    In this order: normalised to mean 0 and standard deviation 1 over all scores of the run so far (`moments`, these
    included), clipped, and reduced by the penalties for a truncated response and for each token beyond the soft length
    limit.
    """
    scores, rollout = scored.end_scores, scored.rollout
    if ppo.score_normalise:
        scores = (scores - moments.mean) / max(moments.std, SMALLEST_STD)
    if ppo.score_clip is not None:
        scores = scores.clamp(-ppo.score_clip, ppo.score_clip)
    scores = scores - ppo.truncation_penalty * (~rollout.ended).float()
    if ppo.length_limit is not None:
        scores = scores - ppo.length_penalty * (rollout.packed.response_lengths - ppo.length_limit).clamp(min=0)
    return scores


def _of_turns(rollout: Rollout) -> Tensor:
    """The sum of each response's turn rewards, (B,) fp32. Raises RewardError for one outside the range of fp32."""
    sums = rollout.rewards_of_turns
    for i in (sums.abs() > LARGEST).nonzero().flatten().tolist()[:1]:
        raise RewardError(
            f"rollout.environment: the rewards for the turns of response {i} of the batch are {float(sums[i]):g} in"
            " sum, outside the range of fp32. Return smaller rewards."
        )
    return sums.float()


def _score_all(
    where: str, sources: Sequence[tuple[Source, float]], asked: Answered, world: World
) -> tuple[Tensor, Tensor]:
    """The scores of the S sources for the responses of all ranks, (B, S) fp32, and their weighted sum, (B,) fp32; 0 if
    there are no sources.

    where: the setting with the sources, for errors.
    """
    responses = asked.responses
    resolved = {**asked.answers, **_resolve_async([s for s, _ in sources if s not in asked.answers], responses)}
    columns = [_score(resolved.get(source, source), responses, world) for source, _ in sources]
    if not columns:
        count = sum(all_gather(len(responses.texts), world))
        return torch.empty(count, 0), torch.zeros(count)
    by_source = torch.stack(columns, dim=1)
    weights = [weight for _, weight in sources]
    sums = by_source.double() @ torch.tensor(weights, dtype=torch.float64)
    for i in (sums.abs() > LARGEST).nonzero().flatten().tolist()[:1]:
        terms = [f"{weight:g} * {x:g}" for weight, x in zip(weights, by_source[i].tolist(), strict=True)]
        raise RewardError(
            f"{where}: the weighted sum for response {i} of the batch is {' + '.join(terms)} = {float(sums[i]):g},"
            " outside the range of fp32. Lower the weights, or let the sources return smaller scores."
        )
    return by_source, sums.float()


def _resolve_async(sources: Iterable[Source], responses: Responses) -> dict[Source, Source]:
    """For each coroutine function among the sources, a source that returns its computed scores or raises the error.

    They run at the same time, so that the waiting times of several services do not add up.
    """
    functions = [source for source in sources if isinstance(source, FunctionSource) and source.is_async]
    try:
        answers = score_concurrently(functions, responses)
    except RewardError as error:
        return dict.fromkeys(functions, partial(_raise, error))
    return {source: partial(_return, answer) for source, answer in answers.items()}


def _raise(error: RewardError, responses: Responses) -> Sequence[float]:
    raise error


def _return(answer: Sequence[float], responses: Responses) -> Sequence[float]:
    return answer


def _score(source: Source, responses: Responses, world: World) -> Tensor:
    """The scores of a source for the responses of all ranks, (B,) fp32."""
    answer: Tensor | RewardError
    try:
        answer = torch.tensor(source(responses), dtype=torch.float32)
    except RewardError as error:
        answer = error
    answers = all_gather(answer, world)
    for rank_answer in answers:
        if isinstance(rank_answer, RewardError):
            raise rank_answer
    return torch.cat([rank_answer for rank_answer in answers if isinstance(rank_answer, Tensor)])


def response_texts(packed: Packed, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that the policy wrote in each response, as the continuation of what is before it, without special
    tokens; its turns are joined by a line break."""
    tokens, lengths = packed.tokens.tolist(), packed.turn_lengths
    firsts = packed.predictors[lengths.cumsum(0) - lengths] + 1  # (turns,) the row of each turn's first token
    starts = packed.cu_seqlens[:-1].repeat_interleave(packed.turn_counts)  # of each turn's sequence
    ends = (firsts + lengths).tolist()
    before = [tokens[start:first] for start, first in zip(starts.tolist(), firsts.tolist(), strict=True)]
    turns = [tokens[first:end] for first, end in zip(firsts.tolist(), ends, strict=True)]
    texts = iter(decode_after(before, turns, tokenizer))
    return ["\n".join(islice(texts, count)) for count in packed.turn_counts.tolist()]
