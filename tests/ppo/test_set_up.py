"""What is wrong with a run is found before its folder is touched, and before weights are read."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import tiny
import whole_runs

from fastppo import train, train_reward, train_sft
from fastppo.config.command_line import PPO, REWARD, SFT, parse
from fastppo.distributed.world import start_world
from fastppo.errors import FastPPOError

pytestmark = pytest.mark.slow

Start = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(stage_runs.prepare(tmp_path_factory.mktemp("set_up")))


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Starts a command where an earlier run has left its folder."""
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')

    def start(command: str, **changes: Any) -> None:
        world = start_world(1)
        if command == "ppo":
            train.train(parse(whole_runs.settings(folder, output, **changes), PPO), world)
        elif command == "pairs":
            train_reward.train(parse(stage_runs.settings(folder, command, output=output, **changes), REWARD), world)
        else:
            train_sft.train(parse(stage_runs.settings(folder, command, output=output, **changes), SFT), world)

    return start


def check_refusal(start: Start, tmp_path: Path, words: str, command: str, **changes: Any) -> None:
    with pytest.raises(FastPPOError, match=words):
        start(command, **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("command", ["ppo", "pairs", "answers"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data__path", "runs/none/x.jsonl: there is no such file"),
        ("data__eval_path", "runs/none/x.jsonl: there is no such file"),
        ("MODEL", r"(model.path|actor.model) = runs/none/x.jsonl: there is no such directory"),
        ("COLUMN", "has no column runs/none/x.jsonl"),
    ],
)
def test_what_is_not_there_is_missed_before_an_earlier_run_is_moved_aside(start, tmp_path, command, setting, words):
    names = {
        "MODEL": "actor__model" if command == "ppo" else "model__path",
        "COLUMN": "data__column" if command == "ppo" else "data__prompt",
    }
    check_refusal(start, tmp_path, words, command, **{names.get(setting, setting): "runs/none/x.jsonl"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"critic__model": "runs/none/x"}, "critic.model = runs/none/x"),
        ({"reference__model": "runs/none/x"}, "reference.model = runs/none/x"),
        ({"rewards": json.dumps([{"model": "runs/none/x"}])}, "rewards.model = runs/none/x"),
        (
            {"ptx__coef": 0.1, "ptx__path": "runs/none/x.jsonl", "ptx__max_tokens": 20},
            "runs/none/x.jsonl: there is no such",
        ),
        ({"eval__prompts": 41}, "40 usable prompts"),
    ],
)
def test_so_is_what_stands_beside_the_actor(start, tmp_path, changes, words):
    check_refusal(start, tmp_path, words, "ppo", **changes)


@pytest.mark.parametrize("command", ["ppo", "pairs", "answers"])
@pytest.mark.parametrize("resume", ["null", "auto"])
def test_so_is_a_folder_that_another_run_is_in(start, tmp_path, command, resume):
    with open(tmp_path / "run" / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FastPPOError, match="is in use by another run"):
            start(command, resume=resume)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.jsonl", "run", "run.lock"]


def test_a_classifier_with_two_labels_starts_no_reward_model(start, tmp_path, folder):
    path = tiny.saved(folder / "two", tiny.classifier(labels=2))
    check_refusal(start, tmp_path, "model.path = .* has 2 labels", "pairs", model__path=path, plan="warn")


@pytest.mark.parametrize("command", ["ppo", "pairs", "answers"])
def test_texts_with_tokens_that_the_model_has_no_embedding_of_are_refused(start, tmp_path, folder, command):
    path = tiny.saved(folder / "few", tiny.causal(vocab_size=50))
    setting = "actor__model" if command == "ppo" else "model__path"
    words = r"data.path: a text contains token \d+ \('.'\), and (actor.model|model.path) = .* of 50 tokens only"
    check_refusal(start, tmp_path, words, command, **{setting: path})
