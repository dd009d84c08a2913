"""Whole runs with an environment: what they log, and that they resume where they were, within conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import whole_runs

from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.environments import ConversationError
from fastppo.train import train

pytestmark = pytest.mark.slow

ENVIRONMENTS = """
import os
import random

def answer(conversation, turn, seed, ended):
    draw = random.Random(f"{seed}/{turn}/{conversation[-1]['content']}")
    reward = sum("a" <= c <= "z" for c in conversation[-1]["content"]) / 4
    return (None if draw.random() < 0.3 else "m" * draw.randrange(1, 4)), reward


class Counting:
    def reset(self, *, seed, options):
        self.draw, self.left = random.Random(seed), 3
        return None, {}

    def step(self, action):
        self.left -= 1
        return "left " + str(self.left), self.draw.random(), self.left == 0, False, {}


def fails(conversation, turn, prompt):
    if FAILS_AT and os.environ["RANK"] == "1":
        raise LookupError("no answer")
    return "on", 0.5

FAILS_AT = False
"""

# The last rank is told to stop while the environment has been asked for the nth time and others are decoded.
STOP_WITHIN = """
import os
from fastppo import environments
from fastppo.distributed import stop
from fastppo.environments.conversations import Conversations

ends, count = Conversations.end_turn, iter(range(1, 100_000))

def end_turn(self, i, tokens, logprobs):
    ends(self, i, tokens, logprobs)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and next(count) >= {n}:
        {what}

Conversations.end_turn = end_turn
"""
STOPS, DIES = "stop._watch.asked.set()", "os._exit(9)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("conversations"))
    (folder / "partner.py").write_text(ENVIRONMENTS)
    return folder


def settings(folder: Path, output: Path, environment: str = "answer", **changes: Any) -> list[str]:
    fixed = {
        "rollout__environment": f"{folder}/partner.py:{environment}",
        "rollout__turn_tokens": 5,
        "rollout__max_turns": 4,
        "sampling__max_new_tokens": 24,
        "ppo__minibatches": 1,
        "optim__dtype": "fp32",
    }
    return whole_runs.settings(folder, output, **fixed | changes)


def steps(output: Path) -> list[dict[str, Any]]:
    return [record for record in whole_runs.records(output) if "score" in record]


def test_a_run_learns_from_what_the_environment_gives_alone(folder, tmp_path):
    train(parse(settings(folder, tmp_path / "run", rewards="[]")), start_world(1))
    records = steps(tmp_path / "run")
    assert len(records) == 4 and all(1 < record["turns"] <= 4 and record["observed_tokens"] > 0 for record in records)
    for record in records:
        assert record["score"] == pytest.approx(record["turn_reward"], rel=1e-5)
        assert record["ratio_max"] < 3 and record["sampler_error"] < 1e-3
    assert records[0]["actor_grad_norm"] > 0


@pytest.mark.parametrize(
    ("environment", "ranks"), [("answer", 1), ("answer", 2), ("Counting", 2)], ids=lambda value: str(value)
)
def test_a_run_that_ends_within_conversations_resumes_bit_for_bit(folder, forks, environment, ranks):
    """By a signal, at which it is saved, and by a rank that dies, from its last checkpoint."""
    straight, stopped = (folder / f"{name}-{environment}-{ranks}" for name in ("straight", "stopped"))
    forks.run(settings(folder, straight, environment), ranks)
    argv = settings(folder, stopped, environment, resume="auto")
    forks.run(argv, ranks, STOP_WITHIN.format(n=14, what=STOPS))
    assert whole_runs.checkpoints(stopped)[-1] < "step-00000004"
    killed = forks.start(argv, ranks, STOP_WITHIN.format(n=9, what=DIES))
    assert 9 in forks.wait(killed), killed.text()
    assert whole_runs.checkpoints(stopped)[-1] < "step-00000004"
    forks.run(argv, ranks)
    whole_runs.assert_same_run(straight, stopped)


def test_a_run_whose_environment_fails_on_one_rank_ends_on_both_and_is_saved(folder, forks):
    output = folder / "fails"
    argv = settings(folder, output, "fails", checkpoint__every=0, eval__prompts=0, eval__every=0)
    later = "import partner, fastppo.train as t\nreal = t.ppo_step\ndef step(setup, prompts):\n"
    later += "    partner.FAILS_AT = setup.progress.step == 2\n    return real(setup, prompts)\nt.ppo_step = step"
    before = f"import sys; sys.path.append({str(folder)!r})\n" + later
    failed = forks.start(argv, 2, before)
    statuses, said = forks.wait(failed), failed.text()
    assert 0 not in statuses, said
    assert "partner.py:fails raised LookupError: no answer (partner.py:" in said
    assert "the environment failed at step 2; saving a checkpoint" in said
    assert whole_runs.checkpoints(output) == ["step-00000002"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("nothing", "partner.py has no function nothing"),
        ("fails", None),
    ],
)
def test_what_is_wrong_with_an_environment_is_said_before_models_load(
    folder, tmp_path, monkeypatch, environment, words
):
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    changes = {} if words else {"data__column": "text", "data__path": tmp_path / "texts.jsonl"}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"prompt {i}"}) + "\n" for i in range(9)))
    with pytest.raises(ConversationError, match=words or "has the parameter prompt, which is none of those"):
        train(parse(settings(folder, tmp_path / "run", environment, **changes)), start_world(1))
