"""Estimators of the advantage, behind `ppo.estimator`: one function and one entry of the table each.

An estimator sees the global batch, B responses with M tokens in all, and every rank computes it on the same numbers: it
must be a function of its arguments alone. A user's own is named as `module:function` or `file.py:function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import PPOConfig
from fastppo.errors import FunctionError, named_function


class Advantages(NamedTuple):
    """What an estimator makes of the rewards of a batch."""

    advantages: Tensor  # (M,) fp32, before whitening
    returns: Tensor | None  # (M,) fp32, what a critic learns; None from an estimator that knows none


# (rewards, values, groups, cu_seqlens, ppo) -> Advantages:
# rewards (M,) fp32, the KL penalty on each token where it is in the reward, the score on a response's last token;
# values (M,) fp32 of the critic, None without one; groups (B,) int64 from 0 on, equal for responses to the same prompt;
# cu_seqlens (B+1,) int32, where each response starts in an (M,) tensor, the last entry M; ppo: the settings `ppo.*`.
Estimator = Callable[[Tensor, Tensor | None, Tensor, Tensor, PPOConfig], Advantages]


def gae(rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 2016), with `ppo.gamma` and `ppo.lam`.

    Returns are advantages + values, both of `ppo.lam_critic` where it is given (VC-PPO; Yuan et al., 2025). A response
    that was cut ends like any other: there is no value after its last token.
    """
    if values is None:
        raise FunctionError("ppo.estimator is gae, which needs a critic's values, and there is no critic.")
    if ppo.lam == "adaptive":
        estimated = _gae_by_length(rewards, values, cu_seqlens, ppo)
    else:
        estimated = Advantages(*ops.gae(rewards, values, cu_seqlens, gamma=ppo.gamma, lam=ppo.lam))
    if ppo.lam_critic is None:
        return estimated
    return estimated._replace(returns=ops.gae(rewards, values, cu_seqlens, gamma=ppo.gamma, lam=ppo.lam_critic)[1])


def adaptive_lambda(length: int, alpha: float) -> float:
    """Lambda for a response of so many tokens (VAPO; Yue et al., 2025), 0 where the formula is negative."""
    return max(0.0, 1.0 - 1.0 / (alpha * length))


def _gae_by_length(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Advantages:
    """GAE with a lambda for each length: the responses of one length at a time."""
    found = Advantages(torch.empty_like(rewards), torch.empty_like(rewards))
    lengths = cu_seqlens.diff().long()
    of_token = lengths.repeat_interleave(lengths)  # (M,), the length of each token's response
    for length in lengths.unique().tolist():
        chosen = of_token == length
        starts = torch.arange(0, int(chosen.sum()) + 1, max(length, 1), dtype=torch.int32)
        lam = adaptive_lambda(length, ppo.lam_alpha) if length else 0.0
        parts = ops.gae(rewards[chosen], values[chosen], starts, gamma=ppo.gamma, lam=lam)
        for whole, part in zip(found, parts, strict=True):
            assert whole is not None
            whole[chosen] = part
    return found


ESTIMATORS: dict[str, Estimator] = {"gae": gae}


def load_estimator(ppo: PPOConfig) -> Estimator:
    """The estimator that `ppo.estimator` names. Raises FunctionError, before any model loads."""
    return named_function(ppo.estimator, "ppo.estimator", ESTIMATORS)


def estimate_advantages(
    estimator: Estimator,
    rewards: Tensor,
    values: Tensor | None,
    groups: Tensor,
    cu_seqlens: Tensor,
    ppo: PPOConfig,
) -> Advantages:
    """What the estimator returns, if it can be learned from, and whitened over the batch with `ppo.whiten_advantages`.

    Shapes as for an `Estimator`. Returns are left as they are. Raises FunctionError.
    """
    estimated = estimator(rewards, values, groups, cu_seqlens, ppo)
    setting = f"ppo.estimator = {ppo.estimator}"
    if not isinstance(estimated, Advantages):
        raise FunctionError(
            f"{setting} returned {type(estimated).__name__}, not fastppo.ppo.Advantages(advantages, returns)"
        )
    advantages, returns = estimated
    if returns is None and values is not None:
        raise FunctionError(
            f"{setting} returned no returns, and the critic learns them. Return them too, as advantages + values or as"
            " the sum of the rewards from each token on."
        )
    advantages = _checked(f"{setting}: advantages", advantages, rewards)
    returns = None if returns is None else _checked(f"{setting}: returns", returns, rewards)
    return Advantages(whitened(advantages) if ppo.whiten_advantages else advantages, returns)


def _checked(what: str, x: object, rewards: Tensor) -> Tensor:
    """x as fp32, if it is a number a token. Whether it is finite is looked at in learning, where much can be wrong."""
    if not isinstance(x, Tensor) or x.shape != rewards.shape:
        returned = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FunctionError(f"{what} is {returned}, not a tensor with a number for each of {len(rewards)} tokens")
    return x.to(rewards)


def whitened(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), the population variance, in fp64: a one-pass fp32 sum cancels at large means."""
    wide = x.double()
    variance = wide.var(correction=0) if x.numel() else wide.sum()
    return ((wide - wide.mean()) * torch.rsqrt(variance + 1e-8)).to(x.dtype)
