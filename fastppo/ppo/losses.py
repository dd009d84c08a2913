"""Losses of the policy, behind `ppo.loss`: one function and one entry of the table each.

A loss says what each token's part of the surrogate objective is. What stands beside it for every loss is the
trainer's (`fastppo.ppo.terms`): how the tokens of a minibatch add up (`ppo.aggregate`), the entropy bonus, the KL term,
the likelihood of good responses, and the statistics of ratio, entropy and KL. For `ppo.loss: clip`, the default, one
fused op computes the vocabulary head and this formula together (`ops.linear_policy_loss`). Any other loss is a function
of the logprobs that `ops.linear_logprobs` computes; with `ppo.loss: fastppo.ppo.losses:clip` the function below runs in
that way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.config import PPOConfig
from fastppo.data import spread, written_starts
from fastppo.errors import FunctionError, named_function
from fastppo.ops import eager


class TokenLoss(NamedTuple):
    """A loss at each of m tokens."""

    loss: Tensor  # (m,), to be minimised, with a gradient to the logprobs
    clipped: Tensor | None = None  # (m,) bool, where a clip holds it; None where there is none: the metric is a NaN
    dual_clipped: Tensor | None = None  # (m,) bool, where the dual clip holds it


# (logprobs, old_logprobs, advantages, cu_seqlens, ppo) -> TokenLoss:
# logprobs (m,) of the response tokens of whole sequences under the policy, with gradient; old_logprobs, advantages (m,)
# without; cu_seqlens (b+1,) int32, where each response starts in these; all fp32. ppo: the settings `ppo.*`.
PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, PPOConfig], TokenLoss]


def clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> TokenLoss:
    """PPO's clipped surrogate (Schulman et al., 2017, eq. 7), with dual clip (Ye et al., 2020, eq. 5) if so set."""
    ratio = eager.bounded_exp(logprobs - old_logprobs)
    return _clipped(ratio, advantages, ppo.clip_low, ppo.clip_high, ppo.dual_clip)


def gspo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> TokenLoss:
    """`clip` with one ratio for a response, the geometric mean of its tokens' (GSPO; Zheng et al., 2025, eq. 5 and 7).

    In the form for advantages of each token (GSPO-token, eq. 15): the ratio of token t is s p_t / sg(p_t), s the
    response's without gradient. Where a response has one advantage, the mean over its tokens is GSPO itself.
    """
    lengths = cu_seqlens.diff().long()
    means = torch.segment_reduce((logprobs - old_logprobs).detach(), "mean", lengths=lengths, unsafe=True)
    of_response = means.repeat_interleave(lengths, output_size=len(logprobs))
    ratio = eager.bounded_exp(of_response + (logprobs - logprobs.detach()))
    return _clipped(ratio, advantages, ppo.gspo_clip_low, ppo.gspo_clip_high, ppo.dual_clip)


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, ppo: PPOConfig) -> TokenLoss:
    """-sg(clip(ratio)) A log p (CISPO; MiniMax, 2025, eq. 4 and 5): a clipped token keeps its gradient, with the weight
    of the bound. Its value is no measure of progress; its gradient is what counts."""
    ratio = eager.bounded_exp((logprobs - old_logprobs).detach())
    weight = ratio.clamp(1.0 - ppo.clip_low, 1.0 + ppo.clip_high)
    return TokenLoss(-weight * advantages * logprobs, weight != ratio, torch.zeros_like(ratio, dtype=torch.bool))


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None) -> TokenLoss:
    unclipped = ratio * advantages
    bounded = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    clipped = bounded < unclipped
    objective = torch.where(clipped, bounded, unclipped)
    if dual_clip is None:
        return TokenLoss(-objective, clipped, torch.zeros_like(clipped))
    floor = dual_clip * advantages
    dual_clipped = (advantages < 0) & (objective < floor)
    return TokenLoss(-torch.where(dual_clipped, floor, objective), clipped, dual_clipped)


LOSSES: dict[str, PolicyLoss] = {"clip": clip, "gspo": gspo, "cispo": cispo}


def load_loss(ppo: PPOConfig) -> PolicyLoss:
    """The loss that `ppo.loss` names. Raises FunctionError, before any model loads."""
    return named_function(ppo.loss, "ppo.loss", LOSSES)


def weighted(tokens: TokenLoss, weights: Tensor) -> TokenLoss:
    """A loss with each token's part multiplied by its weight, (m,) and 0 or more; no clip holds a token of weight 0."""
    held = (None if x is None else x & (weights > 0) for x in (tokens.clipped, tokens.dual_clipped))
    return TokenLoss(weights * tokens.loss, *held)


def checked_loss(
    loss: PolicyLoss,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    ppo: PPOConfig,
    mask: Tensor | None = None,
) -> TokenLoss:
    """What the loss returns, if it can be minimised. Arguments as for a `PolicyLoss`. Raises FunctionError.

    mask (m,) bool: the tokens that the policy wrote; the loss sees these alone, end to end, and the others have none.
    """
    if mask is not None:
        seen = (logprobs[mask], old_logprobs[mask], advantages[mask], written_starts(mask, cu_seqlens))
        tokens = checked_loss(loss, *seen, ppo)
        clips = (None if x is None else spread(x, mask) for x in (tokens.clipped, tokens.dual_clipped))
        return TokenLoss(spread(tokens.loss, mask), *clips)
    tokens = loss(logprobs, old_logprobs, advantages, cu_seqlens, ppo)
    setting = f"ppo.loss = {ppo.loss}"
    if not isinstance(tokens, TokenLoss):
        raise FunctionError(f"{setting} returned {type(tokens).__name__}, not fastppo.ppo.TokenLoss(loss, ...)")
    for name, x in tokens._asdict().items():
        if x is None and name != "loss":
            continue
        if not isinstance(x, Tensor) or x.shape != logprobs.shape:
            returned = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise FunctionError(
                f"{setting}: {name} is {returned}, not a tensor with a number for each of {len(logprobs)} tokens. Leave"
                " the sum over tokens to the trainer."
            )
    if logprobs.requires_grad and not tokens.loss.requires_grad:
        raise FunctionError(f"{setting}: its loss has no gradient to the logprobs, so the policy would not learn")
    return tokens
