"""fastppo.report on a run's health: alarms, levels, and reward against drift."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from made_up_run import write_run
from report_page import Parsed, runs

from fastppo.report.frontier import turning_point
from fastppo.report.health import episodes
from fastppo.report.levels import levels
from fastppo.report.page import page
from fastppo.report.run import Run
from fastppo.report.tiles import ending


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "hacked")


@pytest.fixture(scope="module")
def shown(hacked):
    return Parsed(page(runs(hacked)))


def test_an_alarm_that_stays_on_is_one_and_one_that_comes_back_another():
    steps = [*range(100, 251, 10), 261]
    alarm = {"figure": "entropy", "value": 1, "threshold": 2, "level": "warn", "action": None, "message": ""}
    alarms = [{"step": n} | alarm for n in steps]
    run = Run("made up", metrics=[{"step": 500}], alarms=alarms)
    assert [e.when for e in episodes(run)] == ["steps 100 to 250", "step 261"]
    long = replace(run, metrics=[{"step": 1100}])
    assert [e.when for e in episodes(long)] == ["steps 100 to 261"]


def test_alarms_that_follow_each_other_are_one(hacked, shown):
    first, second = episodes(runs(hacked)[0])
    assert (first.first, first.last, first.figure, first.level) == (30, 50, "distinct_2", "warn")
    assert (second.when, second.action, second.threshold) == ("step 60", "stop", 0.5)
    assert {"alarm-0-0", "alarm-0-1"} <= set(shown.ids)
    flags = [(a["href"], (a["class"] or "").split()[1]) for a in shown.all("a", "flag")]
    # the one that acted is on score, judge and KL too
    assert flags == [("#alarm-0-1", "act")] * 3 + [("#alarm-0-0", "warn"), ("#alarm-0-1", "act")]


def test_an_alarm_on_a_metric_of_learning_is_marked_on_its_chart():
    """As DPO's: it has no health figures."""
    values = [0.0, -0.4, -0.6, -0.7]
    metrics = [{"step": n, "loss": 0.5, "logprob_chosen_change": y} for n, y in enumerate(values, start=1)]
    alarm = {"step": 3, "figure": "logprob_chosen_change", "value": -0.6, "threshold": -0.5, "level": "warn"}
    run = Run("made up", metrics=metrics, alarms=[alarm | {"action": None, "message": "they have fallen"}])
    shown = Parsed(page([run]))
    assert [a["href"] for a in shown.all("a", "flag")] == ["#alarm-0-0"] and "alarm-0-0" in shown.ids
    assert "warns at -0.5" in page([run]).replace("\N{MINUS SIGN}", "-")


# Levels


def watched(figure: str, values: Sequence[float | None], **settings: Any) -> Run:
    metrics = [{"step": n, f"health/{figure}": value} for n, value in enumerate(values, start=1)]
    given = {"health.window": 3, "health.alarms": []} | {f"health.{name}": value for name, value in settings.items()}
    return Run("made up", settings=given, metrics=metrics)


@pytest.mark.parametrize(
    ("figure", "values", "ys", "text"),
    [
        ("entropy", [4.0, None, 2.0, 0.1], (1.5,), "▲ warns below 1.5"),  # times start
        ("self_bleu", [0.1, 0.2, 0.3, 0.9], (0.5,), "▲ warns above 0.5"),  # from start
        ("length_spread", [0.5, 0.6, 0.4], (0.25,), "▲ warns below 0.25"),
        ("kl_token", [0.1], (1.0,), "▲ warns above 1"),  # value
        ("length_correlation", [0.1], (0.7, -0.7), "▲ warns beyond ±0.7"),
    ],
)
def test_the_standing_level_is_told_in_the_figures_own_unit(figure, values, ys, text):
    [level] = levels([watched(figure, values)], figure)
    assert level.ys == pytest.approx(ys)
    assert (level.level, level.text) == ("warn", text)


@pytest.mark.parametrize("figure", ["entropy", "judge"])
def test_a_level_that_is_not_known_yet_or_never_is_not_told(figure):
    short = watched(figure, [1.0, 2.0])
    assert levels([short], figure) == []
    alarm = {"step": 2, "figure": figure, "value": 1, "threshold": 0.3, "level": "warn", "action": None, "message": ""}
    [level] = levels([replace(short, alarms=[alarm])], figure)
    assert (level.ys, level.text) == ((0.3,), "▲ warns below 0.3")


def test_settings_add_levels_and_take_the_standing_ones_place():
    def told(*alarms: dict[str, Any]) -> list[str]:
        run = watched("entropy", [2.0], window=1, alarms=[{"figure": "entropy"} | alarm for alarm in alarms])
        return [level.text for level in levels([run], "entropy")]

    stop, warn = {"level": 0.8, "action": "stop"}, {"level": 0.9, "action": "warn"}
    assert told(stop) == ["▲ warns below 1", "■ stops below 1.6"]
    assert told(stop, warn) == ["■ stops below 1.6", "▲ warns below 1.8"]
    assert told(warn | {"level": None}) == []
    assert levels([replace(watched("entropy", [2.0] * 3), settings={})], "entropy") == []


