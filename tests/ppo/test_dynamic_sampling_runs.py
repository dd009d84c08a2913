"""Whole runs with `sampling.until_informative`: what they draw, how they end, and that they resume where they were."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import whole_runs

from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.rollout import ActorSampler
from fastppo.train import train

pytestmark = pytest.mark.slow

REWARDS = """
import random

def rare(responses, **columns):  # half of the groups are all 0
    return [sum("a" <= c <= "z" for c in response) >= 2 for response in responses]

def lucky(responses, **columns):  # by Python's own random numbers: a step that is repeated must draw them again
    return [random.random() < 0.1 for response in responses]

def never(responses, **columns):
    return [1 for _ in responses]
"""

# Told to stop when the nth batch is scored after which a step draws another one; on the last rank alone.
STOP_BETWEEN = """
import os
from fastppo.distributed import stop
from fastppo.online import dynamic_sampling

add, count = dynamic_sampling.Draws.add, iter(range(1, 1000))

def adding(self, scored):
    add(self, scored)
    if not self.done and next(count) == {n} and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        stop._watch.asked.set()

dynamic_sampling.Draws.add = adding
"""

# From step 5 on distinct-2 is 0.1, until the run has rolled back.
ILL = """
from fastppo import train
from fastppo.monitor import health

watched, figures = train.watch, health.figures

def watch(experience, updates, kept, config, tokenizer):
    ill = kept.steps + 1 >= 5 and not kept.roll_backs
    health.figures = lambda e, **k: figures(e, **k) | ({"distinct_2": 0.1} if ill else {})
    return watched(experience, updates, kept, config, tokenizer)

