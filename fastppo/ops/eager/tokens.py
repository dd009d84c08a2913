"""The oracles of the ops on tokens: advantages, logprobs, losses, attention of one new position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastppo.ops.stats import PolicyStats, TokenStats, ValueStats


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, backwards in time (Schulman et al. 2016, eq. 11 and 16).

    For t = T-1, ..., 0 of each sequence, with V_T = bootstrap (0 if None) and A_T = 0:
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t.
    A masked token is skipped: t+1 is the next unmasked token, and the token's own outputs are 0.

    The recurrence runs in Python floats (fp64) and is rounded once.
    """
    r, v = rewards.tolist(), values.tolist()
    starts = cu_seqlens.tolist()
    valid = [True] * len(r) if mask is None else mask.tolist()
    last_values = [0.0] * (len(starts) - 1) if bootstrap is None else bootstrap.tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for start, end, last_value in zip(starts[:-1], starts[1:], last_values, strict=True):
        next_value, next_advantage = last_value, 0.0
        for t in reversed(range(start, end)):
            if not valid[t]:
                continue
            delta = r[t] + gamma * next_value - v[t]
            next_value, next_advantage = v[t], delta + gamma * lam * next_advantage
            advantages[t], returns[t] = next_advantage, next_advantage + v[t]
    dtype = statistics_dtype(values)
    packed = torch.tensor([advantages, returns], dtype=dtype, device=values.device)
    return packed[0], packed[1]


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_logits: Tensor | None = None,
) -> TokenStats:
    """Log probability, entropy and exact KL of each row of logits.

    z = softcap tanh(logits / softcap) / temperature, L = logsumexp(z), p = exp(z - L); with v over the vocabulary
    logprob = z_y - L, entropy = -sum_v p_v log p_v, KL(p || q) = sum_v p_v (log p_v - log q_v), 0 log 0 = 0.
    KL is +inf if some p_v > 0 = q_v; the KL of such a row has no gradient. The reference receives no gradient. If all
    entries of its row are -inf, q is 0: its logprob is -inf, the KL +inf. A NaN in either row makes the KL a NaN.
    """
    z = scaled(logits, temperature, softcap)
    lse = z.logsumexp(-1)
    log_p = z.log_softmax(-1)  # z - L loses digits if z is large
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    logprobs = at_targets(log_p, targets)
    if ref_logits is None:
        return TokenStats(logprobs, entropy, lse, None, None, None)
    r = scaled(ref_logits.detach(), temperature, softcap)
    ref_lse = r.logsumexp(-1)
    log_q = r.log_softmax(-1).masked_fill(ref_lse.isneginf()[:, None], -math.inf)
    infinite = ((p > 0) & log_q.isneginf()).any(-1) & ~log_q.isnan().any(-1)
    log_ratio = log_p - log_q
    kl = (p * log_ratio.masked_fill((p == 0) | log_q.isneginf(), 0.0)).sum(-1)
    return TokenStats(logprobs, entropy, lse, at_targets(log_q, targets), ref_lse, kl.masked_fill(infinite, math.inf))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> TokenStats:
    """`token_logprobs` of logits = logit_scale (hidden weight^T + bias), computed for all rows at once: 2 (M, V)."""
    ref_logits = None
    if ref_hidden is not None and ref_weight is not None:
        ref_logits = project(ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
        ref_logits = logit_scale * ref_logits.to(statistics_dtype(ref_logits))
    logits = project(hidden, weight, bias)
    logits = logit_scale * logits.to(statistics_dtype(logits))
    return token_logprobs(logits, targets, temperature=temperature, softcap=softcap, ref_logits=ref_logits)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped objective, to be minimised (Schulman et al. 2017, eq. 7 and 9; dual clip: Ye et al. 2020, eq. 5).

    rho_t = exp(logprob_t - old_t), for differences above 20 as in `bounded_exp`, and
    J_t = min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t); with dual_clip c, J_t = max(J_t, c A_t) if
    A_t < 0.
    loss = sum_t (-J_t - entropy_coef H_t + kl_coef KL_t) / normalizer, over the unmasked t.
    """
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask

    def masked(x: Tensor) -> Tensor:
        return x.to(statistics_dtype(logprobs)).masked_fill(~keep, 0.0)

    log_ratio = masked(masked(logprobs) - masked(old_logprobs.detach()))
    advantage = masked(advantages.detach())
    ratio = bounded_exp(log_ratio)
    unclipped = ratio * advantage
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage  # the bounds: two numbers, or two tensors
    clipped = bounded < unclipped
    objective = torch.where(clipped, bounded, unclipped)
    dual_clipped = torch.zeros_like(keep)
    if dual_clip is not None:
        dual_clipped = (advantage < 0) & (objective < dual_clip * advantage)
        objective = torch.where(dual_clipped, dual_clip * advantage, objective)

    total = -objective.sum()
    zero = torch.zeros_like(total)
    entropy_sum = zero if entropy is None else masked(entropy).sum()
    kl_sum = zero if kl is None else masked(kl).sum()
    total = total - term(entropy_coef, entropy_sum) + term(kl_coef, kl_sum)
    approximate_kl = masked(exp_less_tangent(log_ratio)).sum()  # k3 of the old policy to the new, Schulman 2020
    counts = (clipped.sum(), dual_clipped.sum(), masked(ratio).sum(), keep.sum())
    sums = torch.stack([s.detach().to(total) for s in (-objective.sum(), entropy_sum, kl_sum, approximate_kl, *counts)])
    ratio_max = masked(ratio).detach().max() if ratio.numel() else zero
    return total / normalizer, PolicyStats(sums, ratio_max)


def term(coefficient: float | Tensor, total: Tensor) -> Tensor:
    """coefficient * total, and 0 if the coefficient is 0: 0 times an infinite KL would be a NaN."""
    if isinstance(coefficient, Tensor):
        return torch.where(coefficient == 0.0, 0.0, coefficient * total)
    return coefficient * total if coefficient != 0.0 else torch.zeros_like(total)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    temperature: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_kind: str = "exact",
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """`linear_logprobs`, then `policy_loss`: exact KL with the head of the reference, k2 and k3 with `ref_logprobs`."""
    stats = linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ref_hidden=ref_hidden if kl_kind == "exact" else None,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
    )
    return policy_loss(
        stats.logprobs,
        old_logprobs,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy=stats.entropy,
        entropy_coef=entropy_coef,
        kl=stats.kl if kl_kind == "exact" else kl_estimate(stats.logprobs, ref_logprobs, kl_kind),
        kl_coef=kl_coef,
        normalizer=normalizer,
        mask=mask,
    )


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor | None, kind: str) -> Tensor | None:
    """Estimates of KL(policy || reference) from the sampled token, with d = logprob - ref_logprob (Schulman 2020).

    k2 = d^2 / 2; k3 = exp(-d) - 1 + d, for d below -20 as in `bounded_exp`. (M,), or None without `ref_logprobs`.
    """
    if ref_logprobs is None:
        return None
    d = logprobs - ref_logprobs.detach().to(logprobs.dtype)
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return exp_less_tangent(-d)
    raise ValueError(f"kl_kind is {kind!r}; with sampled tokens it must be 'k2' or 'k3'")


def bounded_exp(x: Tensor) -> Tensor:
    """e^x up to x = 20, and above its tangent e^20 (x - 19), which is finite and has the gradient at 20.

    A constant bound would give no gradient to the tokens with the largest ratios. e^20 = 4.9e8 is far above any clip.
    The bound is a literal, because torch.compile treats a float of a module as a number that may change.
    """
    return torch.where(x > 20.0, math.exp(20.0) * (1.0 + (x - 20.0)), x.clamp(max=20.0).exp())


def exp_less_tangent(x: Tensor) -> Tensor:
    """`bounded_exp` of x minus its tangent at 0, 1 + x: 0 or more, and without loss of digits if x is small."""
    at_most, near = math.exp(20.0), x.clamp(max=20.0)
    far = (at_most - 1.0 - 20.0) + (at_most - 1.0) * (x - 20.0)
    return torch.where(x > 20.0, far, torch.expm1(near) - near)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip: float | None = None,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    """Squared error of the critic (Schulman et al. 2017, eq. 9), clipped around its old value (Ziegler et al. 2019).

    loss = sum_t max((V_t - R_t)^2, (old_t + clamp(V_t - old_t, -clip, clip) - R_t)^2) / (2 normalizer), unmasked t.
    """
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    dtype = statistics_dtype(values)
    v, old, target = (x.to(dtype).masked_fill(~keep, 0.0) for x in (values, old_values.detach(), returns.detach()))
    error = (v - target).square()
    clipped = torch.zeros_like(keep)
    loss = error
    if clip is not None:
        clipped_error = (old + (v - old).clamp(-clip, clip) - target).square()
        clipped = clipped_error > error
        loss = torch.where(clipped, clipped_error, error)
    total = 0.5 * loss.sum()
    sums = [total, clipped.sum(), v.sum(), v.square().sum(), target.sum(), target.square().sum(), error.sum()]
    return total / normalizer, ValueStats(torch.stack([s.detach().to(dtype) for s in sums]))


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of one new position a row to all positions of that row (Vaswani et al. 2017, eq. 1).

    Scores are computed for the whole buffer, and a mask excludes positions past the length of the row, so the host
    needs no lengths from the device.
    """
    newest = lengths[rows]
    key_cache[rows, :, newest], value_cache[rows, :, newest] = key, value
    positions = torch.arange(key_cache.shape[2], device=query.device)
    visible = positions <= newest[:, None]
    if window:
        visible &= positions > newest[:, None] - window
    grouped = query.unflatten(1, (key.shape[1], -1))  # (R, kv heads, queries of that head, width)
    scores = (grouped @ key_cache[rows].transpose(-1, -2)).to(statistics_dtype(query)) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).to(value.dtype)
    out: Tensor = weights @ value_cache[rows]
    return out.flatten(1, 2)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, H), (V, H), (V,) -> (M, V). Not F.linear: ZeRO stage 3 replaces it by a function without forward mode."""
    return hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())


def scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """(M, V) logits -> z = softcap tanh(logits / softcap) / temperature in the dtype of statistics."""
    z = logits.to(statistics_dtype(logits))
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    return z / temperature


def at_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """The entries at the targets: (M, V), (M,) int64 -> (M,)"""
    return rows.gather(-1, targets[:, None])[:, 0]


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
