"""The numbers of one PPO step, from its experience and its updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fastppo.config import Importance
from fastppo.data import Experience, Update, segment_offsets
from fastppo.monitor import turn_metrics
from fastppo.ppo.importance import importance_metrics
from fastppo.ppo.schedule import explained_variance


def mean_kl(experience: Experience) -> float:
    """k1 KL to the reference, summed over a response, the batch's mean; what an adaptive beta is steered by."""
    return float((experience.old_logprobs - experience.ref_logprobs).sum()) / len(experience.packed)


def step_metrics(
    experience: Experience, updates: Sequence[Update], seconds: Mapping[str, float], importance: Importance
) -> dict[str, float]:
    """Means over the global batch: per response score, reward, KL and length; per token what learning saw.

    seconds: `time/PHASE` of the step's phases. Of the updates those count that were applied.
    """
    epochs = 1 + max(u.epoch for u in updates)
    skipped = sum(u.skipped > 0 for u in updates)
    updates = [u for u in updates if not u.skipped] or updates
    responses, tokens = len(experience.packed), len(experience.kl)
    metrics = {
        "score": float(experience.scores.mean()),
        "score_std": float(experience.scores.std(correction=0)),
        "reward": float(experience.rewards.sum()) / responses,
        "kl": mean_kl(experience),
        "kl_token": mean_kl(experience) * responses / tokens,
        "entropy": float(experience.entropy.mean()),
        "response_length": tokens / responses,
        "ended": float(experience.ended.float().mean()),
        **turn_metrics(experience.packed, experience.turn_rewards),
        **critic_metrics(experience),
        "skipped_updates": skipped,
        **importance_metrics(experience, importance),
    }
    if experience.by_source.shape[1] > 1:
        metrics |= {f"score/{i}": float(x) for i, x in enumerate(experience.by_source.mean(0))}
    for name in ("policy_loss", "kl_loss", "approx_kl", "clip_fraction", "dual_clip_fraction", "ratio_mean"):
        metrics[name] = fmean(getattr(u, name) for u in updates)
    of_critic = () if experience.values is None else ("value_loss", "value_clip_fraction", "critic_grad_norm")
    for name in ("actor_grad_norm", *of_critic):
        metrics[name] = fmean(getattr(u, name) for u in updates)
    if nll_losses := [u.nll_loss for u in updates if u.nll_loss]:  # 0: no response of the minibatch was good
        metrics["nll_loss"] = fmean(nll_losses)
    if any(u.ptx_loss for u in updates):  # else no text is mixed in
        metrics["ptx_loss"] = fmean(u.ptx_loss for u in updates)
    metrics["ratio_max"] = max(u.ratio_max for u in updates)
    for epoch in sorted({u.epoch for u in updates}):
        of_epoch = [u for u in updates if u.epoch == epoch]
        for name in ("approx_kl", "clip_fraction", "ratio_mean"):
            metrics[f"epoch{epoch + 1}/{name}"] = fmean(getattr(u, name) for u in of_epoch)
        metrics[f"epoch{epoch + 1}/ratio_max"] = max(u.ratio_max for u in of_epoch)
    return metrics | dict(seconds) | _speeds(seconds, experience, epochs)


def critic_metrics(experience: Experience) -> dict[str, float]:
    """How good the critic was on responses that it had not learned from; nothing without a critic.

    `value`: mean V. `explained_variance`, of the returns, 1 at best. By the quarter of a response that a token is in,
    Q from 1 to 4, `explained_variance/Q` and `value_bias/Q`, the mean of V - return, 0 where V is calibrated.
    `advantage_share`: the variance of the advantages, before whitening, over that of the returns: what V leaves of the
    noise that the policy learns from.
    """
    values, returns = experience.values, experience.returns
    if values is None or returns is None:
        return {}
    metrics = {"value": float(values.mean()), "explained_variance": explained_variance(values, returns)}
    variance = float(returns.double().var(correction=0))
    metrics["advantage_share"] = experience.advantage_std**2 / variance if variance > 0 else math.nan
    lengths = experience.packed.response_lengths
    quarters = (4 * segment_offsets(lengths)).div(lengths.repeat_interleave(lengths), rounding_mode="floor")
    for quarter in range(4):
        v, r = values[quarters == quarter], returns[quarters == quarter]
        metrics[f"explained_variance/{quarter + 1}"] = explained_variance(v, r)
        metrics[f"value_bias/{quarter + 1}"] = float((v.double() - r.double()).mean())  # a NaN where no token is
    return metrics


def _speeds(seconds: Mapping[str, float], experience: Experience, epochs: int) -> dict[str, float]:
    """Tokens a second of each phase: sampling counts what it wrote, the others what they read, in every epoch.

    With `ppo.steps_ahead` a step samples the next one's batch, the first step two and the last step none.
    """
    written, read = len(experience.kl), len(experience.packed.tokens)
    work = {"sampling": written, "feedback": read, "experience": read, "learning": read * epochs}
    speeds = {
        f"tokens_per_second/{phase}": n / seconds[f"time/{phase}"]
        for phase, n in work.items()
        if f"time/{phase}" in seconds
    }
    total = sum(seconds.values())
    return speeds | {"time/step": total, "tokens_per_second": written / total}
