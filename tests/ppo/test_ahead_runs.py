"""Whole runs with `ppo.steps_ahead` 1: which policy samples what, what runs beside learning, errors, stops, and that a
run resumes where it was."""

from __future__ import annotations

import importlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from ahead_runs import settings
from services import eventually, lengths, service

from fastppo import train as train_module
from fastppo.config.command_line import parse
from fastppo.distributed import Stopped, stop
from fastppo.distributed.world import start_world
from fastppo.online import FeedbackAhead, steps_ahead
from fastppo.ppo.importance import importance_weights
from fastppo.ppo.run import PPOSetup
from fastppo.rewards import RewardError
from fastppo.rollout import ActorSampler
from fastppo.train import train

# Functions and coroutine functions that draw random numbers and fail where a file says so.
BROKEN = """
import random
from pathlib import Path

def scores(prompts, responses):
    if (Path(__file__).parent / "broken").exists() and "prompt" in prompts[0]:
        raise ValueError("no more of this")
    return [len(r) / 8 + random.random() / 10 for r in responses]
"""


PARTNER = """
def partner(conversation, turn, seed):
    if (sum(map(ord, conversation[-1]["content"])) + seed) % 4 == 0:
        return None, 0.5
    return "say" + str(turn), turn / 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("ahead"))
    (folder / "broken.py").write_text(BROKEN)
    (folder / "partner.py").write_text(PARTNER)
    return folder


def run(folder: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of each step."""
    assert train(parse(settings(folder, output, **changes)), start_world(1))
    return [record for record in whole_runs.records(output) if "score" in record]


