"""DPO's losses: known answers, gradients and what they are least at."""

import math

import pytest
import torch

from fastppo.config import DPOConfig
from fastppo.offline.dpo import DPO_STATISTICS, pair_figures
from fastppo.offline.dpo_losses import dpo_loss, ipo_loss, loss_at_start, nll_term

MARGINS = torch.tensor([0.0, 5.0, -5.0, 50.0, -50.0], dtype=torch.float64)


def test_dpo_has_the_losses_that_one_finds_by_hand():
    """-ln sigmoid of 0, +-0.5 and +-5."""
    by_hand = [0.6931471805599453, 0.4740769841801067, 0.9740769841801067, 0.006715348489118068, 5.006715348489118]
    assert dpo_loss(MARGINS, 0.1).tolist() == pytest.approx(by_hand, rel=1e-12)


def test_label_smoothing_mixes_the_losses_of_both_orders():
    by_hand = [0.6931471805599453, 0.5240769841801067, 0.9240769841801067, 0.5067153484891181, 4.506715348489118]
    assert dpo_loss(MARGINS, 0.1, 0.1).tolist() == pytest.approx(by_hand, rel=1e-12)


def test_a_smoothed_loss_is_least_where_the_preference_is_as_sure_as_the_labels():
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.1], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dpo_loss(margin, 0.1, 0.1).sum(), margin)
    assert abs(float(gradient)) < 1e-12
    assert all(dpo_loss(margin + off, 0.1, 0.1) > dpo_loss(margin, 0.1, 0.1) for off in (-1e-2, 1e-2))


def test_ipo_is_0_where_the_margin_is_half_the_inverse_of_beta():
    margins = torch.tensor([5.0, 0.0, 6.0, -5.0], dtype=torch.float64)
    assert ipo_loss(margins, 0.1).tolist() == pytest.approx([0.0, 25.0, 1.0, 100.0])


def test_the_loss_before_training_is_that_of_a_margin_of_0():
    zero = torch.zeros(1, dtype=torch.float64)
    for smoothing in (0.0, 0.3):
        assert float(dpo_loss(zero, 0.7, smoothing)) == pytest.approx(loss_at_start("dpo", 0.7), rel=1e-15)
    assert float(ipo_loss(zero, 0.7)) == pytest.approx(loss_at_start("ipo", 0.7), rel=1e-15)


def test_a_margin_of_any_size_has_a_finite_loss_and_gradient():
    margins = torch.tensor([1e6, -1e6], dtype=torch.float64, requires_grad=True)
    losses = dpo_loss(margins, 0.1)
    assert losses.tolist() == pytest.approx([0.0, 1e5])
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    assert gradient.tolist() == pytest.approx([0.0, -0.1])


@pytest.mark.parametrize(
    "config",
    [
        DPOConfig(beta=0.3),
        DPOConfig(beta=0.3, label_smoothing=0.2),
        DPOConfig(beta=0.3, loss="ipo"),
    ],
    ids=["dpo", "smoothed", "ipo"],
)
def test_the_gradients_of_the_losses_are_right(config):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-10 * torch.rand(4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([[3, 1], [2, 2], [7, 4], [1, 9]])

    def loss(policy: torch.Tensor) -> torch.Tensor:
        figures = pair_figures(policy, reference, lengths, config)
        return figures.losses + 0.5 * nll_term(figures.chosen)

    assert torch.autograd.gradcheck(loss, policy.requires_grad_())


def test_figures_of_a_pair_by_hand():
    """Chosen: 2 tokens, -3 of the policy and -4 of the reference; rejected: 4 tokens, -8 and -5."""
    policy, reference = torch.tensor([[-3.0, -8.0]]).double(), torch.tensor([[-4.0, -5.0]]).double()
    lengths = torch.tensor([[2, 4]])
    found = pair_figures(policy, reference, lengths, DPOConfig(beta=0.1)).statistics().tolist()
    by_hand = {
        "loss": math.log(1 + math.exp(-0.4)),
        "accuracy": 1.0,
        "reward_chosen": 0.1,
        "reward_rejected": -0.3,
        "margin": 0.4,
        "kl": 1.0,
        "logprob_chosen": -1.5,
        "logprob_chosen_change": 0.5,
    }
    assert dict(zip(DPO_STATISTICS, found, strict=True)) == pytest.approx(by_hand)
    found = pair_figures(policy, reference, lengths, DPOConfig(beta=0.1, loss="ipo")).statistics().tolist()
    by_hand |= {"loss": (0.5 + 0.75 - 5) ** 2, "reward_chosen": 0.05, "reward_rejected": -0.075, "margin": 0.125}
    assert dict(zip(DPO_STATISTICS, found, strict=True)) == pytest.approx(by_hand)
