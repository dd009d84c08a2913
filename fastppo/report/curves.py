"""The numbers of charts: thinning, smoothing, axes, and formatting. Plain Python without drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 1000  # the maximum number of points drawn of a curve: about one per pixel
SMOOTHED_FROM = 50  # a chart shows running means if one of its curves has at least this many points


@dataclass(frozen=True)
class Curve:
    """n points; a y of None stands for a number that was not finite, and is a gap in the line."""

    x: Sequence[float]
    y: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points with a finite y."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None]


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` points of the curve: the minimum and the maximum of each of `points`/2 sections, so that peaks
    stay visible.

    A section without numbers stays a gap.
    """
    n, sections = len(curve), points // 2
    if n <= points:
        return curve
    indices: list[int] = []
    for section in range(sections):
        rows = range(section * n // sections, (section + 1) * n // sections)
        finite = [(y, i) for i in rows if (y := curve.y[i]) is not None]
        indices += sorted({min(finite)[1], max(finite)[1]}) if finite else [rows[0]]
    return Curve([curve.x[i] for i in indices], [curve.y[i] for i in indices])


def smooth(curve: Curve, window: int | None = None) -> Curve:
    """The running mean: of the `window` points around each point, fewer at the ends. Default: a 25th of all points."""
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
    """The range of an axis for these values, with a margin of the share `room` at both ends; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) * room if high - low > 1e-100 else max(abs(high) * 0.05, 1e-9) if high else 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """About `count` round numbers from low to high, whose distance is 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = power * next(m for m, most in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10)) if rough / power <= most)
    if whole:
        gap = max(gap, 1.0)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [i * gap for i in range(first, last + 1)]


def number(value: float | None) -> str:
    """A number with four significant digits, for people; a dash for a number that was not finite."""
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
    """A number in short form, for an axis: 10k for 10,000."""
    return f"{number(value / 1000)}k" if 1000 <= abs(value) < 1e6 else number(value)


def duration(seconds: float) -> str:
    """A duration as text: 235 -> 3 min 55 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.3g} s"