def test_a_batch_is_sampled_by_the_policy_before_the_update_that_comes_before_it(folder, tmp_path, monkeypatch):
    sampled: dict[int, torch.Tensor] = {}  # by the number of a batch, a weight of the policy that sampled it
    learned: list[torch.Tensor] = []  # by step, the same weight before its update
    steps = []
    sample, compute, updates = ActorSampler.sample, train_module.compute_experience, train_module.run_updates
    here: list[PPOSetup] = []

    def weight() -> torch.Tensor:
        return next(p for p in here[0].roles.policy.parameters() if p.requires_grad).detach().clone()

    def sampling(self, prompts, *, temperature=None, seed=None):
        if seed is None:
            sampled[int(prompts.streams[0]) // 4] = weight()
        return sample(self, prompts, temperature=temperature, seed=seed)

    def computing(scored, *arguments):
        steps.append(compute(scored, *arguments))
        return steps[-1]

    def updating(*arguments, **done):
        learned.append(weight())
        yield from updates(*arguments, **done)

    go_on = PPOSetup.go_on
    monkeypatch.setattr(PPOSetup, "go_on", lambda self: here.append(self) or go_on(self))
    monkeypatch.setattr(ActorSampler, "sample", sampling)
    monkeypatch.setattr(train_module, "compute_experience", computing)
    monkeypatch.setattr(train_module, "run_updates", updating)
    config = parse(settings(folder, tmp_path / "run", steps=4))
    assert config.importance.kind == "token" and train(config, start_world(1))

    assert sorted(sampled) == [0, 1, 2, 3]  # the last step samples nothing
    assert torch.equal(sampled[0], learned[0])
    for step in range(3):
        assert torch.equal(sampled[step + 1], learned[step]) and not torch.equal(sampled[step + 1], learned[step + 1])
    records = [record for record in whole_runs.records(tmp_path / "run") if "score" in record]
    for step, (experience, record) in enumerate(zip(steps, records, strict=True)):
        rho = (experience.old_logprobs - experience.sampler_logprobs).exp()
        assert ((rho - 1).abs().max() < 1e-4) == (step == 0)
        torch.testing.assert_close(importance_weights(experience, config.importance), rho.clamp(max=2.0))
        k3 = (rho.double() - 1 - rho.double().log()).mean()
        assert record["sampler_kl"] == record["health/sampler_kl"] == pytest.approx(float(k3), abs=1e-7)
        assert record["epoch1/approx_kl"] < 1e-8  # the ratio of the first update is 1, whoever sampled
    assert records[1]["sampler_error"] > 1e-2


def test_functions_score_while_the_trainer_learns(folder, tmp_path, monkeypatch):
    """Learning waits until the next batch is being scored, and the score comes when learning has ended."""
    begun, learned, threads = threading.Semaphore(0), threading.Semaphore(1), []
    module = folder / "waits.py"
    module.write_text(
        "hook = None\n\n\ndef scores(prompts, responses):\n    hook()\n    return [len(r) / 8 for r in responses]\n"
    )
    updates = train_module.run_updates

    def scoring():
        threads.append(threading.current_thread())
        begun.release()
        assert learned.acquire(timeout=60), "nothing was learned while this function ran"

    def updating(experience, plan, cache, context, done):
        for _ in range(2 if context.step == 0 else 1 if context.step < 3 else 0):  # batches that were begun by now
            assert begun.acquire(timeout=60), "no function scores the next batch while this step learns"
        yield from updates(experience, plan, cache, context, done=done)
        learned.release()

    real = importlib.import_module("fastppo.rewards.functions.function").import_user_code

    def importing(name, setting, *, error):
        function, where = real(name, setting, error=error)
        function.__globals__["hook"] = scoring
        return function, where

    monkeypatch.setattr("fastppo.rewards.functions.function.import_user_code", importing)
    monkeypatch.setattr(train_module, "run_updates", updating)
    source = json.dumps([{"function": f"{module}:scores"}])
    run(folder, tmp_path / "run", rewards=source, steps=4, eval__prompts=0, eval__every=0)
    assert len(threads) == 4 and threading.main_thread() not in threads


def test_with_nothing_ahead_a_step_is_sampled_scored_and_learned_from_in_this_order(folder, tmp_path, monkeypatch):
    events = []
    for name in ("score", "compute_experience", "run_updates"):
        real = getattr(train_module, name)
        monkeypatch.setattr(
            train_module, name, lambda *a, _real=real, _name=name, **k: events.append(_name) or _real(*a, **k)
        )
    sample = ActorSampler.sample
    monkeypatch.setattr(ActorSampler, "sample", lambda *a, **k: events.append("sample") or sample(*a, **k))
    records = run(folder, tmp_path / "run", ppo__steps_ahead=0, steps=2, eval__prompts=0, eval__every=0)
    assert events == ["sample", "score", "compute_experience", "run_updates"] * 2
    assert all(record["sampler_error_max"] < 1e-4 for record in records)
    assert whole_runs.state(tmp_path / "run")["progress.pt"]["ahead"] is None


def cut(straight: Path, resumed: Path, step: int) -> dict[str, Any]:
    """A copy of a run as if it had ended after `step` steps, and what its checkpoint has."""
    shutil.copytree(straight, resumed)
    for name in whole_runs.checkpoints(resumed):
        if name > f"step-{step:08d}":
            shutil.rmtree(resumed / "checkpoints" / name)
    return whole_runs.state(resumed)["progress.pt"]


PARTIAL: dict[str, Any] = {"rollout__partial_tokens": 2}
TALKING: dict[str, Any] = {"rollout__max_turns": 3, "rollout__turn_tokens": 5, "sampling__max_new_tokens": 24}


@pytest.mark.parametrize("talks", [False, True], ids=["alone", "talking"])
@pytest.mark.parametrize("more", [{}, PARTIAL], ids=["whole", "partial"])
def test_a_run_that_goes_on_from_what_was_ahead_is_the_same_bit_for_bit(folder, tmp_path, more, talks):
    """With functions that draw random numbers, and an evaluation by them between the batch's feedback and its step."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    talking = TALKING | {"rollout__environment": f"{folder}/partner.py:partner"} if talks else {}
    run(folder, straight, checkpoint__keep_last=9, **more, **talking)
    saved = cut(straight, resumed, 2)
    assert saved["step"] == 2 and len(saved["ahead"]["rollout"]["ended"]) == 4 and saved["experience"] is None
    assert bool(saved["ahead"]["continued"]) == bool(more)
    run(folder, resumed, checkpoint__keep_last=9, resume="auto", **more, **talking)
    whole_runs.assert_same_run(straight, resumed)


def test_a_run_that_is_stopped_while_it_learns_goes_on_the_same_bit_for_bit(folder, tmp_path, monkeypatch):
    straight, stopped, updates = tmp_path / "straight", tmp_path / "stopped", train_module.run_updates
    run(folder, straight)

    def updating(experience, plan, cache, context, done):
        for update in updates(experience, plan, cache, context, done=done):
            yield update
            if context.step == 1:
                stop._watch.asked.set()

    monkeypatch.setattr(train_module, "run_updates", updating)
    with pytest.raises(Stopped):
        run(folder, stopped, checkpoint__every=0)
    assert whole_runs.checkpoints(stopped) == ["step-00000001-update-0001"]
    monkeypatch.setattr(train_module, "run_updates", updates)
    run(folder, stopped, checkpoint__every=0, resume="auto")
    assert whole_runs.records(straight) == whole_runs.records(stopped)
    assert (straight / "samples.jsonl").read_text() == (stopped / "samples.jsonl").read_text()


def test_a_run_does_not_resume_with_other_steps_ahead(folder, tmp_path):
    run(folder, tmp_path / "run", steps=2, optim__schedule="constant")
    changed = settings(folder, tmp_path / "run", steps=3, optim__schedule="constant", ppo__steps_ahead=0, resume="auto")
    with pytest.raises(Exception, match=r"ppo.steps_ahead is 0, but .* was made with 1. Resume with"):
        train(parse(changed), start_world(1))


def test_an_error_of_a_function_is_raised_by_the_step_that_needs_it_and_costs_the_run_nothing(
    folder, tmp_path, monkeypatch
):
    straight, broken, source = tmp_path / "straight", tmp_path / "broken", f"{folder}/broken.py:scores"
    rewards = json.dumps([{"function": source}])
    run(folder, straight, rewards=rewards)
    updates = train_module.run_updates

    def updating(experience, plan, cache, context, done):
        yield from updates(experience, plan, cache, context, done=done)
        if context.step == 1:
            (folder / "broken").touch()  # the batch of step 3 is scored, that of step 4 will not be

    monkeypatch.setattr(train_module, "run_updates", updating)
    with pytest.raises(RewardError, match=r"scores raised ValueError: no more of this \(broken.py:7\)"):
        run(folder, broken, rewards=rewards, checkpoint__every=0)
    assert whole_runs.checkpoints(broken)[-1] in ("step-00000002", "step-00000003")
    (folder / "broken").unlink()
    monkeypatch.setattr(train_module, "run_updates", updates)
    run(folder, broken, rewards=rewards, checkpoint__every=0, resume="auto")
    assert whole_runs.records(straight) == whole_runs.records(broken)


def test_a_run_that_is_told_to_stop_does_not_wait_for_a_service(folder, tmp_path, monkeypatch):
    answers, left, takes = threading.Event(), [], iter(range(1, 9))
    take = FeedbackAhead.take

    def answer(body):
        if len(asked) == 3:  # the batch of step 3, while step 2 learns
            answers.wait(600)
        return lengths(body)

    def taking(self):
        if next(takes) == 3:
            eventually(lambda: len(asked) == 3)
            stop._watch.asked.set()
        return take(self)

    monkeypatch.setattr(steps_ahead, "GRACE", 0.1)
    monkeypatch.setattr(steps_ahead, "leave_without_cleanup", lambda: left.append(True))
    monkeypatch.setattr(FeedbackAhead, "take", taking)
    try:
        with service(answer) as (url, asked):
            rewards = json.dumps([{"url": url, "timeout": 600}])
            with pytest.raises(Stopped):
                run(folder, tmp_path / "run", rewards=rewards, eval__prompts=0, eval__every=0)
            assert not answers.is_set() and left == [True]
            answers.set()
    finally:
        answers.set()
    saved = whole_runs.state(tmp_path / "run")["progress.pt"]
    assert saved["ahead"] is not None and saved["step"] == 2


CHANGES = """
import torch
torch.set_float32_matmul_precision({precision!r})

def scores(responses):
    {more}
    return [0.0 for r in responses]
"""


@pytest.mark.parametrize(
    ("precision", "more", "named"),
    [
        ("highest", "torch.set_default_dtype(torch.float64)", "default dtype"),
        ("medium", "torch.set_grad_enabled(False)", "precision of fp32 products"),
    ],
)
def test_a_function_that_changes_what_threads_share_is_refused(folder, tmp_path, precision, more, named):
    (tmp_path / "changes.py").write_text(CHANGES.format(precision=precision, more=more))
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with pytest.raises(RewardError) as error:
        run(folder, tmp_path / "run", rewards=json.dumps([{"function": f"{tmp_path}/changes.py:scores"}]))
    assert f"changes.py:scores changes what all threads share ({named})" in str(error.value)
    assert "set ppo.steps_ahead to 0." in str(error.value)
    assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == before and torch.is_grad_enabled()


ENGINE = """
import threading
from fastppo.rollout.inprocess import InProcess, make_inprocess

beside = []

class Another(InProcess):
    def sync(self):
        beside.append(any(thread.name == "fastppo-feedback" for thread in threading.enumerate()))
        super().sync()

def make(config, roles, stop_ids, world):
    sampler = make_inprocess(config, roles, stop_ids, world)
    sampler.__class__ = Another
    return sampler
"""


def test_another_engine_takes_the_actors_weights_while_nothing_is_scored(folder, tmp_path, monkeypatch):
    """It may set what threads share meanwhile, as vLLM does with the default dtype."""
    (tmp_path / "engine.py").write_text(ENGINE)
    begin, made = steps_ahead.ask, []

    def asking(*arguments):
        made.append(threading.current_thread().name)
        time.sleep(0.2)  # so that a sampler that does not wait finds the thread there
        return begin(*arguments)

    monkeypatch.setattr(steps_ahead, "ask", asking)
    engine, found = f"{tmp_path}/engine.py:make", []
    monkeypatch.setattr(PPOSetup, "go_on", lambda self, real=PPOSetup.go_on: found.append(self) or real(self))
    records = run(folder, tmp_path / "run", rollout__engine=engine, eval__prompts=0, eval__every=0)
    beside = type(found[0].sampler._engine).sync.__globals__["beside"]
    assert made == ["fastppo-feedback"] * 4 and len(records) == 4 and beside == [False] * len(beside) and beside


def test_a_run_says_what_it_learns_from(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="fastppo"):
        run(folder, tmp_path / "one", steps=1)
        run(folder, tmp_path / "other", steps=1, ppo__importance="none")
    said = [record for record in caplog.records if "ppo.steps_ahead 1: a batch" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO", "WARNING"]
    assert "ppo.importance is token, so it is learned from weighted for that" in said[0].getMessage()
    assert "as if the policy that learns had sampled it" in said[1].getMessage()
