"""What the metrics say about a critic: by hand, and of critics that are perfect, biased, or not there."""

import math
from dataclasses import replace

import made_up_batches
import pytest
import torch

from fastppo.ppo.metrics import critic_metrics


def experience(lengths, values, returns, advantage_std=0.0):
    made = made_up_batches.batch([[7] * n for n in lengths])
    return replace(made, values=torch.tensor(values), returns=torch.tensor(returns), advantage_std=advantage_std)


def test_a_critic_that_is_off_at_the_end_of_responses_by_hand():
    """Eight tokens and two: the quarters of the first are pairs, the tokens of the second in quarters 1 and 3."""
    returns = [1.0, 3.0, 2.0, 4.0, 0.0, 2.0, 5.0, 7.0, 3.0, 1.0]
    values = [1.0, 3.0, 2.0, 4.0, 0.5, 2.5, 7.0, 7.0, 3.0, 4.0]
    metrics = critic_metrics(experience((8, 2), values, returns, advantage_std=1.5))
    bias = [metrics[f"value_bias/{q}"] for q in (1, 2, 3, 4)]
    assert bias == pytest.approx([0.0, 0.0, (0.5 + 0.5 + 3.0) / 3, 1.0])
    assert [metrics[f"explained_variance/{q}"] for q in (1, 2)] == [1.0, 1.0]
    assert metrics["explained_variance/4"] == 0.0  # errors of 2 and 0 for returns of 5 and 7: as much spread
    variance = float(torch.tensor(returns, dtype=torch.float64).var(correction=0))
    assert metrics["advantage_share"] == pytest.approx(1.5**2 / variance)
    assert metrics["value"] == pytest.approx(sum(values) / 10)


def test_where_no_token_is_or_all_returns_are_equal_there_is_no_number():
    metrics = critic_metrics(experience((1, 1), [0.0, 1.0], [2.0, 2.0]))
    assert metrics["value_bias/1"] == -1.5 and math.isnan(metrics["value_bias/2"])
    assert math.isnan(metrics["explained_variance"]) and math.isnan(metrics["advantage_share"])


def test_without_a_critic_there_is_nothing_to_say():
    made = made_up_batches.batch([[7, 7]])
    assert critic_metrics(replace(made, values=None, returns=None)) == {}
