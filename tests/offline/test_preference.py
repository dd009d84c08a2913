"""The Bradley-Terry loss and its companions, against answers known beforehand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastppo.models.loading.offline import initial_head
from fastppo.offline.preference import (
    Centring,
    accuracy,
    bootstrap_interval,
    calibration_error,
    centring_loss,
    preference_loss,
    reliability,
    wilson_interval,
)


def test_the_loss_is_the_negative_log_of_the_preferences_probability():
    chosen, rejected, margins = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 0, 1])
    expected = [-math.log(1 / (1 + math.exp(-2))), math.log(2), math.log(2)]  # a margin moves the point of indifference
    assert preference_loss(chosen, rejected, margins).tolist() == pytest.approx(expected)


def test_the_loss_of_a_pair_that_is_far_off_stays_finite():
    assert float(preference_loss(torch.tensor(-500.0), torch.tensor(500.0), torch.tensor(0.0))) == 1000.0


def test_the_centring_loss_is_zero_for_scores_that_balance():
    assert centring_loss(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0])).tolist() == [0.0, 9.0]


def test_a_new_heads_weights_have_the_deviation_of_the_paper():
    width = 20_000
    head = initial_head(width, seed=3)
    assert head.shape == (1, width) and head.dtype == torch.float32
    wanted = 1 / math.sqrt(width + 1)
    assert float(head.std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * width))  # four deviations of a deviation
    assert abs(float(head.mean())) < 4 * wanted / math.sqrt(width)
    assert torch.equal(head, initial_head(width, seed=3)) and not torch.equal(head, initial_head(width, seed=4))


def test_a_centred_head_scores_its_reference_zero_on_average():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 16, generator=generator, dtype=torch.float64) + 3.0
    weight = torch.randn(16, generator=generator, dtype=torch.float64)
    scores = hidden @ weight
    centring = Centring(hidden.mean(0), float(scores.mean()))
    assert abs(float(scores.mean())) > 1
    centred = hidden @ (weight - centring.shift)
    assert float(centred.mean()) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(centring.scores(scores, hidden), centred)
    torch.testing.assert_close(centring.weight(weight[None])[0], weight - centring.shift)


def test_centring_leaves_the_differences_that_are_not_along_the_mean():
    hidden = torch.tensor([[5.0, 1.0], [5.0, -1.0]], dtype=torch.float64)  # the mean is along the first axis
    weight = torch.tensor([0.7, 2.0], dtype=torch.float64)
    scores = hidden @ weight
    centred = Centring(hidden.mean(0), float(scores.mean())).scores(scores, hidden)
    assert centred.tolist() == pytest.approx([2.0, -2.0])
    assert Centring(torch.zeros(2, dtype=torch.float64), 0.0).shift.tolist() == [0, 0]  # nothing to centre on


def test_accuracy_counts_a_tie_as_half():
    assert accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.625


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(80, 100, 0.7112, 0.8666), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (0, 0, 0.0, 1.0)],
)
def test_wilsons_interval_has_known_answers(right, count, low, high):
    assert wilson_interval(right / max(count, 1), count) == pytest.approx((low, high), abs=1e-4)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated():
    gaps = torch.tensor([logit(0.72)] * 72 + [-logit(0.72)] * 28)  # sure to 72% each time, and right in 72 of 100
    assert calibration_error(gaps) == pytest.approx(0.0, abs=1e-6)
    (row,) = [row for row in reliability(gaps) if row.pairs]
    assert (row.low, row.high, row.pairs) == (pytest.approx(0.7), pytest.approx(0.75), 100)
    assert (row.predicted, row.observed) == (pytest.approx(0.72), pytest.approx(0.72))
    assert (row.observed_low, row.observed_high) == pytest.approx(wilson_interval(0.72, 100))


def test_a_model_that_is_too_sure_is_not():
    gaps = torch.tensor([logit(0.97)] * 60 + [-logit(0.97)] * 40)
    assert calibration_error(gaps) == pytest.approx(0.37)


@given(gaps=st.lists(st.floats(-20, 20), min_size=1, max_size=50))
def test_every_pair_is_in_one_bin(gaps):
    rows = reliability(torch.tensor(gaps))
    assert sum(row.pairs for row in rows) == len(gaps)
    for row in rows:
        assert not row.pairs or row.low - 1e-6 <= row.predicted <= row.high + 1e-6


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(values, lambda x: float(x.mean()), repeats=2000)
    wanted = 1.96 * float(values.std()) / 20
    assert high - low == pytest.approx(2 * wanted, rel=0.1)
    assert low < float(values.mean()) < high
