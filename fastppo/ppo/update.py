"""Learning: several epochs of clipped updates on one batch (Schulman et al., 2017, algorithm 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from fastppo.data import Experience, Minibatch, Update
from fastppo.distributed import World, all_max, all_sum, gathered, stop
from fastppo.models import PrefixStates
from fastppo.monitor import note_fault
from fastppo.ppo.experience import StepContext
from fastppo.ppo.importance import importance_weights
from fastppo.ppo.ptx import add_gradient
from fastppo.ppo.schedule import step_rates
from fastppo.ppo.terms import Job, Sums, Totals, add_terms, jobs_of, targets_of

log = logging.getLogger("fastppo")

# |ratio - 1| on the first update of a batch, where the policy is still the one that sampled (with identical packing).
RATIO_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}


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
    rates, train_actor = step_rates(config, step), step >= config.critic_steps
    texts = context.texts if train_actor else None
    batches_of_texts = iter(()) if texts is None else texts.from_update(step * len(rates) + len(updates))
    minibatches = [(epoch, minibatch) for epoch, part in enumerate(plan) for minibatch in part]
    for epoch, minibatch in minibatches[len(updates) :]:
        if updates and updates[-1].stopped:
            break
        jobs = jobs_of(context, *rates[len(updates)], train_actor)
        totals = Totals.of(experience, minibatch, config)
        ptx_loss = 0.0 if texts is None else add_gradient(texts, next(batches_of_texts), context.roles.actor, world)
        sums = _accumulate(jobs, experience, weights, minibatch, totals, prefix_cache, context)
        norms = [job.engine.gradient_norm() for job in jobs]
        critic_norm = None if config.value_function is None else norms[-1]
        update = _summarise(epoch, sums, totals, norms[0] if train_actor else math.nan, critic_norm, world)
        update = replace(update, ptx_loss=ptx_loss)
        finite = _finite(update, norms, actor=train_actor, critic=config.value_function is not None)
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


def _finite(update: Update, norms: list[float], *, actor: bool, critic: bool) -> bool:
    """Whether loss and gradients are numbers. Both are sums over all ranks, so the ranks agree. actor, critic: whether
    there is one that learns."""
    losses = [update.policy_loss, update.kl_loss] if actor else []
    losses += [update.value_loss] if critic else []
    return all(math.isfinite(x) for x in (*losses, update.ptx_loss, update.nll_loss, *norms))


def _accumulate(
    jobs: list[Job],
    experience: Experience,
    weights: Tensor | None,
    minibatch: Minibatch,
    totals: Totals,
    prefix_cache: PrefixStates,
    context: StepContext,
) -> Sums:
    """Gradients and statistics of this rank's share of a minibatch. In a group that splits rows it has the gradients of
    its own rows, and a part of the statistics."""
    config, world, reference = context.config, context.world, context.roles.reference
    # Engines average gradients over ranks, and the loss is to be a mean over all of them. Without a good response there
    # is nothing to divide.
    divisors = Totals(*(max(x, 1) / world.ranks for x in totals))
    sums = Sums.zero(world.device)
    microbatches = minibatch.of_group(world.group, world.groups)
    read = list(reference.module.head.parameters()) if config.ppo.loss_reads_reference else []
    for i, sequences in enumerate(microbatches):
        stop.check(world)
        targets = targets_of(experience, weights, sequences, divisors, prefix_cache, context)
        for job in jobs:
            prefix_states = prefix_cache(job.engine.module, targets.packed, sequences)
            with gathered(read):  # the reference's head beside the actor's own
                loss, stats = job.engine(targets.packed, partial(add_terms, job.terms, targets, config), prefix_states)
            job.engine.backward(loss, last=i + 1 == len(microbatches))
            sums += stats
    return sums


def _summarise(
    epoch: int, sums: Sums, totals: Totals, actor_norm: float, critic_norm: float | None, world: World
) -> Update:
    policy, value, nll = (all_sum(x.double(), world) for x in (sums.policy, sums.value, sums.nll))
    count = policy[7]  # 0 while the critic warms up, and 0/0 is NaN
    policy_loss = float(policy[0]) / totals.policy if count else math.nan
    _, entropy, kl, approx_kl, clipped, dual_clipped, ratio = (policy[:7] / count).tolist()
    return Update(
        epoch=epoch,
        policy_loss=policy_loss,
        entropy=entropy,
        kl_loss=kl,
        approx_kl=approx_kl,
        clip_fraction=clipped,
        dual_clip_fraction=dual_clipped,
        ratio_mean=ratio,
        ratio_max=float(all_max(sums.ratio_max, world)) if count else float("nan"),
        value_loss=math.nan if critic_norm is None else float(value[0]) / totals.tokens,
        value_clip_fraction=math.nan if critic_norm is None else float(value[1]) / totals.tokens,
        actor_grad_norm=actor_norm,
        critic_grad_norm=math.nan if critic_norm is None else critic_norm,
        nll_loss=float(nll) / max(totals.good, 1),
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
