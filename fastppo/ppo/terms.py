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
from fastppo.data import Experience, Minibatch, Packed
from fastppo.distributed import Engine, to_device
from fastppo.models import Policy, PrefixStates, hidden_states, sequence_group
from fastppo.ops import TokenStats, eager
from fastppo.ppo.experience import StepContext
from fastppo.ppo.losses import PolicyLoss, TokenLoss, checked_loss, weighted


class Sums(NamedTuple):
    """Statistics of a minibatch so far, summed over tokens: they add up over microbatches and ranks, means do not."""

    policy: Tensor  # (8,) as in ops.PolicyStats
    ratio_max: Tensor  # ()
    value: Tensor  # (7,) as in ops.ValueStats
    nll: Tensor  # () of the tokens of good responses, nats

    @staticmethod
    def zero(device: torch.device) -> Sums:
        policy, ratio_max, value, nll = (torch.zeros(shape, device=device) for shape in (8, (), 7, ()))
        return Sums(policy, ratio_max, value, nll)

    def __add__(self, other: Any) -> Sums:
        return Sums(
            self.policy + other.policy.detach(),
            torch.maximum(self.ratio_max, other.ratio_max.detach()),
            self.value + other.value.detach(),
            self.nll + other.nll.detach(),
        )

    def of_rank(self) -> Sums:
        """This rank's part of sums that each rank of its group has computed over whole sequences; exact, since a group
        has 1, 2, 4 or 8 ranks."""
        ranks = sequence_group().size
        return Sums(self.policy / ranks, self.ratio_max, self.value / ranks, self.nll / ranks)


class Totals(NamedTuple):
    """What the sums of a minibatch are divided by, over all ranks: tokens with weight 0 count too."""

    policy: float  # in the policy's loss, as `ppo.aggregate` has it
    tokens: float
    good: float  # tokens of good responses, for `ppo.nll_coef`

    @staticmethod
    def of(experience: Experience, minibatch: Minibatch, config: Config) -> Totals:
        sequences = torch.cat(minibatch.microbatches)
        lengths = experience.packed.response_lengths[sequences]
        tokens, good = int(lengths.sum()), lengths[experience.scores[sequences] > config.ppo.nll_above]
        of_policy = {
            "token": tokens,
            "sequence": len(sequences),
            "constant": len(sequences) * config.sampling.max_new_tokens,
        }
        return Totals(of_policy[config.ppo.aggregation], tokens, int(good.sum()))


@dataclass(frozen=True)
class Targets:
    """What a microbatch learns from, on the device. Each part of the loss is a sum over its tokens, divided by a number
    of the whole minibatch."""

    packed: Packed
    old_logprobs: Tensor  # (m,) fp32, as all of the following
    advantages: Tensor
    old_values: Tensor | None  # None: there is no critic, and no returns
    returns: Tensor | None
    divisors: Totals  # of the minibatch; over the number of ranks, over which engines average gradients
    kl_reference: dict[str, Any]  # arguments of the loss's KL term; empty if the penalty is in the reward
    weights: Tensor | None = None  # of the policy loss alone, 0 or more; None: all 1
    shares: Tensor | None = None  # of a token in its response, for the mean over responses; None: all 1
    good: Tensor | None = None  # 1 where the response is good, else 0; None: without `ppo.nll_coef`


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
    ppo, advantages = config.ppo, targets.advantages
    for weights in (targets.weights, targets.shares):
        advantages = advantages if weights is None else weights * advantages
    loss, stats = policy.head(
        hidden,
        ops.linear_policy_loss,
        targets.packed.responses,
        targets.old_logprobs,
        advantages,
        temperature=config.sampling.temperature,
        clip_low=ppo.clip_low,
        clip_high=ppo.clip_high,
        dual_clip=ppo.dual_clip,
        entropy_coef=ppo.entropy_coef,
        normalizer=targets.divisors.policy,
        **targets.kl_reference,
    )
    return loss, Sums(stats.sums, stats.ratio_max, stats.sums.new_zeros(7), stats.sums.new_zeros(()))


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

    def summed(x: Tensor) -> Tensor:
        return x.sum() if targets.shares is None else (targets.shares * x).sum()

    surrogate = summed(tokens.loss)
    total = surrogate - eager.term(ppo.entropy_coef, summed(stats.entropy))
    if kl is not None:
        total = total + eager.term(kl_coef, summed(kl))
    loss_of_tokens, nll = total / targets.divisors.policy, torch.zeros_like(surrogate)
    if targets.good is not None:
        nll = -(targets.good * stats.logprobs).sum()
        loss_of_tokens = loss_of_tokens + ppo.nll_coef * nll / targets.divisors.good
    return loss_of_tokens, _sums(surrogate, stats, kl, tokens, targets, nll)


