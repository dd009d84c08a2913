"""The quickstart's judge: how favourable a continuation of a film review sounds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def favourable(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """VADER's compound sentiment of each response, in [-1, 1] (Hutto and Gilbert, 2014). 0.04 ms per text."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the quickstart's judge needs VADER. Install it with: pip install vaderSentiment==3.3.2"
        ) from error
    return SentimentIntensityAnalyzer()
