"""From scored responses to experience: old logprobs, KL to the reference, values, rewards, advantages.

The batch is global here: token ids and a number a token are small, so every rank holds all of it, plans the same
microbatches, computes its share and passes it on. Whitening and the KL controller then see the same on every rank.

Rewards, GAE and whitening are computed on the CPU on purpose. Scores come from the host, logprobs and values of all
ranks meet there, and there the whole batch stays, for all epochs, the log and the checkpoint. GAE of 512 responses of
256 tokens takes 0.1 ms of one core. A GPU would need rewards and values copied to it, advantages and returns back, and
the host to wait: about as long, and nothing gained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastppo.config import Config
from fastppo.data import Experience, Minibatch, Moments, Scored, plan_step
from fastppo.distributed import World
from fastppo.models import PrefixStates, Roles
from fastppo.online import measure
from fastppo.ppo.advantages import Estimator, estimate_advantages, whitened
from fastppo.ppo.losses import PolicyLoss
from fastppo.ppo.ptx import Texts
from fastppo.ppo.schedule import kl_estimate, token_rewards
from fastppo.rewards import shape


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

    moments: of the end scores of the run, these included. first_epoch: the minibatches of the first epoch of learning.
    Old logprobs are computed on the same microbatches, so that the ratio of the first update is exactly 1: in bf16
    another packing of the same tokens changes a logprob by up to 0.34, which moves its ratio past the clip.
    prefix_cache: is filled for learning.
    """
    packed, config, world = scored.rollout.packed, context.config, context.world
    mine = [sequences for minibatch in first_epoch for sequences in minibatch.of_group(world.group, world.groups)]
    measured = measure(packed, mine, context.roles, prefix_cache, config, world)
    if config.ppo.kl_kind != "exact":
        measured["kl"] = kl_estimate(measured["old_logprobs"], measured["ref_logprobs"], config.ppo.kl_kind)

    ppo, values = config.ppo, measured.pop("values", None)
    kl_coef = context.kl_coef if ppo.kl_in == "reward" else 0.0
    shaped = shape(scored, moments, ppo)
    turn_rewards = scored.rollout.turn_rewards
    rewards = token_rewards(measured["kl"], shaped, packed.last_response_tokens, kl_coef, turn_rewards)
    # by where they are in the batch, not by their prompt, which a batch has twice where a pass over the data ends
    groups = torch.arange(len(packed)) // config.sampling.samples_per_prompt  # (B,), from 0 on
    if context.step < config.critic_steps:  # the critic learns alone, from what did follow: it knows nothing yet
        ppo = replace(ppo, lam_critic=1.0)
    estimated = estimate_advantages(context.estimator, rewards, values, groups, packed.response_cu_seqlens, ppo)
    return Experience(
        packed=packed,
        scores=scored.scores,
        by_source=scored.by_source,
        judged=scored.judged,
        ended=scored.rollout.ended,
        sampler_logprobs=scored.rollout.logprobs,
        rewards=rewards,
        values=values,
        advantages=whitened(estimated.advantages) if ppo.whitens else estimated.advantages,
        returns=None if values is None else estimated.returns,
        advantage_std=float(estimated.advantages.double().std(correction=0)),
        turn_rewards=turn_rewards,
        **measured,
    )


@torch.no_grad()
def recompute_prefix(experience: Experience, done: int, prefix_cache: PrefixStates, context: StepContext) -> None:
    """Fill the cache of a process that resumes after `done` updates on the batch.

    The states are computed on the same microbatches as in the stopped process: another packing could change the last
    bit.
    """
    packed, roles, world = experience.packed, context.roles, context.world
    plan = plan_step(packed.lengths, context.config, context.step, world.groups, roles.attention)
    computed = [minibatch for epoch in plan for minibatch in epoch][: max(done, len(plan[0]))]
    critic = [] if roles.critic is None else [roles.critic.module]
    for minibatch in computed:
        for sequences in minibatch.of_group(world.group, world.groups):
            microbatch = packed.select(sequences).to(world.device)
            for role in (roles.policy, roles.reference.module, *critic):
                prefix_cache(role, microbatch, sequences)
