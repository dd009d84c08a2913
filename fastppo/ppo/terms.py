"""The terms of the loss that a microbatch has: those of the policy, those of the value, and what each is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import Config
from fastppo.data import Experience, Packed
from fastppo.distributed import Engine, to_device
from fastppo.models import Policy, PrefixStates, hidden_states
from fastppo.ops import eager
from fastppo.ppo.experience import StepContext
from fastppo.ppo.losses import PolicyLoss, checked_loss, weighted


class Sums(NamedTuple):
    """Statistics of a minibatch so far, summed over tokens: they add up over microbatches and ranks, means do not."""

    policy: Tensor  # (8,) as in ops.PolicyStats
    ratio_max: Tensor  # ()
    value: Tensor  # (7,) as in ops.ValueStats

    @staticmethod
    def zero(device: torch.device) -> Sums:
        return Sums(torch.zeros(8, device=device), torch.zeros((), device=device), torch.zeros(7, device=device))

    def __add__(self, other: Any) -> Sums:
        return Sums(
            self.policy + other.policy.detach(),
            torch.maximum(self.ratio_max, other.ratio_max.detach()),
            self.value + other.value.detach(),
        )


@dataclass(frozen=True)
class Targets:
    """What a microbatch learns from, on the device. The loss sums over its tokens and divides by `normalizer`."""

    packed: Packed
    old_logprobs: Tensor  # (m,) fp32, as all of the following
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    normalizer: Tensor  # () fp32
    kl_reference: dict[str, Any]  # arguments of the loss's KL term; empty if the penalty is in the reward
    weights: Tensor | None = None  # of the policy loss alone, 0 or more; None: all 1


Term = Callable[[Any, Tensor, Targets, Config], tuple[Tensor, Sums]]  # (role, hidden (m, H), ...) -> its loss


class Job(NamedTuple):
    """What an engine learns in an update."""

    engine: Engine
    terms: list[Term]  # of its loss
    rates: list[float]  # of the engine's groups of parameters


def clip_term(policy: Policy, hidden: Tensor, targets: Targets, config: Config) -> tuple[Tensor, Sums]:
    """The formula of `losses.clip` with entropy bonus and KL term (if configured), fused with the vocabulary head.

    A weight w >= 0 goes into the advantage: w min(r A, clip(r) A) = min(r wA, clip(r) wA), and so for the dual clip.
    """
    ppo, weights = config.ppo, targets.weights
    loss, stats = policy.head(
        hidden,
        ops.linear_policy_loss,
        targets.packed.responses,
        targets.old_logprobs,
        targets.advantages if weights is None else weights * targets.advantages,
        temperature=config.sampling.temperature,
        clip_low=ppo.clip_low,
        clip_high=ppo.clip_high,
        dual_clip=ppo.dual_clip,
        entropy_coef=ppo.entropy_coef,
        normalizer=targets.normalizer,
        **targets.kl_reference,
    )
    return loss, Sums(stats.sums, stats.ratio_max, stats.sums.new_zeros(7))


def loss_term(
    loss: PolicyLoss, policy: Policy, hidden: Tensor, targets: Targets, config: Config
) -> tuple[Tensor, Sums]:
    """Any loss of `fastppo.ppo.losses`, with the same terms and statistics beside it as `clip_term`."""
    ppo, packed, kl_reference = config.ppo, targets.packed, dict(targets.kl_reference)
    kl_coef, kl_kind = kl_reference.pop("kl_coef", 0.0), kl_reference.pop("kl_kind", None)
    ref_logprobs = kl_reference.pop("ref_logprobs", None)  # what is left is the reference's head
    temperature = config.sampling.temperature
    stats = policy.head(hidden, ops.linear_logprobs, packed.responses, temperature=temperature, **kl_reference)
    tokens = checked_loss(
        loss, stats.logprobs, targets.old_logprobs, targets.advantages, packed.response_cu_seqlens, ppo
    )
    if targets.weights is not None:
        tokens = weighted(tokens, targets.weights)
    kl = stats.kl if ref_logprobs is None else eager.kl_estimate(stats.logprobs, ref_logprobs, kl_kind)

    surrogate, entropy = tokens.loss.sum(), stats.entropy.sum()
    kl_sum = torch.zeros_like(surrogate) if kl is None else kl.sum()
    total = surrogate - eager.term(ppo.entropy_coef, entropy) + eager.term(kl_coef, kl_sum)
    log_ratio = stats.logprobs.detach() - targets.old_logprobs
    ratio = eager.bounded_exp(log_ratio)
    clipped, dual_clipped = (
        ratio.new_full((), math.nan) if x is None else x.sum() for x in (tokens.clipped, tokens.dual_clipped)
    )
    counts = (clipped, dual_clipped, ratio.sum(), ratio.new_full((), len(ratio)))
    sums = torch.stack(
        [x.detach().to(ratio) for x in (surrogate, entropy, kl_sum, eager.exp_less_tangent(log_ratio).sum(), *counts)]
    )
    return total / targets.normalizer, Sums(sums, ratio.max(), sums.new_zeros(7))


def value_term(role: Any, hidden: Tensor, targets: Targets, config: Config) -> tuple[Tensor, Sums]:
    """The clipped squared error of V, times its coefficient."""
    loss, stats = ops.value_loss(
        role.value_head(hidden),
        targets.old_values,
        targets.returns,
        clip=config.ppo.value_clip,
        normalizer=targets.normalizer,
    )
    return config.ppo.value_coef * loss, Sums(stats.sums.new_zeros(8), stats.sums.new_zeros(()), stats.sums)


def value_head_term(role: Any, hidden: Tensor, targets: Targets, config: Config) -> tuple[Tensor, Sums]:
    """The value loss for the head alone, the backbone left as it is (warm-up of a shared critic)."""
    return value_term(role, hidden.detach(), targets, config)


def jobs_of(context: StepContext, actor_rate: float, critic_rate: float, train_actor: bool) -> list[Job]:
    """Which engines learn from which terms of the loss, at which rates."""
    actor, critic = context.roles.actor, context.roles.critic
    policy_term: Term = clip_term if context.config.ppo.loss == "clip" else partial(loss_term, context.loss)
    if critic is None and train_actor:
        return [Job(actor, [policy_term, value_term], [actor_rate, critic_rate])]
    if critic is None:
        return [Job(actor, [value_head_term], [actor_rate, critic_rate])]
    value_job = Job(critic, [value_term], [critic_rate])
    return [Job(actor, [policy_term], [actor_rate]), value_job] if train_actor else [value_job]


def add_terms(terms: list[Term], targets: Targets, config: Config, role: Any, hidden: Tensor) -> tuple[Tensor, Sums]:
    loss, sums = terms[0](role, hidden, targets, config)
    for term in terms[1:]:
        another, stats = term(role, hidden, targets, config)
        loss, sums = loss + another, sums + stats
    return loss, sums


def targets_of(
    experience: Experience,
    weights: Tensor | None,
    sequences: Tensor,
    normalizer: Tensor,
    prefix_cache: PrefixStates,
    context: StepContext,
) -> Targets:
    """What a microbatch learns from, with the reference as the loss reads it."""
    ppo, device, reference = context.config.ppo, context.world.device, context.roles.reference
    packed = experience.packed.select(sequences).to(device)

    def rows(values: Tensor) -> Tensor:
        return to_device(experience.packed.select_tokens(values, sequences), device)

    kl_reference: dict[str, Any] = {}
    if ppo.kl_in == "loss":
        kl_reference = {"kl_coef": context.kl_coef, "kl_kind": ppo.kl_kind}
        if ppo.loss_reads_reference:
            prefix_states = prefix_cache(reference.module, packed, sequences)
            kl_reference |= reference.module.head.as_reference(reference(packed, hidden_states, prefix_states))
        else:
            kl_reference |= {"ref_logprobs": rows(experience.ref_logprobs)}
    return Targets(
        packed=packed,
        old_logprobs=rows(experience.old_logprobs),
        advantages=rows(experience.advantages),
        old_values=rows(experience.values),
        returns=rows(experience.returns),
        normalizer=normalizer,
        kl_reference=kl_reference,
        weights=None if weights is None else rows(weights),
    )
