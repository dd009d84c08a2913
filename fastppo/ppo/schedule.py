"""Schedules and small formulas of PPO: pure functions on packed tensors: rewards, KL control, learning rates."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastppo.config import Config
from fastppo.ops import eager

KLKind = Literal["k1", "k2", "k3", "exact"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Estimates of KL(policy || reference) from the sampled tokens alone (Schulman, 2020, joschu.net/blog/kl-approx).

    With d = log p(x) - log p_ref(x) and x drawn from p: k1 = d, unbiased; k2 = d^2/2, biased, low variance;
    k3 = exp(-d) - 1 + d, unbiased and never negative, computed as in the loss. (M,) fp32 -> (M,) fp32. `exact` needs
    both distributions and comes from `ops.linear_logprobs`.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return eager.exp_less_tangent(-d)
    raise ValueError(f"kl kind {kind!r} is not an estimate from sampled tokens; use k1, k2 or k3")


def token_rewards(
    kl: Tensor, scores: Tensor, last_tokens: Tensor, beta: float, turn_rewards: Tensor | None = None
) -> Tensor:
    """r_t = score * 1[t is the response's last token] - beta * KL_t (Stiennon et al., 2020, section 3.4).

    An environment's reward for a turn, as it is, is added where the turn ends. kl (M,), scores (B,), last_tokens (B,)
    the index of each response's last token, turn_rewards (M,), 0 but at the ends of turns -> (M,) fp32.
    """
    rewards = (-beta * kl).index_add(0, last_tokens, scores)
    return rewards if turn_rewards is None else rewards + turn_rewards


def next_kl_coef(beta: float, kl: float, config: Config, step: int) -> float:
    """The coefficient of the KL penalty after a step's batch, steered to a target (Ziegler et al., 2019, section 2.2).

    e = clip((KL - target) / target, -0.2, 0.2); beta <- beta * (1 + e * n / horizon), n responses at a time.

    kl: the batch's mean k1 KL, summed over each response, in nats; step: counted from 0. Without `ppo.kl_target` beta
    stays as it is, and so it does while the critic learns alone: the policy stands still, whatever beta is.
    """
    ppo = config.ppo
    if ppo.kl_target is None or step < config.critic_steps:
        return beta
    error = min(max(kl / ppo.kl_target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * ppo.batch_size / ppo.kl_horizon)


def learning_rate(peak: float, update: int, total: int, warmup: int, schedule: Literal["linear", "constant"]) -> float:
    """The rate of update 0 <= update < total: rises to the peak over `warmup` updates, then falls to 0 or stays."""
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * max(total - update, 0) / max(total - warmup, 1)


def step_rates(config: Config, step: int) -> list[tuple[float, float]]:
    """Learning rates (actor's, critic's) of each update of PPO step `step`, counted from 0.

    The actor's schedule begins with its first update; while the critic warms up, its rate is 0.
    """
    optim, each = config.optim, config.ppo.epochs * config.ppo.minibatches
    total, first = config.steps * each, config.critic_steps * each

    def rate(peak: float, update: int, begin: int) -> float:
        if update < begin:
            return 0.0
        return learning_rate(peak, update - begin, total - begin, optim.warmup_steps, optim.schedule)

    updates = range(step * each, (step + 1) * each)
    return [(rate(config.actor.lr, update, first), rate(config.critic.lr, update, 0)) for update in updates]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows the mean alone; NaN where all
    returns are equal, or none is there."""
    spread = float(returns.double().var(correction=0)) if len(returns) else 0.0
    return 1 - float((returns.double() - values.double()).var(correction=0)) / spread if spread > 0 else float("nan")
