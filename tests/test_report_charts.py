"""fastppo.report's charts, and the numbers in them."""

from __future__ import annotations

import math

import pytest

from fastppo.report.curves import Curve, duration, number, short_number, smooth, span, thin, ticks
from fastppo.report.plot import Charts, Line


def test_thinning_keeps_every_peak_and_every_gap() -> None:
    y: list[float | None] = [math.sin(i) for i in range(50_000)]
    y[12_345], y[40_000] = 99.0, -99.0
    y[20_000:21_000] = [None] * 1000
    found = thin(Curve(list(map(float, range(50_000))), y), 1000)
    assert len(found) <= 1000 and list(found.x) == sorted(found.x)
    assert (12_345.0, 99.0) in found.points and (40_000.0, -99.0) in found.points
    assert any(y is None and 20_000 <= x < 21_000 for x, y in zip(found.x, found.y, strict=True))


def test_smoothing_is_the_mean_of_the_neighbours_that_there_are() -> None:
    found = smooth(Curve(range(6), [0.0, 3.0, 6.0, None, None, None]), window=3)
    assert found.y == [1.5, 3.0, 4.5, 6.0, None, None]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.13, 0.31, [0.15, 0.2, 0.25, 0.3]), (-7, 9, [-5, 0, 5])],
)
def test_ticks_are_round_and_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e6, 1e6 + 1], [3.0, math.pi * 1e5], [0.0, 5e-324], [-1e100, 1e100]]
)
def test_an_axis_holds_its_values_and_has_ticks(values: list[float]) -> None:
    low, high = span(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len([t for t in ticks(low, high) if low <= t <= high]) <= 9


def test_numbers_and_times_are_written_as_people_write_them() -> None:
    written = [number(x) for x in (0, 0.5, -0.12345, 1234.5, 2e7, 1.5e-4, math.nan, None)]
    assert written == ["0", "0.5", "\u22120.1235", "1,234", "2e7", "1.5e\u22124", "—", "—"]
    assert [short_number(x) for x in (0, 950, 10_000, 2500)] == ["0", "950", "10k", "2.5k"]
    assert [duration(s) for s in (3.21, 235, 7384)] == ["3.21 s", "3 min 55 s", "2 h 3 min"]


def test_a_chart_of_one_point_or_none() -> None:
    charts = Charts()
    assert charts.draw("t", "n", [Line("a", Curve([1.0], [None]))]) == ""
    assert 'd="M500,500h0"' in charts.draw("t", "n", [Line("a", Curve([1.0], [2.0]))])
