"""The quickstart's reward: how favourable a continuation of a film review sounds; and a judge of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def favourable(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """VADER's compound sentiment of each response, in [-1, 1] (Hutto and Gilbert, 2014). 0.04 ms a text."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


def favourable_once(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """VADER's sentiment of each response's different words, times their share of its words, in [-1, 1].

    Praise that is said again earns nothing, and takes from what was said before.
    """
    scores = []
    for response in responses:
        words = response.lower().split()
        different = list(dict.fromkeys(words))
        share = len(different) / len(words) if words else 0.0
        scores.append(share * float(_analyzer().polarity_scores(" ".join(different))["compound"]))
    return scores


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the quickstart's reward needs VADER. Install it with: pip install vaderSentiment==3.3.2"
        ) from error
    return SentimentIntensityAnalyzer()
