"""Weights & Biases beside TensorBoard, with a stand-in for the package, which is none of fastppo's own needs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from fastppo.config import Config, TrackConfig
from fastppo.config.command_line import dump
from fastppo.monitor.tracker import Tracker
from fastppo.monitor.wandb_run import WandbError

ASKED = TrackConfig(tensorboard=False, wandb="films", progress="never", responses=0)


class StandIn(ModuleType):
    """What `fastppo.monitor.wandb_run` uses of wandb."""

    class Error(Exception):
        pass

    def __init__(self, refuses: str = "") -> None:
        super().__init__("wandb")
        self.refuses, self.given = refuses, {}
        self.calls: list[tuple[str, Any]] = []

    def init(self, **given: Any) -> StandIn:
        if self.refuses:
            raise self.Error(self.refuses)
        self.given, self.id = given, given["id"] or "made-up"
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", (name, step_metric)))

    def log(self, values: dict[str, float]) -> None:
        self.calls.append(("log", values))

    def alert(self, title: str, text: str, level: str) -> None:
        self.calls.append(("alert", (title, text, level)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def installed(monkeypatch: pytest.MonkeyPatch, wandb: StandIn) -> StandIn:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(dump(Config(seed=7, track=ASKED)))
    return tmp_path


def test_metrics_are_logged_over_the_ppo_step_and_alarms_told_and_the_run_is_finished(folder, monkeypatch):
    wandb = installed(monkeypatch, StandIn())
    with Tracker(folder, ASKED, steps=1, rank=0) as tracker:
        tracker.log_evaluation(0, {"score": 0.25})
        tracker.log(1, {"score": 0.5})
        tracker.log_alarms([{"step": 1, "figure": "entropy", "message": "entropy is 0.1"}])
    assert (wandb.given["project"], wandb.given["name"], wandb.given["dir"]) == ("films", folder.name, str(folder))
    assert wandb.given["config"]["seed"] == 7
    assert wandb.calls == [
        ("define", ("step", None)),
        ("define", ("*", "step")),
        ("log", {"step": 0, "eval/score": 0.25}),
        ("log", {"step": 1, "score": 0.5}),
        ("alert", ("entropy", "step 1: entropy is 0.1", "WARN")),
        ("finish", None),
    ]


def test_a_resumed_run_goes_on_under_its_id(folder, monkeypatch):
    ids = []
    for done in (0, 1):
        wandb = installed(monkeypatch, StandIn())
        with Tracker(folder, ASKED, steps=2, rank=0, done=done):
            ids.append((wandb.given["id"], wandb.given["resume"]))
    assert ids == [(None, "allow"), ("made-up", "allow")]


def test_a_refusal_says_what_to_do(folder, monkeypatch):
    installed(monkeypatch, StandIn(refuses="api_key not configured"))
    with pytest.raises(WandbError, match=r"films.*api_key not configured.*wandb login.*WANDB_MODE=offline"):
        Tracker(folder, ASKED, steps=1, rank=0).__enter__()


def test_other_ranks_and_runs_that_do_not_ask_need_no_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    with Tracker(folder, ASKED, steps=1, rank=1) as tracker:
        tracker.log(1, {"score": 0.5})
    with Tracker(folder, TrackConfig(tensorboard=False), steps=1, rank=0) as tracker:
        tracker.log(1, {"score": 0.5})