def test_where_earlier_policies_sample_what_supposes_one_has_no_standing_level():
    figure, run = "sampler_error", watched("sampler_error", [0.1])
    assert [level.text for level in levels([run], figure)] == ["▲ warns above 0.08"]
    for earlier in ({"ppo.steps_ahead": 1}, {"rollout.partial_tokens": 3}):
        assert levels([replace(run, settings=run.settings | earlier)], figure) == []
    on_policy = run.settings | {"ppo.steps_ahead": 0, "rollout.partial_tokens": None}
    assert len(levels([replace(run, settings=on_policy)], figure)) == 1


def test_two_runs_have_each_its_level():
    [level] = levels([watched("entropy", [2.0] * 3), watched("entropy", [3.0] * 3)], "entropy")
    assert (level.ys, level.text) == ((1.0, 1.5), "▲ warns below 1 or 1.5")


def test_a_healthy_chart_shows_a_level_that_is_near_and_tells_one_that_is_far():
    near = page([watched("length_correlation", [0.1, -0.2, 0.1])])
    assert near.count('class="level warn"') == 2 and "▲ warns beyond ±0.7" in near
    far = page([watched("kl_sequence", [0.1, 0.2, 0.3])])
    assert 'class="level' not in far and "▲ warns above 100" in far


# The end


def stopped(action: str, steps: int, *alarm_steps: int, roll_backs: int = 1) -> Run:
    alarm = {"figure": "judge", "value": 1, "threshold": 2, "level": "act", "action": action, "message": "it fell"}
    alarms = [{"step": step} | alarm for step in alarm_steps]
    return Run("made up", {"health.roll_backs": roll_backs}, metrics=[{"step": steps, "score": 1}], alarms=alarms)


def test_a_run_that_an_alarm_ended_says_so_at_the_top(tmp_path):
    html = page(runs(write_run(tmp_path / "hacked")))
    top = html.partition("<nav")[0]
    assert '<a href="#alarm-0-1">■ Ended by an alarm of judge_gap at step 60</a>' in top
    assert "the judge falls while the score rises" in top and "Action: stop" in top
    assert "Ended" not in page(runs(write_run(tmp_path / "sound", hacked=False))).partition("<nav")[0]


@pytest.mark.parametrize(
    ("run", "ended"),
    [
        (stopped("stop", 30, 30), 30),
        (stopped("stop", 31, 30), None),  # it was resumed with other alarms
        (stopped("raise_kl", 30, 30), None),
        (stopped("roll_back", 30, 30), None),
        (stopped("roll_back", 50, 30, 50), 50),  # it may not roll back once more
        (stopped("roll_back", 20, 30, 50, roll_backs=2), None),
    ],
)
def test_only_an_alarm_that_ends_a_run_is_said_to_have(run, ended):
    found = ending(run)
    assert (found[1].last if found else None) == ended
    assert ("Ended by an alarm" in page([run])) == (ended is not None)


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
def test_a_judge_that_did_not_turn_is_marked_in_two_runs_of_a_hundred_at_most(judge):
    assert marked(judge) <= 0.02


@pytest.mark.parametrize("peak", [0.3, 0.5, 0.7])
def test_a_judge_that_falls_by_several_deviations_is_marked(peak):
    assert marked(lambda done: min(done / peak, 1) - 0.65 * max(done - peak, 0) / (1 - peak)) >= 0.95


def test_a_judge_that_turns_with_its_score_is_not_marked():
    hill = [float(min(n, 36 - n)) for n in range(36)]
    assert turning_point(judged(hill, list(range(36))))
    assert turning_point(judged(hill, hill)) == []


def test_a_fall_of_few_steps_is_not_marked():
    """Seven steps that all fall would be sure enough."""
    hill = [float(min(n, 60 - n)) for n in range(38)]
    assert turning_point(judged(hill, list(range(38))))
    assert turning_point(judged(hill[:36], list(range(36)))) == []


def test_the_turning_point_is_where_the_judge_was_highest(tmp_path):
    [(place, sentence)] = turning_point(runs(write_run(tmp_path / "hacked"))[0])
    assert 1.5 < place < 2.8  # the made-up judge is highest in the middle, at sqrt(12 * 0.5^1.4) = 2.1
    assert "the judge was highest at" in sentence


def test_a_run_without_judge_alarms_or_health_has_no_empty_charts(tmp_path):
    parsed = Parsed(page(runs(write_run(tmp_path / "plain", 12, health=False))))
    assert "health" not in [a["id"] for a in parsed.all("section")]
    titles = [chart["title"] for chart in json.loads(parsed.data).values()]
    assert "Proxy" in titles and "Judge" not in titles
