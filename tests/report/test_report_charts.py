"""fastppo.report's charts, and the numbers in them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from made_up_batches import healthy, update
from report_page import charts, page, runs, shown

from fastppo.config import Importance
from fastppo.config.health import FIGURES
from fastppo.offline.reward_modelling import PairEvaluation
from fastppo.offline.sft import AnswerEvaluation
from fastppo.offline.updates import Update as SupervisedUpdate
from fastppo.online.dynamic_sampling import Drawn
from fastppo.ppo.metrics import step_metrics
from fastppo.report.curves import Curve, duration, number, short_number, smooth, span, thin, ticks
from fastppo.report.plot import Charts, Line
from fastppo.report.titles import Quantity, quantity


def test_thinning_keeps_every_peak_and_every_gap():
    y: list[float | None] = [math.sin(i) for i in range(50_000)]
    y[12_345], y[40_000] = 99.0, -99.0
    y[20_000:21_000] = [None] * 1000
    found = thin(Curve(list(map(float, range(50_000))), y), 1000)
    assert len(found) <= 1000 and list(found.x) == sorted(found.x)
    assert (12_345.0, 99.0) in found.points and (40_000.0, -99.0) in found.points
    assert any(y is None and 20_000 <= x < 21_000 for x, y in zip(found.x, found.y, strict=True))


def test_smoothing_is_the_mean_of_the_neighbours_that_there_are():
    found = smooth(Curve(range(6), [0.0, 3.0, 6.0, None, None, None]), window=3)
    assert found.y == [1.5, 3.0, 4.5, 6.0, None, None]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.13, 0.31, [0.15, 0.2, 0.25, 0.3]), (-7, 9, [-5, 0, 5])],
)
def test_ticks_are_round_and_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e6, 1e6 + 1], [3.0, math.pi * 1e5], [0.0, 5e-324], [-1e100, 1e100]]
)
def test_an_axis_holds_its_values_and_has_ticks(values):
    low, high = span(values)
    assert low < min(values) and max(values) < high
    assert 2 <= len([t for t in ticks(low, high) if low <= t <= high]) <= 9


def test_numbers_and_times_are_written_as_people_write_them():
    written = [number(x) for x in (0, 0.5, -0.12345, 1234.5, 2e7, 1.5e-4, math.nan, None)]
    assert written == ["0", "0.5", "\u22120.1235", "1,234", "2e7", "1.5e\u22124", "—", "—"]
    assert [short_number(x) for x in (0, 950, 10_000, 2500)] == ["0", "950", "10k", "2.5k"]
    assert [duration(s) for s in (3.21, 235, 7384)] == ["3.21 s", "3 min 55 s", "2 h 3 min"]


def test_a_chart_without_a_point_is_none():
    assert Charts().draw(Quantity("t"), [Line("a", Curve([1.0], [None]))]) == ""


def test_points_without_a_neighbour_are_dots_in_both_runs():
    one, other = Curve([1.0], [2.0]), Curve([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, None, 3.0, None, 5.0, 6.0])
    html = Charts().draw(Quantity("t"), [Line("a", one, 0), Line("b", other, 1)])
    dots = dict(re.findall(r'class="lone run(\d)" d="([^"]+)"', html))
    assert {run: path.count("h0") for run, path in dots.items()} == {"0": 1, "1": 2}
    [line] = re.findall(r'class="line run1" d="[^"]*(M[^"M]+)"', html)
    assert line.count(",") == 2


@pytest.mark.parametrize("low", [-math.inf, 0.0])
@pytest.mark.parametrize("high", [math.inf, 1.0])
def test_an_axis_stays_within_what_is_possible_and_still_holds_its_values(low, high):
    charts = Charts()
    for ys in ([0.0, 0.5, 1.0], [1.0], [0.0], [-0.1, 1.1]):
        charts.draw(Quantity("t", "", low, high), [Line("a", Curve(range(len(ys)), ys))])
    inside, one, zero, outside = (chart["lines"][0]["up"] for chart in charts.data.values())
    assert (inside[0] == zero[0] == 0) == (low == 0) and (inside[-1] == one[0] == 100) == (high == 1)
    assert all(0 <= up <= 100 for up in outside)


def metrics_of_the_trainer() -> list[str]:
    """All that it writes: a step's with two sources and text beside PPO, and evaluations."""
    step = replace(healthy(1), by_source=torch.zeros(len(healthy(1).packed), 2))
    updates = [replace(update(), ptx_loss=1.0), replace(update(), epoch=1)]
    seconds = dict.fromkeys(("time/sampling", "time/feedback", "time/experience", "time/learning", "time/health"), 1.0)
    found = [
        *step_metrics(step, updates, seconds, Importance("none", 0.5, 5.0)),
        "actor_lr",
        "critic_lr",
        "kl_coef",
        "imbalance",
    ]
    found += Drawn(1, 1, 0, 0, 0, 1, 1, 0.0).metrics(seconds)
    found += [f"health/{name}" for name in FIGURES]
    evaluated = ("score", "score_std", "kl", "ref_perplexity", "distinct_2", "response_length", "ended", "judge")
    found += [f"eval/{average}{name}" for average in ("", "average/") for name in evaluated]
    pairs = PairEvaluation(torch.ones(2), torch.zeros(2), torch.zeros(2), None)
    found += [f"eval/{name}" for name in (*pairs.metrics(), *AnswerEvaluation(1.0, 1.0).metrics())]
    found += [*SupervisedUpdate(torch.zeros(1), 1.0, 1.0, 0).metrics(), "accuracy", "score_chosen"]
    return [name for name in found if not name.endswith(("_low", "_high", "_error"))] + ["sampler_error"]


def test_every_metric_of_the_trainer_has_a_title_and_a_note():
    names = metrics_of_the_trainer()
    assert {"score/1", "epoch2/approx_kl", "ptx_loss", "health/kl_exact", "eval/accuracy"} <= set(names)
    assert [name for name in names if not quantity(name).note] == []
    for section in ("health/", ""):
        own = {name.removeprefix("eval/") for name in names if name.startswith("health/") == bool(section)}
        assert len({quantity(name)[:2] for name in own}) == len(own)


def test_a_metric_that_is_not_known_goes_by_its_name():
    assert quantity("eval/my_own") == quantity("health/my_own") == Quantity("My own")


def test_the_critics_quality_is_drawn_by_the_position_in_a_response(tmp_path):
    """Means of the second half of the steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": step, "score": 0.1}
        | {f"value_bias/{q}": (step >= 3) * q / 10 for q in (1, 2, 3, 4)}
        | {"advantage_share": 0.5}
        for step in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = charts(shown(folder))
    chart = found["Calibration of the critic"]
    [line] = chart["lines"]
    assert chart["x"] == "quarter of a response" and chart["range"] == [1.0, 4.0]
    assert line["x"] == [1, 2, 3, 4] and line["y"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert "Variance of advantages" in found and "More metrics" not in page(runs(folder))  # in sight, in no closed list
