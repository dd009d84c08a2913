"""The oracles of the estimators that need no critic, response by response in Python floats (fp64).

Rewards (M,) of the tokens of B responses, cu_seqlens (B+1,) their starts, groups (B,) equal for responses to the same
prompt. mask (M,), True where the policy wrote: another token earns nothing, and its own advantage is 0. All return
advantages (M,) fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, stdev

import torch
from torch import Tensor

STD_FLOOR = 1e-6  # added to a standard deviation


def grpo(rewards: Tensor, groups: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(R - mean) / (std + 1e-6) of a prompt's responses (Shao et al., 2024, section 4.1.2), std with n - 1."""
    return _of_groups(rewards, groups, cu_seqlens, mask, lambda r, of: (r - fmean(of)) / (stdev(of) + STD_FLOOR))


def dr_grpo(rewards: Tensor, groups: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """R - mean of a prompt's responses (Liu et al., 2025, section 3.2)."""
    return _of_groups(rewards, groups, cu_seqlens, mask, lambda r, of: r - fmean(of))


def rloo(rewards: Tensor, groups: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """R - mean of the prompt's other responses (Ahmadian et al., 2024, eq. 8)."""
    return _of_groups(rewards, groups, cu_seqlens, mask, lambda r, of: r - (math.fsum(of) - r) / (len(of) - 1))


def rewards_to_go(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float, mask: Tensor | None = None) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, of the tokens written: REINFORCE++ before it is whitened (Hu et al., 2025, eq. 6)."""
    found = torch.zeros(len(rewards), dtype=torch.float64)
    for tokens in _written(cu_seqlens, mask):
        after = 0.0
        for t in reversed(tokens):
            after = float(rewards[t]) + gamma * after
            found[t] = after
    return found


def less_group_mean(
    rewards: Tensor, groups: Tensor, cu_seqlens: Tensor, *, gamma: float, mask: Tensor | None = None
) -> Tensor:
    """G_t less the mean R of the prompt's responses: REINFORCE++ with a group baseline, before it is whitened."""
    mean = _of_groups(rewards, groups, cu_seqlens, mask, lambda _, of: fmean(of))
    return rewards_to_go(rewards, cu_seqlens, gamma=gamma, mask=mask) - mean


def _of_groups(
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    advantage: Callable[[float, list[float]], float],
) -> Tensor:
    """advantage(R, all R of the group) on every token written; R: the sum of a response's rewards."""
    written = _written(cu_seqlens, mask)
    sums = [math.fsum(float(rewards[t]) for t in tokens) for tokens in written]
    found = torch.zeros(len(rewards), dtype=torch.float64)
    for i, tokens in enumerate(written):
        found[tokens] = advantage(sums[i], [sums[j] for j in range(len(sums)) if groups[j] == groups[i]])
    return found


def _written(cu_seqlens: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each response that the policy wrote."""
    starts = cu_seqlens.tolist()
    return [
        [t for t in range(start, end) if mask is None or bool(mask[t])] for start, end in itertools.pairwise(starts)
    ]
