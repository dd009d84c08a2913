"""fastppo.report on a run's health: alarms, levels, and reward against drift."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_run import write_run
from report_page import Parsed, runs

from fastppo import health
from fastppo.report import health as report_health
from fastppo.report import stats
from fastppo.report.frontier import turning_point
from fastppo.report.health import episodes
from fastppo.report.page import page
from fastppo.report.run import Run


@pytest.fixture(scope="module")
def hacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hacked")


@pytest.fixture(scope="module")
def shown(hacked: Path) -> Parsed:
    return Parsed(page(runs(hacked)))


def test_an_alarm_that_stays_on_is_one_and_one_that_comes_back_another() -> None:
    assert report_health.REST == health.REST
    steps = [*range(100, 251, 10), 261]
    alarm = {"figure": "entropy", "value": 1, "threshold": 2, "level": "warn", "action": None, "message": ""}
    alarms = [{"step": n} | alarm for n in steps]
    run = Run("made up", metrics=[{"step": 500}], alarms=alarms)
    assert [e.when for e in episodes(run)] == ["steps 100 to 250", "step 261"]
    long = replace(run, metrics=[{"step": 1100}])
    assert [e.when for e in episodes(long)] == ["steps 100 to 261"]


def test_alarms_that_follow_each_other_are_one(hacked: Path, shown: Parsed) -> None:
    first, second = episodes(runs(hacked)[0])
    assert (first.first, first.last, first.figure, first.level) == (30, 50, "distinct_2", "warn")
    assert (second.when, second.action, second.threshold) == ("step 60", "stop", 0.5)
    assert {"alarm-0-0", "alarm-0-1"} <= set(shown.ids)
    flags = [(a["href"], (a["class"] or "").split()[1]) for a in shown.all("a", "flag")]
    # the one that acted is on score and KL too
    assert flags == [("#alarm-0-1", "act")] * 2 + [("#alarm-0-0", "warn"), ("#alarm-0-1", "act")]
    assert len(shown.all("path", "level")) == 2


# The judge's turning point


def judged(judge: Sequence[float], score: Sequence[float]) -> Run:
    metrics = [
        {"step": n, "kl": 0.1 * n, "health/judge": j, "score": s}
        for n, (j, s) in enumerate(zip(judge, score, strict=True), start=1)
    ]
    return Run("made up", metrics=metrics)


def marked(judge: Callable[[float], float], runs: int = 100, steps: int = 36) -> float:
    """The share of runs with a turning point: the judge as a function of what is done, in 0 to 1, with noise of 0.1,
    and a score that rises."""
    found = 0
    for seed in range(runs):
        noise = random.Random(seed).gauss
        done = [n / (steps - 1) for n in range(steps)]
        found += bool(
            turning_point(judged([judge(x) + noise(0, 0.1) for x in done], [x + noise(0, 0.1) for x in done]))
        )
    return found / runs


@pytest.mark.parametrize(
    "judge", [lambda done: 0.0, lambda done: min(2 * done, 1.0), lambda done: done], ids=["flat", "plateau", "rising"]
)
def test_a_judge_that_did_not_turn_is_marked_in_two_runs_of_a_hundred_at_most(judge: Callable[[float], float]) -> None:
    assert marked(judge) <= 0.02


@pytest.mark.parametrize("peak", [0.3, 0.5, 0.7])
def test_a_judge_that_falls_by_several_deviations_is_marked(peak: float) -> None:
    assert marked(lambda done: min(done / peak, 1) - 0.65 * max(done - peak, 0) / (1 - peak)) >= 0.95


def test_a_judge_that_turns_with_its_score_is_not_marked() -> None:
    hill = [float(min(n, 36 - n)) for n in range(36)]
    assert turning_point(judged(hill, list(range(36))))
    assert turning_point(judged(hill, hill)) == []


def test_a_fall_of_few_steps_is_not_marked() -> None:
    """Seven steps that all fall would be sure enough."""
    hill = [float(min(n, 60 - n)) for n in range(38)]
    assert turning_point(judged(hill, list(range(38))))
    assert turning_point(judged(hill[:36], list(range(36)))) == []


def test_the_turning_point_is_where_the_judge_was_highest(tmp_path: Path) -> None:
    [(place, sentence)] = turning_point(runs(write_run(tmp_path / "hacked"))[0])
    assert 1.5 < place < 2.8  # the made-up judge is highest in the middle, at sqrt(12 * 0.5^1.4) = 2.1
    assert "the judge was highest at" in sentence


def test_the_trend_is_that_of_the_alarm() -> None:
    """The report has it again, as it may not import torch."""
    chance = random.Random(0)
    for n in range(2, 30):
        row = [chance.randrange(10) / 3 for _ in range(n)]
        assert stats.trend(row) == health.trend(row)


def test_a_run_without_judge_alarms_or_health_has_no_empty_charts(tmp_path: Path) -> None:
    parsed = Parsed(page(runs(write_run(tmp_path / "plain", 12, health=False))))
    assert "health" not in [a["id"] for a in parsed.all("section")]
    titles = [chart["title"] for chart in json.loads(parsed.data).values()]
    assert "Proxy" in titles and "Judge" not in titles
