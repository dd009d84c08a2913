"""From scored responses to experience: old logprobs, KL to the reference, values, rewards, advantages.

The batch is global here: token ids and a number a token are small, so every rank holds all of it, plans the same
microbatches, computes its share and passes it on. Whitening and the KL controller then see the same on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.data import Experience, Minibatch, Packed, Scored, segment_rows
from fastppo.distributed import World, all_gather, gathered, stop
from fastppo.models import Policy, PrefixStates, Roles, hidden_states, token_stats
from fastppo.ppo.schedule import advantages_and_returns, kl_estimate, token_rewards

TokenRows = dict[str, Tensor]  # name -> (m,) fp32, on the response tokens of a microbatch


@torch.no_grad()
def estimate(
    scored: Scored,
    roles: Roles,
    first_epoch: list[Minibatch],
    config: Config,
    beta: float,
    world: World,
) -> Experience:
    """Experience for the global batch.

    first_epoch: the minibatches that learning begins with. Old logprobs are computed on the very microbatches of the
    first epoch: in bf16 another packing of the same tokens moves a logprob by up to 0.34 and its ratio past the clip,
    the same packing not at all, so on the first update the ratio is 1.
    """
    packed = scored.rollout.packed
    parts, prefix = [], PrefixStates()
    for minibatch in first_epoch:
        for sequences in minibatch.of_rank(world.rank, world.ranks):
            stop.check(world)
            rows = _measure(packed.select(sequences).to(world.device), sequences, roles, prefix, config)
            parts.append((sequences, {name: x.float().cpu() for name, x in rows.items()}))
    measured = _assemble(packed, [part for rank in all_gather(parts, world) for part in rank])
    if config.ppo.kl_kind != "exact":
        measured["kl"] = kl_estimate(measured["old_logprobs"], measured["ref_logprobs"], config.ppo.kl_kind)

    shaping = beta if config.ppo.kl_in == "reward" else 0.0
    rewards = token_rewards(measured["kl"], scored.shaped, packed.last_response_tokens, shaping)
    advantages, returns = advantages_and_returns(
        rewards,
        measured["values"],
        packed.response_cu_seqlens,
        gamma=config.ppo.gamma,
        lam=config.ppo.lam,
        whiten=config.ppo.whiten_advantages,
    )
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
        prefix=prefix,
        **measured,
    )


@torch.no_grad()
def recall_prefix(packed: Packed, done: list[Minibatch], roles: Roles, world: World) -> PrefixStates:
    """The prefix states of a process that has computed these minibatches of the batch, for one that goes on there.

    In another packing they could differ in the last bit.
    """
    prefix = PrefixStates()
    for minibatch in done:
        for sequences in minibatch.of_rank(world.rank, world.ranks):
            piece = packed.select(sequences).to(world.device)
            for role in (
                roles.policy,
                roles.reference.module,
                *([] if roles.critic is None else [roles.critic.module]),
            ):
                prefix(role, piece, sequences)
    return prefix


def _measure(packed: Packed, sequences: Tensor, roles: Roles, prefix: PrefixStates, config: Config) -> TokenRows:
    temperature, exact = config.sampling.temperature, config.ppo.kl_kind == "exact"
    reference: Policy = roles.reference.module
    prefix_states = prefix(reference, packed, sequences)
    against: dict[str, Tensor | None] = {}
    ref_logprobs: Any = None
    if exact:
        against = reference.head.as_reference(roles.reference(packed, hidden_states, prefix_states))
    else:
        ref_logprobs = roles.reference(
            packed, partial(token_stats, packed.responses, temperature), prefix_states
        ).logprobs

    def act(policy: Policy, hidden: Tensor) -> TokenRows:
        stats = token_stats(packed.responses, temperature, policy, hidden, **against)
        rows = {"old_logprobs": stats.logprobs, "entropy": stats.entropy, "ref_logprobs": ref_logprobs}
        if exact:
            rows |= {"ref_logprobs": stats.ref_logprobs, "kl": stats.kl}
        if policy.value_head is not None:
            rows["values"] = policy.value_head(hidden)
        return rows

    prefix_states = prefix(roles.policy, packed, sequences)
    with gathered(reference.head.parameters() if exact else ()):  # the actor's forward pass reads both heads
        rows: TokenRows = roles.actor(packed, act, prefix_states)
    if roles.critic is not None:
        prefix_states = prefix(roles.critic.module, packed, sequences)
        rows["values"] = roles.critic(packed, lambda critic, hidden: critic.value_head(hidden), prefix_states)
    return rows


def _assemble(packed: Packed, parts: list[tuple[Tensor, TokenRows]]) -> TokenRows:
    """Microbatches' rows back into (M,) tensors in the batch's own order."""
    total = int(packed.response_cu_seqlens[-1])
    whole = {name: torch.zeros(total) for name in parts[0][1]}
    for sequences, rows in parts:
        at = segment_rows(packed.response_cu_seqlens, sequences)
        for name, x in rows.items():
            whole[name][at] = x
    return whole
