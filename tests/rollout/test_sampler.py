"""The seam of rollout engines: one of the user's, in one file, drives whole runs, and what it returns is checked."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import whole_runs
from ppo_step import config_of, roles_of

from fastppo.config import Config, PPORolloutConfig, PPOSamplingConfig
from fastppo.config.command_line import parse
from fastppo.config.validation.data import ENGINES as KNOWN_ENGINES
from fastppo.data.batch import Prompts, Rollout
from fastppo.data.packed import pack, pack_turns
from fastppo.distributed.world import start_world
from fastppo.rollout import SamplerError, find_engine
from fastppo.rollout.answers import check_rollout
from fastppo.rollout.engines import ENGINES
from fastppo.rollout.sampler import ActorSampler
from fastppo.train import train

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "sampler.py"

# The example as an engine that notes what is asked of it, by name.
NOTING = """
import json
from pathlib import Path

from plain_loop import PlainLoop

def note(*event):
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(event) + "\\n")

class Noting(PlainLoop):
    def sync(self):
        note("sync")
        super().sync()

    def sample(self, prompts, **settings):
        note("sample", len(prompts), settings["temperature"], settings["seed"])
        return super().sample(prompts, **settings)

class Sleeping(Noting):
    def sleep(self):
        note("sleep")

    def wake(self):
        note("wake")

class Fails:
    def __init__(self, config, roles, stop_ids, world):
        pass

    def sync(self):
        pass

    def sample(self, prompts, *, temperature, seed):
        raise LookupError("no draw")

class FailsAtOnce(Fails):
    def __init__(self, *given):
        raise SystemExit("no engine")

class ReturnsTexts(Fails):
    def sample(self, prompts, *, temperature, seed):
        return ["a text"] * len(prompts)

def returns_nothing(config, roles, stop_ids, world):
    return None

class NeverWakes(Fails):
    def sleep(self):
        pass

class OnlySamples:
    def sample(self, prompts, *, temperature, seed):
        return None
