"""The numbers of one PPO step, from its experience and its updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from fastppo.batch import Experience
from fastppo.learn import Update
from fastppo.ppo import explained_variance


def mean_kl(experience: Experience) -> float:
    """k1 KL to the reference, summed over a response, the batch's mean; what an adaptive beta is steered by."""
    return float((experience.old_logprobs - experience.ref_logprobs).sum()) / len(experience.packed)


def step_metrics(experience: Experience, updates: Sequence[Update]) -> dict[str, float]:
    """Means over the global batch: per response score, reward, KL and length; per token what learning saw."""
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
        "value": float(experience.values.mean()),
        "explained_variance": explained_variance(experience.values, experience.returns),
        "sampler_error": float((experience.sampler_logprobs - experience.old_logprobs).abs().mean()),
    }
    for name in ("policy_loss", "kl_loss", "approx_kl", "clip_fraction", "dual_clip_fraction", "ratio_mean"):
        metrics[name] = fmean(getattr(u, name) for u in updates)
    for name in ("value_loss", "value_clip_fraction", "actor_grad_norm", "critic_grad_norm"):
        metrics[name] = fmean(getattr(u, name) for u in updates)
    metrics["ratio_max"] = max(u.ratio_max for u in updates)
    for epoch in sorted({u.epoch for u in updates}):
        of_epoch = [u for u in updates if u.epoch == epoch]
        for name in ("approx_kl", "clip_fraction", "ratio_mean"):
            metrics[f"epoch{epoch + 1}/{name}"] = fmean(getattr(u, name) for u in of_epoch)
        metrics[f"epoch{epoch + 1}/ratio_max"] = max(u.ratio_max for u in of_epoch)
    return metrics


def speeds(seconds: dict[str, float], response_tokens: int, tokens: int, epochs: int) -> dict[str, float]:
    """Tokens a second of each stage, from its seconds (`time/STAGE`).

    Sampling counts what it wrote; the other stages the tokens they read, learning once for every epoch.
    """
    work = {"sampling": response_tokens, "feedback": tokens, "experience": tokens, "learning": tokens * epochs}
    rates = {f"tokens_per_second/{s}": n / seconds[f"time/{s}"] for s, n in work.items() if seconds.get(f"time/{s}")}
    total = sum(seconds.values())
    return rates | {"time/step": total, "tokens_per_second": response_tokens / total if total else math.nan}
