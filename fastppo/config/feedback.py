"""Where scores come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardConfig:
    """One source of reward: a model or a Python function. Exactly one of the two is set."""

    function: str | None = None
    """`module:function` or `file.py:function`; called with prompts, responses and the data's columns; returns one
    number each."""
    model: str | None = None
    """An `AutoModelForSequenceClassification` with one label: hub name or directory. It may use a tokenizer of its
    own."""
    weight: float = 1.0
    """Factor of this source in the weighted sum of all sources."""
