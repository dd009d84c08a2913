"""Evaluation on held-out prompts, with the same random numbers every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppo import ops, stop
from fastppo.batch import Packed, Prompts, Scored
from fastppo.config import Config
from fastppo.data import PromptSet
from fastppo.engine import World, all_gather
from fastppo.feedback import Source, gather_scored, score
from fastppo.figures import distinct, ngrams
from fastppo.microbatch import pack_even
from fastppo.models import Policy
from fastppo.roles import Roles
from fastppo.rollout import sample
from fastppo.stats import TokenStats
from fastppo.track import Sample
from fastppo.trunk import TrunkStates


@dataclass(frozen=True)
class Evaluation:
    """The actor on the held-out prompts."""

    metrics: dict[str, float]
    scores: list[float]
    responses: list[str]

    @property
    def held_out(self) -> float:
        """By which checkpoints are compared: what the judge says if there is one, since the score may be exploited."""
        return self.metrics.get("judge", self.metrics["score"])


def evaluate(
    roles: Roles,
    heldout: PromptSet,
    sources: Sequence[tuple[Source, float]],
    stop_ids: list[int],
    config: Config,
    world: World,
    judge: Sequence[tuple[Source, float]] = (),
) -> Evaluation:
    """One response to each held-out prompt, its score and what the judge says, and how far the actor has moved."""
    prompts = Prompts.of(heldout.tokens, range(len(heldout))).of_rank(world.rank, world.ranks)
    sampling = replace(config.sampling, temperature=config.eval.temperature)
    with stop.together(world):
        rollout = sample(roles.policy, prompts, sampling, stop_ids=stop_ids, seed=config.eval.seed)
    local = score(rollout, heldout, sources, roles.tokenizer, config.ppo, judge)
    surprise = sum(all_gather(_log_ratios(local, roles, config), world), torch.zeros(3, dtype=torch.float64))
    scored = gather_scored(local, world)
    packed, scores = scored.rollout.packed, scored.scores.double()
    count, tokens = len(packed), int(packed.response_cu_seqlens[-1])
    responses = packed.responses.split(packed.response_lengths.tolist())
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "score_error": float(scores.std(correction=0)) / math.sqrt(count),
        "kl": float(surprise[0]) / count,
        "ref_perplexity": math.exp(float(surprise[1]) / tokens),
        "distinct_2": distinct(ngrams(packed.responses.numpy(), packed.response_lengths.numpy(), 2)[1]),
        "response_length": tokens / count,
        "ended": float(scored.rollout.ended.double().mean()),
    }
    if judge:
        metrics["judge"] = float(scored.judged.double().mean())
    texts = roles.tokenizer.batch_decode([r.tolist() for r in responses], skip_special_tokens=True)
    return Evaluation(metrics, scores.tolist(), list(texts))


@torch.no_grad()
def _log_ratios(scored: Scored, roles: Roles, config: Config) -> Tensor:
    """(3,) fp64 sums over this rank's response tokens: log p - log p_ref, -log p_ref, entropy of p."""
    packed = scored.rollout.packed
    sums, trunk = torch.zeros(3, dtype=torch.float64), TrunkStates()
    if not len(packed):
        return sums
    budget = max(config.ppo.microbatch_tokens, int(packed.lengths.max()))
    for part in pack_even(torch.arange(len(packed)), packed.lengths, budget, ranks=1):
        piece = packed.select(part).to(roles.policy.device)
        policy, reference = (
            _stats(role, piece, trunk(role, piece, part), config.eval.temperature)
            for role in (roles.policy, roles.reference)
        )
        rows = (policy.logprobs - reference.logprobs, -reference.logprobs, policy.entropy)
        sums += torch.stack([x.double().sum() for x in rows]).cpu()
    return sums


def _stats(policy: Policy, packed: Packed, below: Tensor | None, temperature: float) -> TokenStats:
    hidden = policy.hidden(packed, below)[packed.predictors]
    stats: TokenStats = policy.head(hidden, ops.linear_logprobs, packed.responses, temperature=temperature)
    return stats


def samples(heldout: PromptSet, before: Evaluation, after: Evaluation) -> list[Sample]:
    """What the actor wrote to each held-out prompt before and after training."""
    columns = (heldout.texts, before.responses, before.scores, after.responses, after.scores)
    return [Sample(*row) for row in zip(*columns, strict=True)]
