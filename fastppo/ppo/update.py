"""Learning: several epochs of clipped updates on one batch (Schulman et al., 2017, algorithm 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import Config
from fastppo.data import Experience, Minibatch, Packed, Update
from fastppo.distributed import Engine, World, all_max, all_sum, gathered, stop, to_device
from fastppo.models import Policy, PrefixStates, hidden_states
from fastppo.monitor import note_fault
from fastppo.ops import eager
from fastppo.ppo.experience import StepContext
from fastppo.ppo.importance import importance_weights
from fastppo.ppo.losses import PolicyLoss, checked_loss, weighted
from fastppo.ppo.ptx import add_gradient
from fastppo.ppo.schedule import step_rates

log = logging.getLogger("fastppo")

# |ratio - 1| on the first update of a batch, where the policy is still the one that sampled (with identical packing).
RATIO_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}


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


def run_updates(
    experience: Experience,
    plan: list[list[Minibatch]],
    prefix_cache: PrefixStates,
    context: StepContext,
    done: Sequence[Update] = (),
) -> Iterator[Update]:
    """One update for each minibatch of the plan but those already done; yields each as it is applied.

    An update that finds the policy further from the one that sampled than `health.kl_limit` is not applied and the
    last, on all ranks alike. Raises TrainingFault after too many that were not finite, and Stopped between two
    microbatches, of which nothing is applied then.
    """
    config, world, step, updates = context.config, context.world, context.step, list(done)
    limit, weights = config.health.kl_limit, importance_weights(experience, config.importance)
    rates, train_actor = step_rates(config, step), step >= config.critic.warmup_steps
    texts = context.texts if train_actor else None
    batches_of_texts = iter(()) if texts is None else texts.from_update(step * len(rates) + len(updates))
    minibatches = [(epoch, minibatch) for epoch, part in enumerate(plan) for minibatch in part]
    for epoch, minibatch in minibatches[len(updates) :]:
        if updates and updates[-1].stopped:
            break
        jobs = _jobs(context, *rates[len(updates)], train_actor)
        tokens = int(experience.packed.response_lengths[torch.cat(minibatch.microbatches)].sum())
        ptx_loss = 0.0 if texts is None else add_gradient(texts, next(batches_of_texts), context.roles.actor, world)
        sums = _accumulate(jobs, experience, weights, minibatch, tokens, prefix_cache, context)
        norms = [job.engine.gradient_norm() for job in jobs]
        update = _summarise(epoch, sums, tokens, norms[0] if train_actor else math.nan, norms[-1], world)
        update = replace(update, ptx_loss=ptx_loss)
        finite = _finite(update, norms, train_actor)
        stopped = finite and update.approx_kl > limit
        if context.roles.average is not None:
            context.roles.average.before_step()
        for job in jobs:  # all or none: a critic that learned alone would no longer fit the actor
            job.engine.step(job.rates, apply=finite and not stopped)
        if context.roles.average is not None and train_actor and finite and not stopped:
            context.roles.average.update()
        if not finite:
            before = updates[-1].skipped if updates else context.skipped
            update = replace(update, skipped=before + 1)
            note_fault(experience, minibatch, asdict(update), config, step=step, number=len(updates), world=world)
        updates.append(replace(update, stopped=stopped))
        if len(updates) == 1 and train_actor:
            check_first_ratio(updates[0], config.optim.dtype)
        yield updates[-1]


def _finite(update: Update, norms: list[float], train_actor: bool) -> bool:
    """Whether loss and gradients are numbers. Both are sums over all ranks, so the ranks agree."""
    losses = [update.value_loss, update.policy_loss, update.kl_loss] if train_actor else [update.value_loss]
    return all(math.isfinite(x) for x in (*losses, update.ptx_loss, *norms))


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


def _jobs(context: StepContext, actor_rate: float, critic_rate: float, train_actor: bool) -> list[Job]:
    """Which engines learn from which terms of the loss, at which rates."""
    actor, critic = context.roles.actor, context.roles.critic
    policy_term: Term = clip_term if context.config.ppo.loss == "clip" else partial(loss_term, context.loss)
    if critic is None and train_actor:
        return [Job(actor, [policy_term, value_term], [actor_rate, critic_rate])]
    if critic is None:
        return [Job(actor, [value_head_term], [actor_rate, critic_rate])]
    value_job = Job(critic, [value_term], [critic_rate])
    return [Job(actor, [policy_term], [actor_rate]), value_job] if train_actor else [value_job]


def _accumulate(
    jobs: list[Job],
    experience: Experience,
    weights: Tensor | None,
    minibatch: Minibatch,
    tokens: int,
    prefix_cache: PrefixStates,
    context: StepContext,
) -> Sums:
    """Gradients and statistics of this rank's share of a minibatch, which has `tokens` response tokens in all: those
    with weight 0 count too."""
    config, world, reference = context.config, context.world, context.roles.reference
    # Engines average gradients over ranks, and the loss is to be a mean over the tokens of all of them.
    normalizer = torch.full((), tokens / world.ranks, dtype=torch.float32, device=world.device)
    sums = Sums.zero(world.device)
    microbatches = minibatch.of_rank(world.rank, world.ranks)
    read = list(reference.module.head.parameters()) if config.ppo.loss_reads_reference else []
    for i, sequences in enumerate(microbatches):
        stop.check(world)
        targets = _targets(experience, weights, sequences, normalizer, prefix_cache, context)
        for job in jobs:
            prefix_states = prefix_cache(job.engine.module, targets.packed, sequences)
            with gathered(read):  # the reference's head beside the actor's own
                loss, stats = job.engine(targets.packed, partial(_add_terms, job.terms, targets, config), prefix_states)
            job.engine.backward(loss, last=i + 1 == len(microbatches))
            sums += stats
    return sums


def _add_terms(terms: list[Term], targets: Targets, config: Config, role: Any, hidden: Tensor) -> tuple[Tensor, Sums]:
    loss, sums = terms[0](role, hidden, targets, config)
    for term in terms[1:]:
        another, stats = term(role, hidden, targets, config)
        loss, sums = loss + another, sums + stats
    return loss, sums


def _targets(
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


def _summarise(epoch: int, sums: Sums, tokens: int, actor_norm: float, critic_norm: float, world: World) -> Update:
    policy, value = all_sum(sums.policy.double(), world), all_sum(sums.value.double(), world)
    count = policy[7]  # 0 while the critic warms up, and 0/0 is NaN
    loss, entropy, kl, approx_kl, clipped, dual_clipped, ratio = (policy[:7] / count).tolist()
    return Update(
        epoch=epoch,
        policy_loss=loss,
        entropy=entropy,
        kl_loss=kl,
        approx_kl=approx_kl,
        clip_fraction=clipped,
        dual_clip_fraction=dual_clipped,
        ratio_mean=ratio,
        ratio_max=float(all_max(sums.ratio_max, world)) if count else float("nan"),
        value_loss=float(value[0]) / tokens,
        value_clip_fraction=float(value[1]) / tokens,
        actor_grad_norm=actor_norm,
        critic_grad_norm=critic_norm,
    )


def check_first_ratio(update: Update, dtype: str) -> None:
    """Before the first update the policy is still the one that sampled: say so in the log if its ratio is not 1."""
    tolerance = RATIO_TOLERANCE[dtype]
    worst = max(abs(update.ratio_mean - 1), update.ratio_max - 1)
    if not (worst <= tolerance and update.approx_kl <= tolerance):
        log.warning(
            "the first update of this batch began at ratio %.6f (largest %.6f) and approximate KL %.2g, not at 1 and 0"
            " within %g: the old logprobs are not those of the policy that is updated",
            update.ratio_mean,
            update.ratio_max,
            update.approx_kl,
            tolerance,
        )
