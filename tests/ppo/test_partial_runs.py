"""Whole runs with `rollout.partial_tokens`: what they learn from, how they weight it, and that they resume where they
were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from ppo_step import config_of

from fastppo import train as train_module
from fastppo.config.command_line import parse
from fastppo.data.batch import Experience
from fastppo.distributed.world import start_world
from fastppo.environments import ConversationError
from fastppo.online import StepResponses
from fastppo.ppo.importance import importance_weights
from fastppo.ppo.run import set_up
from fastppo.rollout import ActorSampler
from fastppo.train import train

PARTNER = """
def partner(conversation, turn, seed):
    if (sum(map(ord, conversation[-1]["content"])) + seed) % 4 == 0:
        return None, 0.5
    return "say" + str(turn), turn / 4

class Keeps:
    def reset(self, seed, options):
        return "", {}

    def step(self, action):
        return "", 0.0, True, False, {}
"""

# Told to stop when a step that goes on has sampled its nth round; on the last rank alone.
STOP_BETWEEN = """
import os
from fastppo.distributed import stop
from fastppo.online import partial_rollouts

go_on, count = partial_rollouts.StepResponses._go_on, iter(range(1, 1000))

def going_on(self, sampler):
    go_on(self, sampler)
    if next(count) == {n} and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        stop._watch.asked.set()

partial_rollouts.StepResponses._go_on = going_on
"""

SETTINGS: dict[str, Any] = {
    "ppo__batch_size": 4,
    "ppo__minibatches": 1,
    "optim__dtype": "fp32",
    "sampling__max_new_tokens": 12,
    "rollout__partial_tokens": 3,
    "eval__prompts": 2,
}
TALKING: dict[str, Any] = {"rollout__max_turns": 3, "rollout__turn_tokens": 5, "sampling__max_new_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("partial"))
    (folder / "partner.py").write_text(PARTNER)
    return folder


def settings(folder: Path, output: Path, *, talks: bool = False, **changes: Any) -> list[str]:
    talking = TALKING | {"rollout__environment": f"{folder}/partner.py:partner"} if talks else {}
    return whole_runs.settings(folder, output, **SETTINGS | talking | changes)


def odd(folder: Path) -> str:
    """Sources of reward that score 1 or 0."""
    (folder / "odd.py").write_text("def odd(responses, **columns):\n    return [len(r) % 2 for r in responses]\n")
    return json.dumps([{"function": f"{folder}/odd.py:odd"}])


def run(folder: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of each step."""
    assert train(parse(settings(folder, output, **changes)), start_world(1))
    return [record for record in whole_runs.records(output) if "score" in record]


@pytest.mark.parametrize("talks", [False, True], ids=["alone", "talking"])
def test_a_run_that_goes_on_from_what_was_in_flight_is_the_same_bit_for_bit(folder, tmp_path, talks):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    records = run(folder, straight, talks=talks, checkpoint__keep_last=9, eval__every=0)
    assert all(record["in_flight"] for record in records) and records[1]["earlier_tokens"] > 0
    shutil.copytree(straight, resumed)
    for name in whole_runs.checkpoints(resumed):
        if name > "step-00000002":
            shutil.rmtree(resumed / "checkpoints" / name)
    saved = whole_runs.state(resumed)["progress.pt"]
    assert saved["step"] == 2 and any(not one["complete"] for one in saved["in_flight"])
    assert any(one["begun"]["conversation"] for one in saved["in_flight"]) == talks
    run(folder, resumed, talks=talks, checkpoint__keep_last=9, eval__every=0, resume="auto")
    whole_runs.assert_same_run(straight, resumed)


def test_tokens_of_earlier_policies_are_weighted_and_those_of_the_present_one_are_not(folder, tmp_path, monkeypatch):
    steps: list[tuple[Experience, torch.Tensor]] = []  # with (M,) bool, whether an earlier step wrote a token
    made: list[StepResponses] = []
    build, compute = StepResponses.__init__, train_module.compute_experience

    def building(self, *arguments):
        build(self, *arguments)
        made.append(self)

    def computing(scored, *arguments):
        experience = compute(scored, *arguments)
        responses = made[-1]
        earlier = [i < responses._earlier.get(one.stream, 0) for one in responses._taken for i in range(one.written)]
        steps.append((experience, torch.tensor(earlier)))
        return experience

    monkeypatch.setattr(StepResponses, "__init__", building)
    monkeypatch.setattr(train_module, "compute_experience", computing)
    arguments = settings(folder, tmp_path / "run", actor__lr=2e-2, steps=4, eval__prompts=0, eval__every=0)
    config = parse(arguments)
    assert config.importance.kind == "token"
    assert train(config, start_world(1))
    assert not steps[0][1].any() and sum(int(earlier.sum()) for _, earlier in steps) > 20
    for experience, earlier in steps:
        weights = importance_weights(experience, config.importance)
        rho = (experience.old_logprobs - experience.sampler_logprobs).exp()
        torch.testing.assert_close(weights, rho.clamp(max=2.0))
        assert (rho[~earlier] - 1).abs().amax() < 1e-4
        assert not earlier.any() or (rho[earlier] - 1).abs().mean() > 1e-2
    records = [record for record in whole_runs.records(tmp_path / "run") if "score" in record]
    for record, (_, earlier) in zip(records, steps, strict=True):
        assert record["earlier_tokens"] == pytest.approx(float(earlier.float().mean()))
        assert record["epoch1/approx_kl"] < 1e-8  # the ratio of the first update is 1, whoever wrote the tokens
    assert max(record["sampler_error"] for record in records) > 1e-2


