"""Which responses of a Grow are learned from: by hand, and against plain loops."""

import math
import random

import pytest
import torch

from fastppo.config import ImproveConfig
from fastppo.rest.selection import RestError, prompts_of_equal_scores, select_by_score

SCORES = torch.tensor([1.0, 4.0, 2.0, 2.0, 3.0, 3.0, 0.0, 0.0])
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def rows(level, scores=SCORES, groups=GROUPS, **settings):
    return select_by_score(scores, groups, level, ImproveConfig(**settings)).rows.tolist()


def test_a_quantile_keeps_what_reaches_it_ties_included():
    assert rows(0.0) == [*range(8)]
    assert rows(0.5) == [1, 2, 3, 4, 5]  # the score at place 0.5 * 7, rounded up, is 2
    assert rows(0.9) == [1]
    found = select_by_score(SCORES, GROUPS, 0.5, ImproveConfig())
    assert found.threshold == 2.0 and found.prompts == 3


def test_a_value_keeps_what_is_above_it():
    assert rows(2.0, keep="value") == [1, 4, 5]
    assert rows(-1.0, keep="value") == [*range(8)]


def test_each_prompts_best_is_kept_but_of_prompts_that_tell_nothing_apart():
    scores = torch.tensor([1.0, 4.0, 4.0, 2.0, 2.0, 2.0, 5.0, 1.0, 0.0])
    groups = torch.arange(9) // 3
    found = select_by_score(scores, groups, None, ImproveConfig(keep="best"))
    assert found.rows.tolist() == [1, 6] and found.prompts == 2 and math.isnan(found.threshold)
    assert prompts_of_equal_scores(scores, groups) == 1


def test_a_prompt_with_one_response_is_not_one_of_equal_scores():
    assert prompts_of_equal_scores(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0, 1, 1])) == 1


def test_a_prompt_gives_at_most_so_many_the_best_first():
    scores, groups = torch.tensor([1.0, 3.0, 2.0, 3.0, 9.0]), torch.tensor([0, 0, 0, 0, 1])
    assert rows(0.0, scores, groups, max_per_prompt=2) == [1, 3, 4]
    assert rows(0.0, scores, groups, max_per_prompt=1) == [1, 4]


@pytest.mark.parametrize("seed", range(20))
def test_selections_are_those_of_plain_loops(seed):
    draw = random.Random(seed)
    samples, prompts = draw.randint(1, 5), draw.randint(1, 6)
    scores = [float(draw.randint(0, 4)) for _ in range(samples * prompts)]
    groups = torch.arange(len(scores)) // samples
    level, most = draw.choice([0.0, 0.3, 0.5, 0.7, 0.9]), draw.randint(1, 4)
    threshold = sorted(scores)[math.ceil(level * (len(scores) - 1) - 1e-9)]
    expected, best = [], []
    for first in range(0, len(scores), samples):
        mine = sorted(range(first, first + samples), key=lambda i: (-scores[i], i))
        expected += [i for i in mine[:most] if scores[i] >= threshold]
        best += mine[:1] if len({scores[i] for i in mine}) > 1 else []
    found = torch.tensor(scores)
    assert rows(level, found, groups, max_per_prompt=most) == sorted(expected)
    if best:
        assert rows(None, found, groups, keep="best") == best
    else:
        with pytest.raises(RestError, match="the same score"):
            rows(None, found, groups, keep="best")


def test_nothing_above_the_threshold_is_an_error_with_the_numbers():
    with pytest.raises(RestError, match=r"has 4, but none of the 8 responses .* highest score is 4, the mean 1.875"):
        rows(4.0, keep="value")
