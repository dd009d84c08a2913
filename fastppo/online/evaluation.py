"""Evaluation on held-out prompts, with the same random numbers every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastppo.config import OnlineConfig
from fastppo.data import IDLE, Packed, Prompts, PromptSet, of_group, pack_alone, rewards_by_turn
from fastppo.distributed import World, even_passes, gather_groups, stop
from fastppo.models import PrefixStates, Roles, token_stats
from fastppo.monitor import Sample, as_text, distinct_pairs, said_behind, turn_metrics
from fastppo.rewards import Source, response_texts, score
from fastppo.rollout import ActorSampler


@dataclass(frozen=True)
class Evaluation:
    """The actor on the held-out prompts."""

    metrics: dict[str, float]
    scores: list[float]
    responses: list[str]  # with an environment all that was said, each message with its role
    said: list[list[dict[str, str]]] | None = None  # with an environment role and text of each message behind a prompt
    turn_rewards: list[list[float]] | None = None  # with an environment the reward of each turn

    @property
    def held_out(self) -> float:
        """By which checkpoints are compared: what the judge says if there is one, since the score may be exploited."""
        return self.metrics.get("judge", self.metrics["score"])


def evaluate(
    roles: Roles,
    sampler: ActorSampler,
    heldout: PromptSet,
    sources: Sequence[tuple[Source, float]],
    config: OnlineConfig,
    world: World,
    judge: Sequence[tuple[Source, float]] = (),
) -> Evaluation:
    """One response to each held-out prompt, its score and what the judge says, and how far the actor has moved."""
    prompts = Prompts.of(heldout.tokens, range(len(heldout)), data=heldout).of_rank(world.rank, world.ranks)
    holding = roles.residency.holding
    with holding("sampling"), stop.together(world):
        sampler.sync()
        rollout = sampler.sample(prompts, temperature=config.eval.temperature, seed=config.eval.seed)
    with holding("feedback", then="experience"):
        scored = score(rollout, heldout, sources, roles.tokenizer, world, judge)
    with holding("experience"):
        of_group = _log_ratios(rollout.packed, roles, config, world)
    log_ratios = sum(gather_groups(of_group, world), torch.zeros(3, dtype=torch.float64))
    packed, scores = scored.rollout.packed, scored.scores.double()
    count, tokens = len(packed), int(packed.response_cu_seqlens[-1])
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "score_error": float(scores.std(correction=0)) / math.sqrt(count),
        "kl": float(log_ratios[0]) / count,
        "ref_perplexity": float((log_ratios[1] / tokens).exp()),
        "distinct_2": distinct_pairs(packed),
        "response_length": tokens / count,
        "ended": float(scored.rollout.ended.double().mean()),
        **turn_metrics(packed, scored.rollout.turn_rewards),
    }
    if judge:
        metrics["judge"] = float(scored.judged.double().mean())
    conversations, turn_rewards = scored.rollout.conversations, scored.rollout.turn_rewards
    if conversations is None or turn_rewards is None:
        return Evaluation(metrics, scores.tolist(), response_texts(packed, roles.tokenizer))
    asked = heldout.messages_of(scored.rollout.sources.tolist())
    said = [said_behind(conversation, prompt) for conversation, prompt in zip(conversations, asked, strict=True)]
    return Evaluation(metrics, scores.tolist(), [*map(as_text, said)], said, rewards_by_turn(packed, turn_rewards))


@torch.no_grad()
def _log_ratios(packed: Packed, roles: Roles, config: OnlineConfig, world: World) -> Tensor:
    """(3,) fp64 sums over the response tokens of this rank's group: log p - log p_ref, -log p_ref, entropy of p.

    packed: what this rank has drawn.
    """
    packed, _ = of_group(packed, world.sequence)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    parts = pack_alone(packed.lengths, config.microbatch_tokens)
    for part in even_passes(parts, config.zero, world):
        piece = (packed.select(part) if len(part) else IDLE).to(world.device)
        prefix = PrefixStates()  # of this part alone: actor and reference share it, and nobody comes back to it
        objective = partial(token_stats, piece.responses, config.eval.temperature)
        policy, reference = (
            engine(piece, objective, prefix(engine.module, piece, part)) for engine in (roles.actor, roles.reference)
        )
        if len(part):
            rows = (policy.logprobs - reference.logprobs, -reference.logprobs, policy.entropy)
            sums += torch.stack([x.double().sum() for x in rows])
    return sums.cpu()


def samples(heldout: PromptSet, before: Evaluation, after: Evaluation) -> list[Sample]:
    """What the actor wrote to each held-out prompt before and after training."""
    columns = (heldout.texts, before.responses, before.scores, after.responses, after.scores)
    return [Sample(*row) for row in zip(*columns, strict=True)]
