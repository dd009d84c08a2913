import math

import pytest
import torch

from fastppo.config import ActorConfig, Config, CriticConfig, OptimConfig, PPOConfig
from fastppo.ops import eager
from fastppo.ppo.schedule import (
    explained_variance,
    kl_estimate,
    learning_rate,
    next_kl_coef,
    step_rates,
    token_rewards,
)


def test_the_score_lands_on_each_responses_last_token_and_the_penalty_on_every_token():
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    rewards = token_rewards(kl, torch.tensor([1.0, -2.0]), torch.tensor([1, 4]), beta=0.5)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 0.9, -0.15, -0.2, -2.25]))


def test_kl_estimators_agree_with_the_exact_kl_in_the_mean():
    torch.manual_seed(0)
    p, q = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    weights = p.exp()
    exact = (weights * (p - q)).sum()
    for kind in ("k1", "k3"):  # unbiased: the mean over p of the estimate is the KL itself
        torch.testing.assert_close((weights * kl_estimate(p, q, kind)).sum(), exact)
    assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()


def test_k3_of_the_reward_is_that_of_the_loss_at_every_distance():
    d = torch.tensor([-1e6, -25.0, -20.0, -1.0, 0.0, 1.0, 29.0, 500.0])
    found = kl_estimate(d, torch.zeros(8), "k3")
    assert torch.equal(found, eager.kl_estimate(d, torch.zeros(8), "k3"))
    assert (found.diff()[:4] < 0).all() and (found.diff()[4:] > 0).all()


def test_exact_kl_is_no_estimate_from_samples():
    with pytest.raises(ValueError, match="exact"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "exact")


def test_adaptive_kl_known_answer():
    config = Config(ppo=PPOConfig(kl_target=0.1, kl_horizon=100, batch_size=10))
    assert next_kl_coef(0.2, 0.2, config, step=0) == pytest.approx(0.204)


def test_adaptive_kl_falls_below_its_target_and_its_error_is_clipped():
    config = Config(ppo=PPOConfig(kl_target=10.0, kl_horizon=100, batch_size=10))
    assert next_kl_coef(0.2, 0.0, config, step=0) == pytest.approx(0.2 * (1 - 0.2 * 0.1))


def test_adaptive_kl_waits_for_the_policy_to_learn():
    """While the critic learns alone the KL is 0 whatever beta is, and beta would fall in each of these steps."""
    config = Config(critic=CriticConfig(warmup_steps=2), ppo=PPOConfig(kl_target=10.0, kl_horizon=100, batch_size=10))
    assert [next_kl_coef(0.2, 0.0, config, step) for step in range(3)] == [0.2, 0.2, pytest.approx(0.196)]


def test_a_fixed_coefficient_stays():
    assert next_kl_coef(0.2, 100.0, Config(), step=0) == 0.2


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(1.0, u, total=10, warmup=2, schedule="linear") for u in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == 0.5 and rates[10] == 0.0
    assert learning_rate(1.0, 9, total=10, warmup=2, schedule="constant") == 1.0


def test_actor_and_critic_have_learning_rates_of_their_own():
    config = Config(
        steps=2,
        actor=ActorConfig(lr=1e-3),
        critic=CriticConfig(lr=1e-2),
        ppo=PPOConfig(epochs=2, minibatches=1),
        optim=OptimConfig(warmup_steps=0),
    )
    assert step_rates(config, 1) == [(5e-4, 5e-3), (2.5e-4, 2.5e-3)]


def test_the_actors_schedule_begins_with_its_first_update():
    config = Config(
        steps=5,
        actor=ActorConfig(lr=1.0),
        critic=CriticConfig(lr=1.0, warmup_steps=2),
        ppo=PPOConfig(epochs=1, minibatches=1),
        optim=OptimConfig(warmup_steps=2, schedule="linear"),
    )
    actor, critic = zip(*(rates for step in range(5) for rates in step_rates(config, step)), strict=True)
    assert actor == (0.0, 0.0, 0.5, 1.0, 1.0)
    assert critic == pytest.approx((0.5, 1.0, 1.0, 2 / 3, 1 / 3))


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((100,), 3.0), returns) == pytest.approx(0.0)
    assert math.isnan(explained_variance(returns, torch.ones(100)))
