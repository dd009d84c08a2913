"""Charts: an SVG that is scaled to any width, with labels in HTML, which are not scaled.

The SVG has 1000 by 1000 units and does not preserve its aspect ratio; its strokes are not scaled. page.js shows the
values at the pointer, from the numbers that `Charts` collects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastppo.report.curves import SMOOTHED_FROM, Curve, number, short_number, smooth, span, thin, ticks
from fastppo.report.titles import Quantity

SIZE = 1000
MAX_RINGS = 12  # dots of a longer line are drawn small and filled, not as rings
# The values take at least this share of the chart's height; a level that would leave them less is not drawn, and only
# named in the text below.
MIN_VALUE_SHARE = 1 / 8
SIGNS = {"warn": "\N{BLACK UP-POINTING TRIANGLE}", "act": "\N{BLACK SQUARE}"}  # alarms differ in shape and in colour


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    curve: Curve
    run: int = 0  # 0 to 4, for its colour; a page of runs has two at most
    dots: bool = False  # draw separate points, as for evaluations
    steps: Sequence[float] = ()  # the step of each point (or what `Charts.draw` counts), if x is another quantity
    bars: Mapping[float, tuple[float, float]] = field(
        default_factory=dict
    )  # x -> ends of the error bar; of a line, a band

    @property
    def is_cloud(self) -> bool:
        """Whether there are too many dots to draw them as rings."""
        return self.dots and len(self.curve) > MAX_RINGS


@dataclass(frozen=True)
class Flag:
    """A marker of an alarm on the x axis, with a link to its row in the table of alarms."""

    x: float
    title: str
    level: str  # warn or act
    href: str


@dataclass(frozen=True)
class Level:
    """Horizontal lines, and a sentence that describes them."""

    ys: Sequence[float]
    level: str  # warn or act
    text: str


def grid(figures: str, kind: str = "") -> str:
    """Charts in a grid; an empty text if there are none."""
    return f'<div class="grid {kind}">{figures}</div>' if figures else ""


@dataclass
class Charts:
    """Draws charts and collects their numbers."""

    data: dict[str, Any] = field(default_factory=dict)

    def draw(
        self,
        shown: Quantity,
        lines: Sequence[Line],
        *,
        flags: Sequence[Flag] = (),
        levels: Sequence[Level] = (),
        x_title: str = "step",
        counted: str = "step",
        x_range: tuple[float, float] | None = None,
        marks: Sequence[tuple[float, str]] = (),
        diagonal: bool = False,
        kind: str = "small",
    ) -> str:
        """An HTML figure; an empty text if no line has a point. counted: what the lines' `steps` are; marks: vertical
        lines with their texts; diagonal: draw the line y = x."""
        drawn = [line for line in lines if line.curve.points]
        if not drawn:
            return ""
        xs = [x for line in drawn for x, _ in line.curve.points]
        left, right = x_range or span(xs, room=0.0)
        low, high = _heights(shown, drawn, levels, (left, right) if diagonal else ())
        place = _Place(left, right, low, high)
        key = f"chart{len(self.data)}"
        whole = x_title == "step"
        x_ticks, y_ticks = ticks(left, right, 5, whole), ticks(low, high, 3 if kind == "small" else 4)
        curves = [(line, thin(line.curve)) for line in drawn]
        self.data[key] = {
            "title": shown.title,
            "x": x_title,
            "counted": counted,
            "range": [left, right],
            "lines": [_numbers(line, curve, place) for line, curve in curves],
        }
        grid = "".join(f'<path d="M0,{place.y(y):.0f}H{SIZE}"/>' for y in y_ticks)
        smoothed = max(len(line.curve) for line in drawn) >= SMOOTHED_FROM
        background = [_level(y, level, place) for level in levels for y in level.ys if low <= y <= high]
        background += [f'<path class="mark" d="M{place.x(x):.0f},0V{SIZE}"/>' for x, _ in marks]
        if diagonal:
            background.append(f'<path class="mark" d="{_path(Curve((left, right), (left, right)), place)}"/>')
        captions = [f'<em class="{level.level}">{escape(level.text)}</em>' for level in levels]
        captions += [f"<em>{escape(text)}</em>" for _, text in marks if text]
        label = f"{shown.title}, {shown.note}. {'; '.join(map(_in_words, drawn))}."
        return f"""<figure class="chart {kind}" id="{key}">
