"""fastppo.report on SFT and reward modelling."""

from __future__ import annotations

import re

import pytest
from made_up_run import write_run, write_stage
from report_page import Parsed, charts, runs

from fastppo.config import ModelConfig, PairsConfig, RewardTrainingConfig, SFTConfig
from fastppo.report.page import page

MODEL = ModelConfig("a-model", lr=1e-4)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    config = RewardTrainingConfig(model=MODEL, data=PairsConfig("pairs.jsonl"), patience=None)
    return page(runs(write_stage(tmp_path_factory.mktemp("runs") / "reward", config)))


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return page(runs(write_stage(tmp_path_factory.mktemp("runs") / "sft", SFTConfig(model=MODEL, epochs=3))))


def bold(html: str) -> list[str]:
    return re.findall(r"<tr><th>([\w.]+)<td><b>", html)


def tiles(html: str) -> list[tuple[str, str]]:
    found = re.findall(r"<dt>(.*?)</dt><dd class=\"run0\">(.*?)</dd>", html)
    return [(title, re.sub("<[^>]+>", "", told)) for title, told in found]


def test_bold_settings_are_those_that_differ_from_the_defaults_of_the_runs_command(reward, sft, tmp_path):
    assert bold(reward) == ["patience", "path", "lr", "path"]
    assert bold(sft) == ["epochs", "path", "lr"]
    assert "batch_size" not in bold(page(runs(write_run(tmp_path / "ppo", 3))))


def test_a_stage_has_tiles_of_its_own_and_none_that_is_empty(reward, sft):
    loss, rate, took = ("Loss, held-out", "0.7 → 0.5 nats"), ("Learning rate", "9.17e−5 → 0"), ("Time", "18 s")
    accuracy, calibration = ("Accuracy, held-out", "0.5 → 0.8 95%: 0.74 to 0.84"), ("Calibration error", "0.05 → 0.05")
    assert tiles(reward) == [loss, accuracy, calibration, rate, took]
    assert tiles(sft) == [loss, ("Perplexity, held-out", "2.01 → 1.65"), rate, took]
    assert "Alarm" not in Parsed(sft).text and "—" not in Parsed(sft).text


def test_intervals_are_bars_and_not_charts(reward):
    found = charts(Parsed(reward))
    learning = ["Loss", "Accuracy", "Calibration", "Calibration error", "Score of chosen answers"]
    learning += ["Score of rejected answers", "Gradient norm", "Learning rate", "Spread of scores", "Skipped updates"]
    assert list(found) == [*learning, "Learning"]  # the last: its time
    accuracy = reward[reward.index("<b>Accuracy</b>") :].partition("</figure>")[0]
    [bars] = re.findall(r'class="bars run0" d="([^"]+)"', accuracy)
    places = [tuple(map(int, place)) for place in re.findall(r"M\d+,(\d+)V(\d+)", bars)]
    dots = [int(y) for y in re.findall(r"M\d+,(\d+)h0", accuracy.partition('class="dots run0"')[2].partition(">")[0])]
    assert len(places) == len(dots) == 5
    # SVG counts from above: 0.06 below the dot, and 0.04 above it
    for (low, high), y in zip(places, dots, strict=True):
        assert (low - y) / (y - high) == pytest.approx(1.5, abs=0.1)


def test_calibration_is_a_chart_of_the_bins_that_have_pairs(reward, sft):
    chart = charts(Parsed(reward))["Calibration"]
    [line] = chart["lines"]
    assert chart["x"] == "predicted probability" and chart["range"] == [0.5, 1.0]
    assert line["x"] == pytest.approx([0.525 + 0.05 * n for n in range(9)])
    assert line["y"] == pytest.approx([0.5 + 0.045 * n for n in range(9)])
    figure = reward[reward.index("<b>Calibration</b>") :].partition("</figure>")[0]
    assert 'class="bars run0" d="M' in figure
    [diagonal] = re.findall(r'class="mark" d="M0,(\d+)L1000,(\d+)"', figure)  # to the height of 1, at the top
    assert int(diagonal[0]) > 600 and diagonal[1] == "0"
    assert "Calibration" not in charts(Parsed(sft))
