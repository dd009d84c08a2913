"""Figures of a batch against numbers worked out by hand, or by the definition, slowly."""

import dataclasses
import math
from collections import Counter

import finished_talks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_batches import a_phrase_pays, a_token_pays, batch, healthy

from fastppo.monitor.health_metrics import (
    distinct,
    distinct_pairs,
    duplicates,
    figures,
    ngrams,
    rank_correlation,
    repetition,
    rewarded_phrases,
    self_bleu,
)

RESPONSES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=2, max_size=6)


def flat(responses):
    return np.array([t for r in responses for t in r]), np.array([len(r) for r in responses])


def grams_of(response, n):
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


@given(RESPONSES)
def test_ngrams_are_those_of_each_response_and_equal_ones_have_equal_ids(responses):
    for n, grams in enumerate(ngrams(*flat(responses), 4), start=1):
        expected = [(gram, row) for row, r in enumerate(responses) for gram in grams_of(r, n)]
        tokens = flat(responses)[0]
        found = [(tuple(tokens[s : s + n]), row) for s, row in zip(grams.starts, grams.rows, strict=True)]
        assert found == expected
        names = dict(zip(grams.ids.tolist(), (gram for gram, _ in found), strict=True))
        assert [names[i] for i in grams.ids.tolist()] == [gram for gram, _ in found]
        assert len(names) == len({gram for gram, _ in found}) and set(names) == set(range(len(names)))


@given(RESPONSES)
def test_distinct_and_repetition_are_shares_of_ngrams(responses):
    for n, grams in enumerate(ngrams(*flat(responses), 4), start=1):
        everything = [g for r in responses for g in grams_of(r, n)]
        if not everything:
            assert math.isnan(distinct(grams)) and math.isnan(repetition(grams, len(responses)))
            continue
        assert distinct(grams) == pytest.approx(len(set(everything)) / len(everything))
        own = [1 - len(set(g)) / len(g) for g in (grams_of(r, n) for r in responses) if g]
        assert repetition(grams, len(responses)) == pytest.approx(sum(own) / len(own))


def slow_self_bleu(responses):
    """From the definition, with sets and loops."""
    found = []
    for i, response in enumerate(responses):
        others, logs = responses[:i] + responses[i + 1 :], []
        for n in range(1, min(len(response), 4) + 1):
            mine, theirs = Counter(grams_of(response, n)), [Counter(grams_of(o, n)) for o in others]
            matches = sum(min(times, max(o[g] for o in theirs)) for g, times in mine.items())
            logs.append(math.log((matches or 0.1) / mine.total()))
        closest = min((len(o) for o in others), key=lambda n: (abs(n - len(response)), n))
        found.append(math.exp(sum(logs) / len(logs) + min(1 - closest / len(response), 0)))
    return sum(found) / len(found)


@given(RESPONSES)
def test_self_bleu_is_bleu_of_each_against_the_others(responses):
    assert self_bleu(*flat(responses)) == pytest.approx(slow_self_bleu(responses))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(2, 80))
def test_equal_responses_have_a_self_bleu_of_one_and_all_but_one_are_duplicates(response, times):
    same = flat([response] * times)
    assert self_bleu(*same) == pytest.approx(1.0)
    assert duplicates(*same) == pytest.approx(1 - 1 / times)


def test_self_bleu_of_many_responses_is_that_of_a_sample_always_the_same():
    chance = np.random.default_rng(0)
    many = flat([chance.integers(0, 50, chance.integers(1, 30)).tolist() for _ in range(300)])
    assert self_bleu(*many) == self_bleu(*many)
    assert self_bleu(*many) == pytest.approx(self_bleu(*many, sample=300), rel=0.2)
    assert math.isnan(self_bleu(*flat([[1, 2, 3]])))


def test_rank_correlation_sees_order_alone_and_ties_share_their_rank():
    x = np.arange(8.0)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    tied = np.array([0.0, 1.0, 2.0, 2.0, 2.0, 5.0, 6.0, 7.0])
    assert rank_correlation(x, tied) == pytest.approx(40 / math.sqrt(42 * 40))
    assert math.isnan(rank_correlation(x, np.ones(8)))
    assert math.isnan(rank_correlation(x[:7], x[:7]))  # so few are often in order by chance


def test_kl_and_perplexity_come_from_the_logprobs():
    experience = batch([[5, 6, 7], [8]], logprob=-2.0, kl=0.25)
    found = figures(experience, exact_kl=False)
    assert found["kl_token"] == pytest.approx(0.25) and found["kl_sequence"] == pytest.approx(0.5)
    assert found["perplexity"] == pytest.approx(math.exp(2.25))
    assert found["entropy"] == pytest.approx(3.0) and "kl_exact" not in found
    exact = figures(dataclasses.replace(experience, kl=torch.tensor([0.5, 0.5, 0.5, 1.5])), exact_kl=True)
    assert exact["kl_exact"] == pytest.approx(0.75) and exact["kl_exact_sequence"] == pytest.approx(1.5)