def _sums(
    surrogate: Tensor, stats: TokenStats, kl: Tensor | None, tokens: TokenLoss, targets: Targets, nll: Tensor
) -> Sums:
    """The statistics that the fused op has, and in its order."""
    log_ratio = stats.logprobs.detach() - targets.old_logprobs
    ratio = eager.bounded_exp(log_ratio)
    clipped, dual_clipped = (
        ratio.new_full((), math.nan) if x is None else x.sum() for x in (tokens.clipped, tokens.dual_clipped)
    )
    counts = (clipped, dual_clipped, ratio.sum(), ratio.new_full((), len(ratio)))
    kl_sum = torch.zeros_like(surrogate) if kl is None else kl.sum()
    of_tokens = (surrogate, stats.entropy.sum(), kl_sum, eager.exp_less_tangent(log_ratio).sum())
    sums = torch.stack([x.detach().to(ratio) for x in (*of_tokens, *counts)])
    return Sums(sums, ratio.max(), sums.new_zeros(7), nll.to(ratio)).of_rank()


def value_term(role: Any, hidden: Tensor, targets: Targets, config: Config) -> tuple[Tensor, Sums]:
    """The clipped squared error of V, the mean over tokens, times its coefficient."""
    assert targets.old_values is not None and targets.returns is not None
    loss, stats = ops.value_loss(
        role.value_head(hidden),
        targets.old_values,
        targets.returns,
        clip=config.ppo.value_clip,
        normalizer=targets.divisors.tokens,
    )
    nothing = stats.sums.new_zeros
    return config.ppo.value_coef * loss, Sums(nothing(8), nothing(()), stats.sums, nothing(())).of_rank()


def value_head_term(role: Any, hidden: Tensor, targets: Targets, config: Config) -> tuple[Tensor, Sums]:
    """The value loss for the head alone, the backbone left as it is (warm-up of a shared critic)."""
    return value_term(role, hidden.detach(), targets, config)


def jobs_of(context: StepContext, actor_rate: float, critic_rate: float, train_actor: bool) -> list[Job]:
    """Which engines learn from which terms of the loss, at which rates."""
    actor, critic = context.roles.actor, context.roles.critic
    policy_term: Term = clip_term if context.config.ppo.loss_is_fused else partial(loss_term, context.loss)
    if context.config.value_function is None:
        return [Job(actor, [policy_term], [actor_rate, critic_rate])]
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
    divisors: Totals,
    prefix_cache: PrefixStates,
    context: StepContext,
) -> Targets:
    """What a microbatch learns from, with the reference as the loss reads it."""
    ppo, device, reference = context.config.ppo, context.world.device, context.roles.reference
    packed = experience.packed.select(sequences).to(device)
    lengths = experience.packed.response_lengths[sequences]

    def rows(values: Tensor) -> Tensor:
        return to_device(experience.packed.select_tokens(values, sequences), device)

    def of_responses(values: Tensor) -> Tensor:
        return to_device(values.float().repeat_interleave(lengths), device)

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
        old_values=None if experience.values is None else rows(experience.values),
        returns=None if experience.returns is None else rows(experience.returns),
        divisors=divisors,
        kl_reference=kl_reference,
        weights=None if weights is None else rows(weights),
        shares=of_responses(1.0 / lengths) if ppo.aggregation == "sequence" else None,
        good=of_responses(experience.scores[sequences] > ppo.nll_above) if ppo.nll_coef else None,
    )
