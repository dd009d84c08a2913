"""Tests for a trend in a noisy series. They do not need torch, so that the report can use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import median


def trend(values: Sequence[float]) -> float:
    """The Mann-Kendall statistic z: approximately standard normal without a trend, positive if the values rise.

    z = (S - sign S) / sqrt(var S). S is the number of rising pairs minus the number of falling ones; var S is corrected
    for ties (Kendall).
    """
    n, rising = len(values), sum((b > a) - (b < a) for a, b in combinations(values, 2))
    ties = [values.count(x) for x in set(values)]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    return (rising - (rising > 0) + (rising < 0)) / math.sqrt(variance) if variance else 0.0


def slope(values: Sequence[float]) -> float:
    """The median of the slopes of all pairs, per step (Theil, 1950; Sen, 1968)."""
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))
