"""The oracles of the policy losses that are no ops, and of how tokens add up to a loss: response by response.

logprobs, old_logprobs, advantages (m,) of the tokens of b responses, cu_seqlens (b+1,) their starts. mask (m,), True
where the policy wrote; another token has no part in anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-mean over responses of min(s A, clip(s) A), s the geometric mean of a response's ratios; ().

    Group Sequence Policy Optimization (Zheng et al., 2025, eq. 5 and 7). Every token of a response has the same
    advantage. dual_clip: as in PPO's loss (Ye et al., 2020, eq. 5), of s.
    """
    objectives = []
    for tokens in _responses(cu_seqlens, mask):
        advantage = advantages[tokens][0]
        ratio = (logprobs[tokens] - old_logprobs[tokens]).mean().exp()
        objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
        if dual_clip is not None and advantage < 0:
            objective = torch.maximum(objective, dual_clip * advantage)
        objectives.append(objective)
    return -torch.stack(objectives).mean()


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-sg(clip(ratio)) A log p of each token, (m,), sg without gradient (MiniMax-M1, 2025, eq. 4 and 5)."""
    weight = (logprobs - old_logprobs).exp().clamp(1 - clip_low, 1 + clip_high).detach()
    return -weight * advantages * logprobs


def aggregated(losses: Tensor, cu_seqlens: Tensor, how: str, *, longest: int, mask: Tensor | None = None) -> Tensor:
    """The loss of a minibatch, (), of the losses of its tokens, (m,).

    token: their mean; sequence: the mean over responses of the mean over a response (Shao et al., 2024, eq. 3);
    constant: their sum over b times `longest` (Liu et al., 2025, section 3.2).
    """
    responses = [losses[tokens] for tokens in _responses(cu_seqlens, mask)]
    if how == "token":
        return torch.cat(responses).mean()
    if how == "sequence":
        return torch.stack([response.mean() for response in responses]).mean()
    return torch.cat(responses).sum() / (len(responses) * longest)


def _responses(cu_seqlens: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The tokens that the policy wrote, int64, of each response."""
    starts = cu_seqlens.tolist()
    for start, end in itertools.pairwise(starts):
        tokens = torch.arange(start, end)
        yield tokens if mask is None else tokens[mask[start:end]]