def test_with_a_policy_that_stays_the_sampler_is_the_trainer_and_evaluations_are_whole(
    folder, tmp_path, monkeypatch, caplog
):
    evaluated, sample = [], ActorSampler.sample

    def recording(self, prompts, *, temperature=None, seed=None):
        if seed is not None:
            evaluated.append(prompts.extend_by)
        return sample(self, prompts, temperature=temperature, seed=seed)

    monkeypatch.setattr(ActorSampler, "sample", recording)
    with caplog.at_level("INFO", logger="fastppo"):
        records = run(folder, tmp_path / "run", actor__lr=0, steps=3)
    assert max(record["sampler_error_max"] for record in records) < 1e-4
    assert max(record["earlier_tokens"] for record in records) > 0
    assert len(evaluated) >= 2 and {*evaluated} == {None}
    said = "\n".join(caplog.messages)
    assert "ppo.importance auto is token, for rollout.partial_tokens 3" in said
    assert "rollout.partial_tokens 3: tokens of a response may come from the policies of several steps" in said
    assert "not on seed, prompt and sample alone" in said


def test_dynamic_sampling_draws_on_from_what_is_in_flight(folder, tmp_path):
    grouped = {"ppo__estimator": "rloo", "sampling__samples_per_prompt": 2, "sampling__until_informative": 4}
    records = run(folder, tmp_path / "run", rewards=odd(folder), **grouped)
    assert max(record["batches_drawn"] for record in records) > 1
    assert all(record["in_flight"] <= 4 for record in records)
    progress = whole_runs.state(tmp_path / "run")["progress.pt"]
    scored = sum(record["batches_drawn"] for record in records)
    assert progress["batches"] * 4 == scored * 4 + len(progress["in_flight"])
    assert progress["moments"]["count"] == scored * 4


def test_a_class_as_environment_is_refused_before_anything_loads(folder):
    config = config_of(
        *(str(folder / "none"), "--rollout.partial_tokens", "3"),
        *("--rollout.environment", f"{folder}/partner.py:Keeps"),
    )
    with pytest.raises(
        ConversationError, match=r"Keeps, a class, and rollout.partial_tokens is 3.*Give a function"
    ) as error:
        set_up(config, start_world(1))
    assert "leave out rollout.partial_tokens." in str(error.value)


@pytest.mark.slow
def test_a_run_on_two_ranks_that_stops_between_rounds_and_in_learning_resumes_bit_for_bit(folder, forks):
    ranks, straight, stopped = 2, folder / "straight", folder / "stopped"
    forks.run(settings(folder, straight, talks=True, steps=5), ranks)
    argv = settings(folder, stopped, talks=True, steps=5, resume="auto")
    places = (
        STOP_BETWEEN.format(n=2),
        whole_runs.STOP_IN_LEARNING.format(n=1),
        whole_runs.STOP_AT.format(kind="check_alone", n=12),
        whole_runs.STOP_IN_LEARNING.format(n=3),
        STOP_BETWEEN.format(n=2),
    )
    newest = []
    for place in places:
        forks.run(argv, ranks, place)
        newest.append(whole_runs.checkpoints(stopped)[-1])
    assert max(newest) < "step-00000005" and sum("-update-" in name for name in newest) >= 2, newest
    forks.run(argv, ranks)
    whole_runs.assert_same_run(straight, stopped)


@pytest.mark.slow
def test_two_ranks_learn_from_what_one_does(folder, forks):
    outputs = [folder / f"ranks-{ranks}" for ranks in (1, 2)]
    rewards = odd(folder)  # without random numbers, of which each rank has its own
    for ranks, output in enumerate(outputs, start=1):
        forks.run(settings(folder, output, talks=True, steps=4, rewards=rewards), ranks)
    one, two = ([r for r in whole_runs.records(output) if "score" in r] for output in outputs)
    for name in ("sampling_rounds", "in_flight", "tokens_sampled", "earlier_tokens", "response_length"):
        assert [r[name] for r in one] == [r[name] for r in two], name
    for name in ("score", "policy_loss", "kl", "actor_grad_norm"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=2e-2, abs=1e-3)
