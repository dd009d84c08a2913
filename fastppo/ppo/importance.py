"""Weights of tokens that another distribution drew than the one that learns from them.

rho_t = exp(old_logprob_t - sampler_logprob_t), the trainer's probability of a token over that with which it was drawn,
is 1 up to rounding where the trainer's own engine draws from the whole distribution. Elsewhere the expectation of a
token's policy loss under the trainer is that of rho_t times the loss under the sampler. How rho is bounded is
`ppo.importance`; what the bounds leave out still counts in the mean over tokens: it was drawn, and a mean over the
others would not be the expectation of anything.

The weights are a function of the batch and the settings, so no checkpoint holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.config import Importance
from fastppo.data import Experience, Packed
from fastppo.monitor import effective_samples, sampler_error, sampler_kl


def importance_weights(experience: Experience, importance: Importance) -> Tensor | None:
    """(M,) fp32, what each token's policy loss is multiplied by, 0 or more; None for `none`, where all are 1.

    `token` is Yao et al. (2025), truncated importance sampling; `icepop` leaves out what is outside the bounds, on both
    sides; `sequence` leaves out whole responses, by the geometric mean of their rho.
    """
    if importance.kind == "none":
        return None
    rho = _log_rho(experience).exp()
    if importance.kind == "token":
        return rho.clamp(max=importance.high).to(experience.old_logprobs)
    inside = ~_outside(experience, importance)
    weights = torch.where(inside, rho, 0.0) if importance.kind == "icepop" else inside
    return weights.to(experience.old_logprobs)


def importance_metrics(experience: Experience, importance: Importance) -> dict[str, float]:
    """How far the sampler is from the trainer in this batch, over its M tokens; before any bound but where it is said.

    `sampler_error`, `sampler_error_max`: mean and largest |log rho|, in nats; `sampler_kl`: k3 of the sampler to the
    trainer (Schulman, 2020), nats per token; `importance_outside`: share of tokens whose rho is outside the bounds, for
    `sequence` those in responses outside; `effective_samples`: (sum rho)^2 / (M sum rho^2) (Kish, 1965).
    """
    log_rho = _log_rho(experience)
    return {
        "sampler_error": sampler_error(experience),
        "sampler_error_max": float(log_rho.abs().max()),
        "sampler_kl": sampler_kl(experience),
        "importance_outside": float(_outside(experience, importance).double().mean()),
        "effective_samples": effective_samples(experience),
    }


def _log_rho(experience: Experience) -> Tensor:
    """(M,) fp64"""
    return experience.old_logprobs.double() - experience.sampler_logprobs.double()


def _outside(experience: Experience, importance: Importance) -> Tensor:
    """(M,) bool: tokens whose weight a bound decides."""
    log_rho = _log_rho(experience)
    if importance.kind == "sequence":
        log_rho = _mean_of_response(log_rho, experience.packed)
    rho = log_rho.exp()
    return ~((rho >= importance.low) & (rho <= importance.high))


def _mean_of_response(x: Tensor, packed: Packed) -> Tensor:
    """x (M,) -> (M,): at each token the mean over its response."""
    lengths = packed.response_lengths
    response = torch.arange(len(lengths)).repeat_interleave(lengths)  # (M,) the response that each token is in
    sums = x.new_zeros(len(lengths)).index_add(0, response, x)
    return (sums / lengths)[response]
