"""From scored responses to experience: old logprobs, KL to the reference, values, rewards, advantages.

The batch is global here: token ids and a number a token are small, so every rank holds all of it, plans the same
microbatches, computes its share and passes it on. Whitening and the KL controller then see the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.data import Experience, Minibatch, Moments, Packed, Scored, plan_step, segment_rows
from fastppo.distributed import World, all_gather, gathered, stop
from fastppo.models import Policy, PrefixStates, Roles, hidden_states, token_stats
from fastppo.ppo.advantages import Estimator, estimate_advantages
from fastppo.ppo.losses import PolicyLoss
from fastppo.ppo.ptx import Texts
from fastppo.ppo.schedule import kl_estimate, token_rewards
from fastppo.rewards import shape

TokenRows = dict[str, Tensor]  # name -> (m,) fp32, on the response tokens of a microbatch


@dataclass(frozen=True)
class StepContext:
    """What experience and updates of a PPO step depend on beside its batch."""

    roles: Roles
    config: Config
    world: World
    estimator: Estimator  # `ppo.estimator`
    loss: PolicyLoss  # `ppo.loss`
    texts: Texts | None  # mixed into the actor's updates
    step: int  # of the run, counted from 0, for the learning rates and the critic's warm-up
    kl_coef: float  # beta, in the reward or in the loss
    skipped: int = 0  # updates in a row that were not applied, at the end of the step before


@torch.no_grad()
def compute_experience(
    scored: Scored,
    moments: Moments,
    first_epoch: list[Minibatch],
    prefix_cache: PrefixStates,
    context: StepContext,
) -> Experience:
    """Experience for the global batch.

    moments: of all scores of the run, these included. first_epoch: the minibatches of the first epoch of learning. Old
    logprobs are computed on the same microbatches, so that the ratio of the first update is exactly 1: in bf16 another
    packing of the same tokens changes a logprob by up to 0.34, which moves its ratio past the clip. prefix_cache: is
    filled for learning.
    """
    packed, config, world = scored.rollout.packed, context.config, context.world
    parts = []
    for minibatch in first_epoch:
        for sequences in minibatch.of_rank(world.rank, world.ranks):
            stop.check(world)
            rows = _measure(packed.select(sequences).to(world.device), sequences, context.roles, prefix_cache, config)
            parts.append((sequences, {name: x.float().cpu() for name, x in rows.items()}))
    measured = _assemble(packed, [part for rank in all_gather(parts, world) for part in rank])
    if config.ppo.kl_kind != "exact":
        measured["kl"] = kl_estimate(measured["old_logprobs"], measured["ref_logprobs"], config.ppo.kl_kind)

    kl_coef = context.kl_coef if config.ppo.kl_in == "reward" else 0.0
    shaped = shape(scored, moments, config.ppo)
    rewards = token_rewards(measured["kl"], shaped, packed.last_response_tokens, kl_coef)
    groups = scored.rollout.sources.unique(return_inverse=True)[1]  # (B,), from 0 on
    advantages, returns = estimate_advantages(
        context.estimator, rewards, measured["values"], groups, packed.response_cu_seqlens, config.ppo
    )
    assert returns is not None  # there are values
    return Experience(
        packed=packed,
        scores=scored.scores,
        by_source=scored.by_source,
        judged=scored.judged,
        ended=scored.rollout.ended,
        sampler_logprobs=scored.rollout.logprobs,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        **measured,
    )


@torch.no_grad()
def recompute_prefix(experience: Experience, done: int, prefix_cache: PrefixStates, context: StepContext) -> None:
    """Fill the cache of a process that resumes after `done` updates on the batch.

    The states are computed on the same microbatches as in the stopped process: another packing could change the last
    bit.
    """
    packed, roles, world = experience.packed, context.roles, context.world
    plan = plan_step(packed.lengths, context.config, context.step, world.ranks, roles.attention)
    computed = [minibatch for epoch in plan for minibatch in epoch][: max(done, len(plan[0]))]
    critic = [] if roles.critic is None else [roles.critic.module]
    for minibatch in computed:
        for sequences in minibatch.of_rank(world.rank, world.ranks):
            microbatch = packed.select(sequences).to(world.device)
            for role in (roles.policy, roles.reference.module, *critic):
                prefix_cache(role, microbatch, sequences)


def _measure(packed: Packed, sequences: Tensor, roles: Roles, prefix_cache: PrefixStates, config: Config) -> TokenRows:
    """Logprobs, entropy, KL and values of a microbatch, before the first update."""
    temperature, exact = config.sampling.temperature, config.ppo.kl_kind == "exact"
    reference: Policy = roles.reference.module
    prefix_states = prefix_cache(reference, packed, sequences)
    kl_reference: dict[str, Tensor | None] = {}
    ref_logprobs: Any = None
    if exact:
        kl_reference = reference.head.as_reference(roles.reference(packed, hidden_states, prefix_states))
    else:
        ref_logprobs = roles.reference(
            packed, partial(token_stats, packed.responses, temperature), prefix_states
        ).logprobs

    def act(policy: Policy, hidden: Tensor) -> TokenRows:
        stats = token_stats(packed.responses, temperature, policy, hidden, **kl_reference)
        rows = {"old_logprobs": stats.logprobs, "entropy": stats.entropy, "ref_logprobs": ref_logprobs}
        if exact:
            rows |= {"ref_logprobs": stats.ref_logprobs, "kl": stats.kl}
        if policy.value_head is not None:
            rows["values"] = policy.value_head(hidden)
        return rows

    prefix_states = prefix_cache(roles.policy, packed, sequences)
    with gathered(reference.head.parameters() if exact else ()):  # the actor's forward pass reads both heads
        rows: TokenRows = roles.actor(packed, act, prefix_states)
    if roles.critic is not None:
        prefix_states = prefix_cache(roles.critic.module, packed, sequences)
        rows["values"] = roles.critic(packed, lambda critic, hidden: critic.value_head(hidden), prefix_states)
    return rows


def _assemble(packed: Packed, parts: list[tuple[Tensor, TokenRows]]) -> TokenRows:
    """Microbatches' rows back into (M,) tensors in the batch's own order."""
    total = int(packed.response_cu_seqlens[-1])
    whole = {name: torch.zeros(total) for name in parts[0][1]}
    for sequences, rows in parts:
        token_rows = segment_rows(packed.response_cu_seqlens, sequences)
        for name, x in rows.items():
            whole[name][token_rows] = x
    return whole