def test_what_the_reference_would_never_write_has_an_infinite_perplexity():
    far = dataclasses.replace(batch([[5, 6]]), ref_logprobs=torch.tensor([-3000.0, -10.0]))
    assert figures(far, exact_kl=False)["perplexity"] == math.inf


@given(st.integers(0, 1000))
def test_every_figure_of_a_healthy_batch_is_in_its_range(seed):
    found = figures(healthy(1, seed), exact_kl=True)
    assert all(math.isfinite(value) for value in found.values())
    shares = [*(f"distinct_{n}" for n in (1, 2, 3)), "self_bleu", "repetition", "duplicates", "rewarded_phrase"]
    assert all(0 <= found[name] <= 1 for name in shares) and abs(found["length_correlation"]) <= 1
    assert found["distinct_1"] <= found["distinct_2"] <= found["distinct_3"]


def test_a_batch_of_one_response_of_one_token_has_figures_too():
    found = figures(batch([[7]]), exact_kl=False)
    assert found["distinct_1"] == 1 and found["duplicates"] == 0 and found["length_spread"] == 0
    assert all(math.isnan(found[name]) for name in ("distinct_2", "repetition", "self_bleu", "length_correlation"))


def test_the_phrase_that_pays_is_named_with_what_it_pays():
    phrases = rewarded_phrases(a_phrase_pays(healthy(1), 0.5))
    assert {p.tokens for p in phrases[:2]} == {(101, 102, 103), (102, 103, 104)}
    assert phrases[0].share == 0.5 and phrases[0].gain > 0.5 and phrases[0].surprise == pytest.approx(0.75)


def test_a_single_token_is_named_if_the_reference_hardly_writes_it():
    word = rewarded_phrases(a_token_pays(healthy(1), 0.5))[0]
    assert word.tokens == (102,) and word.share == pytest.approx(0.5, abs=0.1) and word.surprise > math.log(20)
    twice = batch([[102, 5 + i, 60 + i] for i in range(10)], kl=1.0)
    assert not rewarded_phrases(twice)


def test_a_phrase_that_every_response_holds_is_named_though_none_scores_above_the_rest():
    assert rewarded_phrases(a_phrase_pays(healthy(1), 1.0))[0].share == 1.0


def test_a_phrase_that_the_reference_writes_as_often_or_that_scores_less_is_not_named():
    paid = a_phrase_pays(healthy(1), 0.5)
    known = batch([[101, 102, 103, 104]] * 9 + [[5, 6, 7, 8]], [1.0] * 9 + [0.0], kl=0.1)
    unpaid = batch([[101, 102, 103, 104]] * 5 + [[i, 6, 7 + i, 8] for i in range(5)], [0.0] * 5 + [1.0] * 5, kl=1.0)
    assert rewarded_phrases(paid) and not rewarded_phrases(known) and not rewarded_phrases(unpaid)


def test_figures_are_the_same_for_the_same_batch_on_every_rank():
    one, other = (figures(healthy(3), exact_kl=True) for _ in range(2))
    assert one == other and torch.equal(healthy(3).packed.tokens, healthy(3).packed.tokens)


def test_no_ngram_goes_from_one_turn_to_the_next():
    responses, turns = [[1, 2, 3, 1, 2], [2, 3, 1, 2], [5]], np.array([0, 0, 1, 1, 2, 0, 1, 1, 1, 0])
    split = [[[1, 2], [3, 1], [2]], [[2], [3, 1, 2]], [[5]]]
    tokens = flat(responses)[0]
    for n, grams in enumerate(ngrams(*flat(responses), 4, turns), start=1):
        expected = [(gram, row) for row, r in enumerate(split) for turn in r for gram in grams_of(turn, n)]
        assert [(tuple(tokens[s : s + n]), row) for s, row in zip(grams.starts, grams.rows, strict=True)] == expected


@given(RESPONSES)
def test_one_turn_each_changes_no_figure(responses):
    tokens, lengths = flat(responses)
    turns = np.zeros(len(tokens), np.int64)
    for one, other in zip(ngrams(tokens, lengths, 4), ngrams(tokens, lengths, 4, turns), strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert self_bleu(tokens, lengths) == self_bleu(tokens, lengths, turns)


def test_what_the_environment_says_is_in_no_figure():
    """Turns that stand alone have the pairs of tokens that each has by itself, however the observations read."""
    packed = finished_talks.rollout(said=[["ab", "ab", "ab"], ["xy"], ["yx", "xy", "zz", "xy", "x"]]).packed
    alone = [[97, 98], [97, 98, 0], [120, 121, 0], [121, 120], [122, 122], [120]]
    pairs = {pair for turn in alone for pair in grams_of(turn, 2)}
    assert distinct_pairs(packed) == pytest.approx(len(pairs) / sum(len(turn) - 1 for turn in alone))