train.watch = watch
"""

SETTINGS: dict[str, Any] = {
    "ppo__estimator": "rloo",
    "sampling__samples_per_prompt": 4,
    "optim__dtype": "fp32",
    "ppo__minibatches": 1,
    "sampling__until_informative": 6,
}
COUNTS = ("batches_drawn", "groups_drawn", "groups_dropped_uninformative", "groups_dropped_surplus")
COUNTS += ("groups_kept_uninformative", "tokens_drawn", "score_drawn")
GROUPS, SAMPLES = 2, 4  # of a batch, of a group


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("dynamic"))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings(folder: Path, output: Path, reward: str = "rare", **changes: Any) -> list[str]:
    rewards = json.dumps([{"function": f"{folder}/rewards.py:{reward}"}])
    return whole_runs.settings(folder, output, **SETTINGS | {"rewards": rewards} | changes)


@pytest.fixture
def drawn(monkeypatch):
    """The random streams of each call of the sampler in training."""
    calls: list[list[int]] = []
    sample = ActorSampler.sample

    def recording(self, prompts, *, temperature=None, seed=None):
        if seed is None:  # an evaluation has its own
            calls.append(prompts.streams.tolist())
        return sample(self, prompts, temperature=temperature, seed=seed)

    monkeypatch.setattr(ActorSampler, "sample", recording)
    return calls


def run(folder: Path, output: Path, reward: str = "rare", **changes: Any) -> list[dict[str, Any]]:
    """The metrics of each step."""
    train(parse(settings(folder, output, reward, **changes)), start_world(1))
    return steps(output)


def steps(output: Path) -> list[dict[str, Any]]:
    return [record for record in whole_runs.records(output) if "score" in record]


def test_a_step_draws_on_until_its_groups_are_informative_and_no_random_stream_is_used_twice(folder, tmp_path, drawn):
    records = run(folder, tmp_path / "run", steps=6, ppo__score_normalise="true")
    assert records[0]["batches_drawn"] == 1 and max(record["batches_drawn"] for record in records) > 2
    for record in records:
        assert record["groups_kept_uninformative"] == 0 and record["score_std"] > 0
        assert record["groups_drawn"] == GROUPS * record["batches_drawn"]
        dropped = record["groups_dropped_uninformative"] + record["groups_dropped_surplus"]
        assert record["groups_drawn"] == GROUPS + dropped
        learned = record["response_length"] * GROUPS * SAMPLES
        assert record["tokens_drawn"] >= learned and (record["tokens_drawn"] == learned) == (dropped == 0)
    assert any(record["groups_dropped_surplus"] for record in records)
    assert any(record["score"] > record["score_drawn"] for record in records)

    batches = sum(int(record["batches_drawn"]) for record in records)
    assert drawn == [list(range(i * GROUPS * SAMPLES, (i + 1) * GROUPS * SAMPLES)) for i in range(batches)]
    progress = whole_runs.state(tmp_path / "run")["progress.pt"]
    assert progress["batches"] == batches and progress["drawn"] is None
    assert progress["moments"]["count"] == batches * GROUPS * SAMPLES  # of all scores, those of dropped groups too


@pytest.mark.parametrize(("reward", "most"), [("never", 2), ("rare", 3)])
def test_at_the_bound_a_step_learns_from_what_it_has_and_says_so(folder, tmp_path, caplog, reward, most):
    with caplog.at_level("INFO", logger="fastppo"):
        records = run(folder, tmp_path / "run", reward, steps=6, sampling__until_informative=most)
    bound = [record for record in records if record["groups_kept_uninformative"]]
    assert bound and all(record["batches_drawn"] == most for record in bound)
    assert len(bound) == 6 if reward == "never" else len(bound) < 6
    said = [message for message in caplog.messages if "sampling.until_informative" in message]
    for record, message in zip(bound, said, strict=True):
        kept, dropped = record["groups_kept_uninformative"], record["groups_dropped_uninformative"]
        informative = record["groups_drawn"] - kept - dropped
        assert informative + kept == GROUPS and record["groups_dropped_surplus"] == 0
        counts = f"only {informative:.0f} of {record['groups_drawn']:.0f} groups differ after {most} batches"
        assert message.startswith(f"step {record['step']}: ") and counts in message
        assert f"{kept:.0f} groups of equal scores fill the batch up" in message


def test_where_every_group_is_informative_the_run_is_the_one_without_the_setting(folder, tmp_path):
    letters = json.dumps([{"function": f"{folder}/reward.py:letters"}])
    changes = {"rewards": letters, "ppo__score_normalise": "true"}
    run(folder, tmp_path / "plain", **changes, sampling__until_informative="null")
    assert {record["batches_drawn"] for record in run(folder, tmp_path / "dynamic", **changes)} == {1}
    plain, dynamic = (whole_runs.records(tmp_path / name) for name in ("plain", "dynamic"))
    assert [{k: v for k, v in record.items() if k not in COUNTS} for record in dynamic] == plain
    assert whole_runs.same(whole_runs.state(tmp_path / "plain"), whole_runs.state(tmp_path / "dynamic"))
    for name in ("responses.jsonl", "samples.jsonl"):
        assert (tmp_path / "plain" / name).read_text() == (tmp_path / "dynamic" / name).read_text()


def test_a_step_of_several_batches_is_the_same_where_states_move_between_its_phases(folder, tmp_path, monkeypatch):
    small = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}
    (tmp_path / "split.json").write_text(json.dumps({"zero_optimization": small}))
    changes = {"zero__stage": 3, "zero__deepspeed": tmp_path / "split.json"}
    stays = run(folder, tmp_path / "stays", **changes)
    moved = whole_runs.move_on_the_cpu_too(monkeypatch)
    moves = run(folder, tmp_path / "moves", **changes)
    assert {"optimizers", "reference", "sampling_weights"} <= moved and max(r["batches_drawn"] for r in moves) > 1
    assert stays == moves


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_stops_between_the_batches_of_a_step_and_in_learning_resumes_bit_for_bit(folder, forks, ranks):
    straight, stopped = folder / f"straight-{ranks}", folder / f"stopped-{ranks}"
    forks.run(settings(folder, straight, "lucky", steps=5), ranks)
    records = steps(straight)
    assert sum(record["batches_drawn"] for record in records) > 7

    argv = settings(folder, stopped, "lucky", steps=5, resume="auto")
    places = (
        STOP_BETWEEN.format(n=1),
        whole_runs.STOP_AT.format(kind="check", n=10),
        STOP_BETWEEN.format(n=2),
        whole_runs.STOP_AT.format(kind="check_alone", n=5),
        whole_runs.STOP_AT.format(kind="check", n=6),
    )
    newest = []
    for place in places:
        forks.run(argv, ranks, place)
        newest.append(whole_runs.checkpoints(stopped)[-1])
    assert max(newest) < "step-00000005" and "-update-" not in newest[0] + newest[2], newest
    assert any("-update-" in name for name in newest), newest
    forks.run(argv, ranks)
    whole_runs.assert_same_run(straight, stopped)


def test_two_ranks_draw_and_learn_what_one_does(folder, forks):
    outputs = [folder / f"ranks-{ranks}" for ranks in (1, 2)]
    for ranks, output in enumerate(outputs, start=1):
        forks.run(settings(folder, output, steps=5), ranks)
    one, two = map(steps, outputs)
    assert [[r[name] for name in COUNTS] for r in one] == [[r[name] for name in COUNTS] for r in two]
    for name in ("score", "policy_loss", "kl", "response_length", "actor_grad_norm"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-3, abs=1e-5)


def test_a_run_that_rolls_back_draws_again_from_where_it_was(folder, forks):
    output = folder / "rolled"
    rule = json.dumps([{"figure": "distinct_2", "level": 0.6, "action": "roll_back"}])
    argv = settings(
        folder, output, steps=7, health__alarms=rule, checkpoint__keep_last=4, eval__prompts=0, eval__every=0
    )
    forked = forks.start(argv, 1, ILL)
    assert forks.wait(forked) == [0], forked.text()
    assert "step-00000004, with a KL coefficient" in forked.text()
    first, second = re.findall(r"step 5/7  (score .*?  KL \S+)", forked.text())
    assert first == second  # of the same prompts, with the same random numbers
    records = steps(output)
    assert [record["step"] for record in records] == list(range(1, 8))
    batches = whole_runs.state(output)["progress.pt"]["batches"]
    assert batches == sum(record["batches_drawn"] for record in records) > 7
