"""The numbers of one ReST step, from its Grow and its Improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastppo.data import Measured
from fastppo.monitor import sampler_error, turn_metrics
from fastppo.rest.progress import Improved


def step_metrics(
    grown: Measured, improves: Sequence[Improved], equal_prompts: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Means over the Grow: per response score, KL and length; of each Improve what it learned from, and its loss.

    equal_prompts: prompts whose responses all have the same score; seconds: `time/PHASE` of the step's phases.
    """
    responses, tokens = len(grown.packed), len(grown.old_logprobs)
    kl = float(grown.kl.sum())
    metrics = {
        "score": float(grown.scores.mean()),
        "score_std": float(grown.scores.std(correction=0)),
        "kl": kl / responses,
        "kl_token": kl / tokens,
        "entropy": float(grown.entropy.mean()),
        "response_length": tokens / responses,
        "ended": float(grown.ended.float().mean()),
        **turn_metrics(grown.packed, grown.turn_rewards),
        "sampler_error": sampler_error(grown),
        "equal_prompts": float(equal_prompts),
        "tokens_generated": float(tokens),
        "tokens_trained": float(sum(improve.tokens for improve in improves)),
        "skipped_updates": float(sum(improve.unapplied for improve in improves)),
    }
    if grown.by_source.shape[1] > 1:
        metrics |= {f"score/{i}": float(x) for i, x in enumerate(grown.by_source.mean(0))}
    for number, improve in enumerate(improves, start=1):
        metrics |= _of_improve(number, improve)
    total = sum(seconds.values())
    return metrics | dict(seconds) | {"time/step": total, "tokens_per_second": tokens / total}


def _of_improve(number: int, improve: Improved) -> dict[str, float]:
    found = {
        "kept": float(improve.kept),
        "prompts": float(improve.prompts),
        "threshold": improve.threshold,
        "updates": float(improve.updates),
        "loss": improve.loss / max(improve.tokens, 1),
        "grad_norm": improve.gradient_norm / max(improve.updates - improve.unapplied, 1),
    }
    return {f"improve{number}/{name}": value for name, value in found.items()}