"""


@pytest.fixture
def folder(tmp_path):
    """Of a run and its engine, the only files that make it one."""
    shutil.copy(EXAMPLE, tmp_path / "plain_loop.py")
    (tmp_path / "engine.py").write_text(NOTING)
    return whole_runs.prepare(tmp_path)


@pytest.fixture
def world():
    return start_world(1)


Run = Callable[..., list[str]]


@pytest.fixture
def run(folder, world, monkeypatch):
    """Trains with an engine of the file; what it was asked, in order."""
    for module in ("plain_loop", "engine"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def run(engine: str = "Noting", output: str = "out", **changes: Any) -> list[str]:
        (folder / "engine.jsonl").unlink(missing_ok=True)
        changes = {"optim__dtype": "fp32", "eval__every": 1, "checkpoint__every": 0} | changes
        argv = whole_runs.settings(folder, folder / output, rollout__engine=f"engine.py:{engine}", **changes)
        train(parse(argv), world)
        return [event[0] for event in events(folder)]

    return run


def events(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "engine.jsonl").read_text().splitlines()]


# Whole runs


def test_an_engine_in_one_file_drives_training_and_evaluation_and_is_synced_once_a_change(folder, run):
    """The evaluation after a step and the training step after that sample from the same weights."""
    found = run(steps=3, eval__temperature=0.5, eval__seed=77, sampling__temperature=0.8, seed=5)
    assert found == ["sync", "sample", "sample"] * 3 + ["sync", "sample"]
    asked = [event[1:] for event in events(folder) if event[0] == "sample"]
    assert asked == [[4, 0.5, 77], [8, 0.8, 5]] * 3 + [[4, 0.5, 77]]
    records = whole_runs.records(folder / "out")
    assert max(r["sampler_error"] for r in records if "sampler_error" in r) < 1e-5  # of present weights, by itself
    assert [r["step"] for r in records if "eval/score" in r] == [0, 1, 2, 3]


def test_weights_that_stand_in_for_the_actors_are_a_change_and_so_is_their_end(run):
    """An averaged actor is evaluated beside it."""
    found = run(steps=2, actor__average=0.5)
    first = ["sync", "sample", "sync", "sample"]  # the actor, its average
    assert found == [*first, "sync", "sample", *first, "sync", "sample", *first]


def test_updates_that_are_not_applied_are_no_change(run):
    """While the critic warms up the actor stays as it is."""
    warming = {"critic__warmup_steps": 2, "ppo__minibatches": 1, "ppo__epochs": 1}
    assert run(steps=3, **warming) == ["sync", *["sample"] * 6, "sync", "sample"]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_sleeps_outside_the_phases_that_sample_and_is_synced_after_each_wake(folder, run, monkeypatch, stage):
    whole_runs.move_on_the_cpu_too(monkeypatch)
    (folder / "split.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    changes = {"zero__stage": stage, "zero__deepspeed": folder / "split.json"}
    found = run("Sleeping", steps=2, **changes)
    assert found == ["sleep", *["wake", "sync", "sample", "sleep"] * 5]  # and it does not wake for the export
    assert max(r.get("sampler_error", 0.0) for r in whole_runs.records(folder / "out")) < 1e-5


def test_a_run_on_an_engine_of_the_users_resumes_bit_for_bit(folder, run):
    same = {"optim__schedule": "constant", "checkpoint__every": 1}
    run(steps=3, output="whole", **same)
    run(steps=1, output="parts", **same)
    assert run(steps=3, output="parts", resume="auto", **same)[:2] == ["sync", "sample"]
    assert whole_runs.records(folder / "whole")[-1] == whole_runs.records(folder / "parts")[-1]
    states = [whole_runs.state(folder / output) for output in ("whole", "parts")]
    for state in states:  # the first run of the parts was evaluated at its own end, too
        del state["progress.pt"]["evaluations"], state["progress.pt"]["evaluated"]
    assert whole_runs.same(*states)


# What changes the weights


def test_the_version_of_the_weights_is_another_after_each_change_and_no_other_time(tmp_path, world):
    roles = roles_of(config_of(tiny.saved(tmp_path / "model", tiny.causal()), "--actor.average", "0.9"), world)
    assert roles.average is not None
    seen = [roles.version]

    def step(rates: Sequence[float], *, apply: bool) -> None:
        roles.actor.train()
        loss = roles.actor(pack([(5, 6, 7)], [1]), lambda policy, hidden: policy.head(hidden).square().mean())
        roles.actor.backward(loss, last=True)
        roles.actor.step(rates, apply=apply)

    step([1e-2, 1e-2], apply=False)
    step([0.0, 0.0], apply=True)
    roles.average.update()
    assert roles.version == seen[0]
    step([1e-2, 1e-2], apply=True)
    seen.append(roles.version)
    with roles.average.in_place():
        seen.append(roles.version)
    seen.append(roles.version)
    roles.actor.save(tmp_path, "actor", lambda state, path: torch.save(state, path))
    roles.actor.load(tmp_path, "actor")
    seen.append(roles.version)
    assert len(set(seen)) == len(seen)


class Given:
    """An engine that answers with the rollout that it is made with."""

    def __init__(self, rollout: Rollout):
        self.rollout = rollout

    def sync(self) -> None:
        pass

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        return self.rollout


def test_a_sampler_with_stale_weights_samples_nothing():
    model = SimpleNamespace(config=tiny.causal().config)
    roles: Any = SimpleNamespace(version=0, policy=SimpleNamespace(model=model))
    sampler = ActorSampler("rollout.engine = given", Given(GOOD), roles, Config(), [])
    with pytest.raises(AssertionError, match="sync"):
        sampler.sample(PROMPTS)
    sampler.sync()
    assert sampler.sample(PROMPTS) is GOOD
    roles.version = 1
    with pytest.raises(AssertionError, match="sync"):
        sampler.sample(PROMPTS)


# What an engine returns

PROMPTS = Prompts.of([(5, 6, 7), (8, 9)], [1, 0, 1])
GOOD = Rollout(
    pack([(8, 9, 20, 21), (5, 6, 7, 22), (8, 9, 23)], [2, 1, 1]),
    torch.tensor([-1.0, -2.0, 0.0, -0.5]),
    torch.tensor([True, False, True]),
    torch.tensor([1, 0, 1]),
)


def repacked(*sequences: tuple[int, ...], counts: Sequence[int] = (2, 1, 1)) -> Rollout:
    return replace(GOOD, packed=pack(sequences, counts))


WRONG = {
    "nothing": (None, "NoneType, and not a fastppo.data.Rollout"),
    "tokens of another type": (replace(GOOD, packed=replace(GOOD.packed, tokens=GOOD.packed.tokens.int())), "int64"),
    "logprobs in bf16": (replace(GOOD, logprobs=GOOD.logprobs.bfloat16()), "logprobs with 1 .*bfloat16.*float32"),
    "logprobs in a list": (replace(GOOD, logprobs=[-1.0, -2.0, 0.0, -0.5]), "logprobs of the type list"),
    "logprobs on a grid": (replace(GOOD, logprobs=GOOD.logprobs[None]), r"logprobs with 2 dimension\(s\)"),
    "ended as numbers": (replace(GOOD, ended=torch.zeros(3)), "ended with 1 .*float32.*bool"),
    "a row too few": (
        replace(GOOD, packed=pack([(8, 9, 20, 21), (5, 6, 7, 22)], [2, 1])),
        "2 responses to 3 prompts",
    ),
    "an end too few": (replace(GOOD, ended=GOOD.ended[:2]), "ended of 2 responses to 3 prompts"),
    "a source too many": (replace(GOOD, sources=torch.tensor([1, 0, 1, 0])), "sources of 4 responses"),
    "another source": (replace(GOOD, sources=torch.tensor([1, 1, 1])), "row 1 as the source of response 1"),
    "an empty response": (repacked((8, 9, 20, 21), (5, 6, 7), (8, 9, 23), counts=(2, 0, 1)), "0 tokens as response 1"),
    "a long response": (
        repacked((8, 9, 1, 2, 3, 4), (5, 6, 7, 22), (8, 9, 23), counts=(4, 1, 1)),
        "4 tokens as response 0; .* sampling.max_new_tokens = 3",
    ),
    "half a prompt": (repacked((9, 20, 21), (5, 6, 7, 22), (8, 9, 23)), "3 tokens as sequence 0, whose prompt has 2"),
    "another prompt": (repacked((8, 9, 20, 21), (5, 5, 7, 22), (8, 9, 23)), "sequence 1 that does not begin with its"),
    "tokens left over": (
        replace(GOOD, packed=replace(GOOD.packed, tokens=torch.cat([GOOD.packed.tokens, torch.tensor([1])]))),
        "12 tokens in packed.tokens, of which cu_seqlens counts 11",
    ),
    "starts that begin late": (
        replace(GOOD, packed=replace(GOOD.packed, cu_seqlens=GOOD.packed.cu_seqlens + 1)),
        "cu_seqlens that begins at 1",
    ),
    "a token beyond the vocabulary": (
        repacked((8, 9, 20, 257), (5, 6, 7, 22), (8, 9, 23)),
        "token 257 in response 0, beyond the actor's vocabulary of 257",
    ),
    "a negative token": (repacked((8, 9, 20, 21), (5, 6, 7, 22), (8, 9, -1)), "token -1 in response 2"),
    "a logprob too few": (replace(GOOD, logprobs=GOOD.logprobs[:3]), "3 logprobs for 4 response tokens"),
    "a positive logprob": (
        replace(GOOD, logprobs=torch.tensor([-1.0, -2.0, 0.1, -1.0])),
        r"0\.1\d* as a logprob in response 1; it must be a finite number, at most 0",
    ),
    "NaN": (replace(GOOD, logprobs=torch.tensor([-1.0, torch.nan, 0.0, -1.0])), "nan as a logprob in response 0"),
    "infinity": (
        replace(GOOD, logprobs=torch.tensor([-1.0, -1.0, 0.0, -torch.inf])),
        "-inf as a logprob in response 2",
    ),
}


# The same, with an observation of one token in the first.
TALKED = replace(
    GOOD,
    packed=pack_turns([(8, 9, 20, 30, 21), (5, 6, 7, 22), (8, 9, 23)], [[0, 0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1]]),
    turn_rewards=torch.zeros(4),
)


def remasked(*mask: int) -> Rollout:
    return replace(TALKED, packed=replace(TALKED.packed, mask=torch.tensor(mask, dtype=torch.bool)))


WRONG |= {
    "a mask of numbers": (
        replace(TALKED, packed=replace(TALKED.packed, mask=torch.zeros(12))),
        "packed.mask with 1 .*bool",
    ),
    "a mask too short": (remasked(0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0), "packed.mask of 11 numbers for 12 tokens"),
    "a mask that counts more": (
        remasked(0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1),
        "mask with 3 written tokens in sequence 0, of which response_cu_seqlens counts 2",
    ),
    "an observation at the end": (
        remasked(0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1),
        "a sequence 0 that does not end with a token that the actor wrote",
    ),
    "a prompt that the actor wrote": (
        remasked(0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1),
        "4 tokens as response 0; .* sampling.max_new_tokens = 3",
    ),
    "a mask without rewards": (replace(TALKED, turn_rewards=None), "turn_rewards of the type NoneType"),
    "a turn reward too few": (replace(TALKED, turn_rewards=torch.zeros(3)), "3 turn_rewards for 4 response tokens"),
}


def check(rollout: Any, prompts: Prompts = PROMPTS) -> None:
    check_rollout(rollout, prompts, "rollout.engine = mine.py:Mine", longest=3, vocabulary=257)


@pytest.mark.parametrize(("rollout", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_response_to_each_prompt_is_an_error_that_names_the_engine(rollout, words):
    with pytest.raises(SamplerError, match=f"rollout.engine = mine.py:Mine returned .*{words}"):
        check(rollout)


def test_a_rollout_is_none_the_worse_for_rounding_or_for_having_no_rows():
    check(replace(GOOD, logprobs=torch.tensor([1e-7, -2.0, 0.0, -0.5])))
    check(TALKED)
    none = torch.zeros(0, dtype=torch.int64)
    check(Rollout(pack([], []), torch.zeros(0), none.bool(), none), PROMPTS.select([]))


# Engines that fail, or are not there


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("Fails", r"engine = engine.py:Fails raised LookupError: no draw \(engine.py:\d+\)"),
        ("FailsAtOnce", r"engine = engine.py:FailsAtOnce raised SystemExit: no engine \(engine.py:\d+\)"),
        ("ReturnsTexts", "engine = engine.py:ReturnsTexts returned list, and not a fastppo.data.Rollout"),
        ("returns_nothing", "engine = engine.py:returns_nothing has no sync and no sample"),
    ],
)
def test_an_engine_that_fails_ends_the_run_with_its_name(run, engine, words):
    with pytest.raises(SamplerError, match=words):
        run(engine)


def test_the_examples_engine_refuses_settings_that_it_does_not_know(run):
    with pytest.raises(SamplerError, match=r"Noting raised ValueError: .*leave out sampling.top_p and"):
        run(sampling__top_k=3)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("engine.py:", "write it as module:class or file.py:class"),
        ("nowhere.py:Engine", "nowhere.py could not be imported"),
        ("engine.py:Nothing", "engine.py has no class Nothing; it has: .*Noting"),
        ("engine.py:OnlySamples", "engine.py:OnlySamples has no sync; a sampler has the methods"),
        ("engine.py:NeverWakes", "engine.py:NeverWakes has no wake; .* of its own also sleep and wake"),
    ],
)
def test_an_engine_that_is_none_is_refused_before_a_model_loads(folder, run, world, monkeypatch, engine, words):
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    argv = whole_runs.settings(folder, folder / "out", rollout__engine=engine)
    with pytest.raises(SamplerError, match=words):
        train(parse(argv), world)
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())


def test_the_engines_that_settings_know_are_those_that_there_are():
    assert tuple(ENGINES) == KNOWN_ENGINES


def test_a_config_without_the_group_is_in_process():
    """As those of runs before it are."""
    assert Config().rollout == PPORolloutConfig("inprocess")
    assert find_engine(Config()).folder is None
    assert Config().sampling == PPOSamplingConfig()
