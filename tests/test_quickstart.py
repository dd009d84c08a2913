"""The quickstart's reward."""

import sys

import pytest

from fastppo.quickstart import _analyzer, favourable, favourable_once


def test_favourable_texts_score_higher_than_unfavourable_ones() -> None:
    responses = ["a wonderful, moving film. I loved it!", "a table and a chair", "boring, awful and stupid.", ""]
    scores = favourable(["This is"] * 4, responses, label=["1"] * 4)
    assert all(type(score) is float and -1 <= score <= 1 for score in scores)
    assert scores[0] > 0.5 > scores[1] == scores[3] == 0 > -0.5 > scores[2]


def test_the_judge_counts_praise_that_is_said_again_as_less_where_the_reward_counts_it_as_more() -> None:
    once, again = "I loved it.", "I loved it. I loved it. I loved it. I loved it."
    reward, judge = (rate(["This"] * 3, [once, again, ""]) for rate in (favourable, favourable_once))
    assert reward[1] > reward[0] > 0 and judge[0] > 2 * judge[1] > 0 and judge[2] == 0


def test_a_missing_vader_is_told_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        favourable(["a"], ["b"])
