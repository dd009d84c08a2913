"""What best-of-n gives: the estimate against brute force, and what it says about the judge."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastppo.rewards import estimate, kl_bound
from fastppo.rewards.best_of_n import MIN_PROMPTS_FOR_TURN, ordered, weights

DISTINCT = [0.5, -1.0, 2.0, 0.25, 7.0, -3.0]
TIED = [1.0, 2.0, 1.0, 2.0, 2.0, -3.0]
EQUAL = [4.0] * 6
JUDGES = [0.1, 0.9, -0.4, 0.3, 0.75, -2.0]
VALUES = st.floats(-100, 100, width=32)


def brute_force(scores: list[float], judges: list[float], n: int) -> tuple[float, float]:
    """The mean over all subsets of n of the best score, and of the mean judge of the responses with that score."""
    proxy, judge = [], []
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        chosen = [judges[i] for i in subset if scores[i] == best]
        proxy.append(best)
        judge.append(sum(chosen) / len(chosen))
    return sum(proxy) / len(proxy), sum(judge) / len(judge)


@pytest.mark.parametrize("scores", [DISTINCT, TIED, EQUAL], ids=["distinct", "tied", "equal"])
def test_proxy_and_judge_are_those_of_all_subsets(scores):
    found = estimate([scores], [JUDGES])
    assert found.n_max == 6 and found.judge is not None
    for n in range(1, 7):
        proxy, judge = brute_force(scores, JUDGES, n)
        assert found.score.mean[n - 1] == pytest.approx(proxy, abs=1e-14)
        assert found.judge.mean[n - 1] == pytest.approx(judge, abs=1e-14)


def test_in_plain_order_the_judge_of_ties_would_be_wrong():
    order = sorted(range(6), key=lambda i: TIED[i])
    plain = weights(6, 6) @ np.array([JUDGES[i] for i in order])
    errors = [abs(plain[n - 1] - brute_force(TIED, JUDGES, n)[1]) for n in range(1, 7)]
    assert max(errors) > 0.09


@pytest.mark.parametrize("samples", [7, 60])
def test_weights_are_the_quotients_of_binomials(samples):
    for n, row in enumerate(weights(samples, samples), start=1):
        exact = [float(Fraction(math.comb(i - 1, n - 1), math.comb(samples, n))) for i in range(1, samples + 1)]
        assert row == pytest.approx(exact, rel=1e-13, abs=0)


def test_weights_of_1024_samples_are_finite_and_sum_to_1():
    found = weights(1024, 1024)
    assert np.isfinite(found).all() and (found >= 0).all()
    assert np.abs(found.sum(1) - 1).max() < 1e-13
    assert found[-1, -1] == pytest.approx(1.0) and (found[-1, :-1] == 0).all()
    exact = float(Fraction(math.comb(1000, 511), math.comb(1024, 512)))
    assert found[511, 1000] == pytest.approx(exact, rel=1e-12)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12), st.randoms())
def test_the_order_of_responses_does_not_matter_to_the_last_bit(rows, random):
    shuffled = random.sample(rows, len(rows))
    first, second = (
        estimate([[s for s, _ in some]], [[j for _, j in some]], resamples=100) for some in (rows, shuffled)
    )
    assert (first.score.mean == second.score.mean).all() and (first.judge.mean == second.judge.mean).all()


@given(st.lists(st.lists(VALUES, min_size=2, max_size=12), min_size=1, max_size=4))
def test_the_best_of_more_is_never_worse(scores):
    means = estimate(scores, resamples=100).score.mean
    assert (np.diff(means) >= -1e-12 * max(abs(x) for row in scores for x in row) - 1e-300).all()
    assert means[0] == pytest.approx(sum(sum(row) / len(row) for row in scores) / len(scores), abs=1e-9)


@given(st.lists(VALUES, min_size=2, max_size=12))
def test_a_judge_that_is_the_proxy_gets_its_values(scores):
    score, judge = ordered(scores, scores)
    assert score == pytest.approx(judge, rel=1e-12)


def test_prompts_with_more_responses_count_no_more_and_n_ends_at_the_fewest():
    found = estimate([[0.0, 1.0], [10.0, 10.0, 10.0, 40.0]])
    assert found.score.mean == pytest.approx([(0.5 + 17.5) / 2, (1.0 + 25.0) / 2])


def test_the_bound_on_the_kl():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(64) == pytest.approx(math.log(64) - 63 / 64)


def test_intervals_depend_on_the_seed_alone_and_cover_the_mean():
    scores = np.random.default_rng(0).normal(size=(200, 8))
    first, again, other = (estimate(scores.tolist(), seed=seed).score for seed in (1, 1, 2))
    assert (first.low == again.low).all() and (first.high == again.high).all() and (first.low != other.low).any()
    assert (first.low < first.mean).all() and (first.mean < first.high).all()
    # at n = 1 the standard error of the mean is known
    error = scores.mean(1).std() / math.sqrt(200)
    assert first.high[0] - first.low[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_prompt_has_no_intervals():
    found = estimate([[1.0, 2.0]], [[1.0, 2.0]])
    assert found.score.low is None and found.judge.high is None and found.turn is None


# The turn of the judge


def drawn(prompts: int, samples: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(prompts, samples)), rng.normal(size=(prompts, samples))


def test_a_judge_that_falls_while_the_proxy_rises_is_found():
    proxy, noise = drawn(40, 32)
    judge = proxy - 0.5 * proxy**2 * (proxy > 0) + 0.3 * noise
    turn = estimate(proxy.tolist(), judge.tolist()).turn
    assert turn is not None and 3 <= turn.interval[0] <= turn.n <= turn.interval[1] <= 9
    assert 0 < turn.fall_interval[0] < turn.fall < turn.fall_interval[1]


def test_a_judge_that_rises_too_does_not_turn():
    proxy, noise = drawn(40, 32)
    assert estimate(proxy.tolist(), (proxy + noise).tolist()).turn is None


def test_a_judge_of_noise_turns_no_more_often_than_the_level_allows():
    turns = 0
    for seed in range(100):
        proxy, judge = drawn(30, 8, seed)
        turns += estimate(proxy.tolist(), judge.tolist(), resamples=200, seed=seed).turn is not None
    assert turns <= 12  # 5 are expected; more than 12 have a probability below 0.002


@pytest.mark.parametrize("constant", [0.1, 0.0, -1e6])
def test_rounding_is_no_turn(constant):
    proxy, judge = drawn(30, 50)
    assert estimate(proxy.tolist(), np.full_like(judge, constant).tolist()).turn is None
    assert estimate(np.full_like(proxy, constant).tolist(), judge.tolist()).turn is None


def test_too_few_prompts_tell_no_turn():
    proxy, _ = drawn(MIN_PROMPTS_FOR_TURN, 16)
    assert estimate(proxy.tolist(), (-proxy).tolist()).turn is not None
    assert estimate(proxy[1:].tolist(), (-proxy[1:]).tolist()).turn is None