<figcaption><b>{escape(shown.title)}</b> <span>{escape(shown.note)}</span></figcaption>
{_key(drawn)}
<div class="plot" role="slider" tabindex="0" aria-label="{escape(label)}" aria-valuemin="{left:g}" \
aria-valuemax="{right:g}" aria-valuenow="{right:g}">
<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true"><g class="grid">{grid}</g>
{"".join(background)}{"".join(_drawn(line, curve, place, smoothed) for line, curve in curves)}\
{"".join(_lone(line, curve, place, smoothed) for line, curve in curves)}</svg>
{"".join(f'<span class="y" style="bottom:{place.up(y):.1f}%">{short_number(y)}</span>' for y in y_ticks)}
{"".join(f'<span class="x" style="left:{place.right_of(x):.1f}%">{short_number(x)}</span>' for x in x_ticks)}
{"".join(_flag(flag, place) for flag in flags)}<i class="cursor" hidden></i></div>
<p class="axis"><span>{escape(x_title)}</span>{"".join(captions)}</p>
</figure>"""


def _heights(
    shown: Quantity, lines: Sequence[Line], levels: Sequence[Level], others: Sequence[float]
) -> tuple[float, float]:
    """The range of the y axis: it contains all values, and the levels close enough to leave them `MIN_VALUE_SHARE` of
    it, within the limits of the quantity."""
    ys = [end for line in lines for x, y in line.curve.points for end in (y, *line.bars.get(x, ()))] + [*others]
    low, high = min(ys), max(ys)
    reach = (high - low) / MIN_VALUE_SHARE
    near = [y for level in levels for y in level.ys if high - reach <= y <= low + reach]
    bottom, top = span(ys + near)
    return max(bottom, min(shown.low, low)), min(top, max(shown.high, high))


@dataclass(frozen=True)
class _Place:
    """The conversion of values to positions in the chart."""

    left: float
    right: float
    low: float
    high: float

    def right_of(self, x: float) -> float:
        """The position of x as a percentage of the width, from the left."""
        return (x - self.left) / (self.right - self.left) * 100

    def up(self, y: float) -> float:
        """The position of y as a percentage of the height, from the bottom."""
        return (y - self.low) / (self.high - self.low) * 100

    def x(self, x: float) -> float:
        return self.right_of(x) * SIZE / 100

    def y(self, y: float) -> float:
        return SIZE - self.up(y) * SIZE / 100


def _drawn(line: Line, curve: Curve, place: _Place, smoothed: bool) -> str:
    """The curve as SVG paths; if smoothed, in a pale colour with its running mean over it."""
    if line.dots:
        bars = "".join(
            f"M{place.x(x):.0f},{place.y(line.bars[x][0]):.0f}V{place.y(line.bars[x][1]):.0f}"
            for x, _ in curve.points
            if x in line.bars
        )
        many = " many" if line.is_cloud else ""
        return (
            f'<path class="bars run{line.run}" d="{bars}"/><path class="halo{many}" d="{_dots(curve, place)}"/>'
            f'<path class="dots{many} run{line.run}" d="{_dots(curve, place)}"/>'
            f'<path class="core{many}" d="{_dots(curve, place)}"/>'
        )
    band = f'<path class="band run{line.run}" d="{_band(line, curve, place)}"/>' if line.bars else ""
    if line.steps or not smoothed:
        return f'{band}<path class="line run{line.run}" d="{_path(curve, place)}"/>'
    return (
        f'{band}<path class="raw run{line.run}" d="{_path(curve, place)}"/>'
        f'<path class="line run{line.run}" d="{_path(_mean(line), place)}"/>'
    )


def _mean(line: Line) -> Curve:
    return thin(smooth(line.curve), 400)


def _lone(line: Line, curve: Curve, place: _Place, smoothed: bool) -> str:
    """Dots for points without neighbours, which a line does not show."""
    if line.dots:
        return ""
    shown = _mean(line) if smoothed and not line.steps else curve
    y = [None, *shown.y, None]
    isolated = [i for i in range(len(shown)) if y[i + 1] is not None and y[i] is y[i + 2] is None]
    points = Curve([shown.x[i] for i in isolated], [shown.y[i] for i in isolated])
    return f'<path class="lone run{line.run}" d="{_dots(points, place)}"/>' if isolated else ""


def _path(curve: Curve, place: _Place) -> str:
    parts, pen = [], "M"
    for x, y in zip(curve.x, curve.y, strict=True):
        if y is not None:
            parts.append(f"{pen}{place.x(x):.0f},{place.y(y):.0f}")
        pen = "M" if y is None else "L"
    return "".join(parts)


def _band(line: Line, curve: Curve, place: _Place) -> str:
    """The area between the ends of all bars: along the lower ends, and back along the upper ones."""
    ends = [(place.x(x), *map(place.y, line.bars[x])) for x, _ in curve.points if x in line.bars]
    outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
    return "M" + "L".join(f"{x:.0f},{y:.0f}" for x, y in outline) + "Z"


def _dots(curve: Curve, place: _Place) -> str:
    """Strokes of length 0 with round ends: circles that are not distorted when the chart is scaled."""
    return "".join(f"M{place.x(x):.0f},{place.y(y):.0f}h0" for x, y in curve.points)


def _level(y: float, level: Level, place: _Place) -> str:
    return f'<path class="level {level.level}" d="M0,{place.y(y):.0f}H{SIZE}"/>'


def _flag(flag: Flag, place: _Place) -> str:
    left = min(max(place.right_of(flag.x), 0), 100)  # the step of an alarm that ended the run may have no metrics
    return (
        f'<a class="flag {flag.level}" href="#{escape(flag.href)}" style="left:{left:.1f}%"'
        f' title="{escape(flag.title)}" aria-label="{escape(flag.title)}">{SIGNS[flag.level]}</a>'
    )


def _key(lines: Sequence[Line]) -> str:
    """The legend: the lines' names with their last values, which page.js replaces by those at the pointer."""
    items = []
    for line in lines:
        swatch = f"swatch run{line.run}{' dot' * line.dots}{' many' * line.is_cloud}"
        label, last = line.label if len(lines) > 1 else "", number(line.curve.points[-1][1])
        items.append(f'<li><i class="{swatch}"></i>{escape(label)} <b>{last}</b></li>')
    return f'<ul class="key">{"".join(items)}<li class="at">last</li></ul>'


def _in_words(line: Line) -> str:
    (x, first), (end, last) = line.curve.points[0], line.curve.points[-1]
    return f"{line.label}: {number(first)} at {number(x)}, {number(last)} at {number(end)}"


def _numbers(line: Line, curve: Curve, place: _Place) -> dict[str, Any]:
    """The numbers of a line for page.js."""
    points = curve.points
    numbers: dict[str, Any] = {
        "x": [_short(x) for x, _ in points],
        "y": [_short(y) for _, y in points],
        "up": [round(place.up(y), 1) for _, y in points],
    }
    return numbers | ({"steps": list(line.steps)} if line.steps else {})


def _short(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def as_script(value: Any) -> str:
    """JSON that is safe inside a script element, whatever texts it contains."""
    text = json.dumps(value, separators=(",", ":"))  # only ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
