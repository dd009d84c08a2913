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
from fastppo.data import spread, written_starts
from fastppo.errors import FunctionError, named_function


class Advantages(NamedTuple):
    """What an estimator makes of the rewards of a batch."""

    advantages: Tensor  # (M,) fp32, before whitening
    returns: Tensor | None  # (M,) fp32, what a critic learns; None from an estimator that knows none


# (rewards, values, groups, cu_seqlens, ppo) -> Advantages:
# rewards (M,) fp32, the KL penalty on each token where it is in the reward, the score on a response's last token;
# values (M,) fp32 of the critic, None without one; groups (B,) int64 from 0 on, equal for the responses drawn together
# to one prompt, `sampling.samples_per_prompt`; cu_seqlens (B+1,) int32, where each response starts in an (M,) tensor,
# the last entry M; ppo: the settings `ppo.*`.
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


def grpo(rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Advantages:
    """(R - mean) / (std + 1e-6) over the responses to a prompt, on each token (GRPO; Shao et al., 2024, section 4.1.2).

    R is the sum of a response's rewards; std the sample's, with n - 1. A group whose R are all equal has advantage 0.
    """
    above, counts = _above_group_mean(rewards, groups, cu_seqlens)
    std = (groups.bincount(weights=above.square()) / (counts - 1)).sqrt()
    return _on_tokens(above / (std + 1e-6)[groups], rewards, cu_seqlens)


def dr_grpo(rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Advantages:
    """R - mean over the responses to a prompt (Dr. GRPO; Liu et al., 2025, section 3.2).

    The mean holds a response's own R, so that the gradient is 1 - 1/n of the exact one, with n responses to a prompt.
    """
    return _on_tokens(_above_group_mean(rewards, groups, cu_seqlens)[0], rewards, cu_seqlens)


def rloo(rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Advantages:
    """R - mean of the prompt's other responses (RLOO; Ahmadian et al., 2024, eq. 8): n / (n - 1) of `dr_grpo`."""
    above, counts = _above_group_mean(rewards, groups, cu_seqlens)
    return _on_tokens(above * (counts / (counts - 1))[groups], rewards, cu_seqlens)


def reinforce_pp(
    rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig
) -> Advantages:
    """The discounted sum of the rewards from each token on (REINFORCE++; Hu et al., 2025, eq. 6).

    What makes a baseline of the whole batch and a scale of it is `ppo.whiten_advantages`.
    """
    return Advantages(_rewards_to_go(rewards, cu_seqlens, ppo), None)


def reinforce_pp_baseline(
    rewards: Tensor, values: Tensor | None, groups: Tensor, cu_seqlens: Tensor, ppo: PPOConfig
) -> Advantages:
    """`reinforce_pp` less the mean R of the responses to the prompt (Hu et al., 2025, eq. 8), R as in `grpo`."""
    total, counts = _response_rewards(rewards, cu_seqlens), _group_sizes(groups)
    mean = (groups.bincount(weights=total) / counts)[groups]
    below = _on_tokens(mean, rewards, cu_seqlens).advantages
    return Advantages(_rewards_to_go(rewards, cu_seqlens, ppo) - below, None)


def _response_rewards(rewards: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(M,) -> (B,) fp64, the sum over each response."""
    response = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff().long())
    return torch.zeros(len(cu_seqlens) - 1, dtype=torch.float64).index_add(0, response, rewards.double())


def _group_sizes(groups: Tensor) -> Tensor:
    """(G,) int64. Raises FunctionError for a group with nothing to be compared with."""
    counts = groups.bincount()
    if int(counts.min()) < 2:
        raise FunctionError(
            "a prompt has one response, and the estimator compares a prompt's responses with each other; set"
            " sampling.samples_per_prompt to 2 or more."
        )
    return counts


def _above_group_mean(rewards: Tensor, groups: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """R less the mean R of the response's group, (B,) fp64, and the size of each group, (G,).

    fp64 sums of equal fp32 numbers are exact: where all R are equal, the difference is 0 and not what is left by
    rounding, which GRPO would divide by its own size.
    """
    total, counts = _response_rewards(rewards, cu_seqlens), _group_sizes(groups)
    return total - (groups.bincount(weights=total) / counts)[groups], counts


def _on_tokens(of_response: Tensor, rewards: Tensor, cu_seqlens: Tensor) -> Advantages:
    """(B,) -> (M,) in the dtype of the rewards: every token has its response's."""
    return Advantages(of_response.repeat_interleave(cu_seqlens.diff().long()).to(rewards.dtype), None)


def _rewards_to_go(rewards: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> Tensor:
    """(M,): GAE without values, whose lambda is then 1."""
    return ops.gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma=ppo.gamma, lam=1.0)[0]


ESTIMATORS: dict[str, Estimator] = {
    "gae": gae,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_pp,
    "reinforce++_baseline": reinforce_pp_baseline,
}


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
    mask: Tensor | None = None,
) -> Advantages:
    """What the estimator returns, if it can be learned from, before whitening.

    Shapes as for an `Estimator`. mask (M,) bool: the tokens that the policy wrote; the estimator sees these alone, end
    to end, and the others have advantage and return 0. Raises FunctionError.
    """
    if mask is not None:
        seen = (rewards[mask], None if values is None else values[mask], groups, written_starts(mask, cu_seqlens))
        advantages, returns = estimate_advantages(estimator, *seen, ppo)
        return Advantages(spread(advantages, mask), None if returns is None else spread(returns, mask))
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
    return Advantages(advantages, None if returns is None else _checked(f"{setting}: returns", returns, rewards))


def _checked(what: str, x: object, rewards: Tensor) -> Tensor:
    """x as fp32, if it is a number a token. Whether it is finite is looked at in learning, where much can be wrong."""
    if not isinstance(x, Tensor) or x.shape != rewards.shape:
        returned = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FunctionError(f"{what} is {returned}, not a tensor with a number for each of {len(rewards)} tokens")
    return x.to(rewards)


def whitened(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), the population variance, in fp64: a one-pass fp32 sum cancels at large means.

    mask (M,) bool: of the tokens that the policy wrote alone; the others are 0.
    """
    if mask is not None:
        return spread(whitened(x[mask]), mask)
    wide = x.double()
    variance = wide.var(correction=0) if x.numel() else wide.sum()
    return ((wide - wide.mean()) * torch.rsqrt(variance + 1e-8)).to(x.dtype)
