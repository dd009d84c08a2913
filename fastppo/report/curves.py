"""Numbers for charts: thinned, smoothed, put on axes and written out. Plain Python, no drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 1000  # at most so many of a curve are drawn: about one for each pixel
SMOOTHED_FROM = 50  # points; charts of shorter curves alone show them as they are


@dataclass(frozen=True)
class Curve:
    """n points; a y of None is a number that was not finite, and a gap in the line."""

    x: Sequence[float]
    y: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def points(self) -> list[tuple[float, float]]:
        """Those that can be drawn."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None]


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` of the curve: the least and the greatest of each of `points`/2 stretches, so that no peak goes.

    A stretch without any number stays a gap.
    """
    n, buckets = len(curve), points // 2
    if n <= points:
        return curve
    kept: list[int] = []
    for bucket in range(buckets):
        rows = range(bucket * n // buckets, (bucket + 1) * n // buckets)
        drawn = [(y, i) for i in rows if (y := curve.y[i]) is not None]
        kept += sorted({min(drawn)[1], max(drawn)[1]}) if drawn else [rows[0]]
    return Curve([curve.x[i] for i in kept], [curve.y[i] for i in kept])


def smooth(curve: Curve, window: int | None = None) -> Curve:
    """The mean of the `window` points around each, when left out a 25th of all; at the ends there are fewer."""
    half = (window or max(len(curve) // 25, 3)) // 2
    sums, counts = [0.0], [0]
    for y in curve.y:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    means: list[float | None] = []
    for i in range(len(curve)):
        a, b = max(i - half, 0), min(i + half + 1, len(curve))
        count = counts[b] - counts[a]
        means.append((sums[b] - sums[a]) / count if count else None)
    return Curve(curve.x, means)


def span(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """An axis that holds all values, with this share of room at both ends; never empty."""
    low, high = min(values), max(values)
    spare = (high - low) * room if high - low > 1e-100 else max(abs(high) * 0.05, 1e-9) if high else 0.5
    return low - spare, high + spare


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers from low to high, about `count` of them, one, two or five times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = power * next(m for m, most in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10)) if rough / power <= most)
    if whole:
        gap = max(gap, 1.0)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [i * gap for i in range(first, last + 1)]


def number(value: float | None) -> str:
    """Four significant digits, as people write them; a dash for a number that was not finite."""
    if value is None or not math.isfinite(value):
        return "—"
    size = abs(value)
    if value != 0 and (size < 1e-3 or size >= 1e7):
        digits, _, power = f"{value:.3e}".partition("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def short_number(value: float) -> str:
    """For an axis, where there is little room: 10k for 10,000."""
    return f"{number(value / 1000)}k" if 1000 <= abs(value) < 1e6 else number(value)


def duration(seconds: float) -> str:
    """235 -> 3 min 55 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.3g} s"
