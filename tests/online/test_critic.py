"""The critic that a run leaves behind, and what the next run's begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rest_runs
import torch
import whole_runs
from safetensors.torch import load_file
from torch import Tensor
from value_models import own_values, trainer_values

from fastppo import train as ppo
from fastppo import train_rest
from fastppo.config.command_line import REST, parse
from fastppo.data.packed import pack
from fastppo.distributed.world import start_world
from fastppo.models.sampling_weights import SamplingWeights

pytestmark = pytest.mark.slow

PACKED = pack(((5, 6, 7, 8, 9, 10, 11, 12), (9, 10), (11, 12, 13), (1, 2, 3)), [7, 1, 2, 2])
LEARNS = {"critic__lr": 1e-2, "optim__dtype": "fp32"}  # enough in a step for values that differ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("runs"))


def run(folder: Path, output: Path, **changes: Any) -> None:
    ppo.train(parse(whole_runs.settings(folder, output, **changes)), start_world(1))


@pytest.fixture
def values(monkeypatch):
    """The trainer's own, at the end of each run; at stage 3 its engine gathers the weights for them."""
    found: list[Tensor] = []
    finish = ppo.finish

    def asked(setup: Any, tracker: Any) -> None:
        found.append(trainer_values(setup.roles.critic or setup.roles.actor, PACKED))
        finish(setup, tracker)

    monkeypatch.setattr(ppo, "finish", asked)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"zero__stage": 0},
        {"zero__stage": 0, "critic__kind": "shared"},
        {"zero__stage": 1, "optim__dtype": "bf16"},
        {"zero__stage": 3},
        {"zero__stage": 3, "critic__kind": "shared"},
        {"zero__stage": 3, "actor__lora__rank": 2, "critic__lora__rank": 2, "zero__offload": "cpu"},
        {"zero__stage": 3, "actor__lora__rank": 2, "actor__lora__export": "adapters", "critic__kind": "shared"},
    ],
    ids=str,
)
def test_the_critic_that_is_left_has_the_values_of_the_last_step(folder, tmp_path, monkeypatch, values, changes):
    fixed = LEARNS | {"steps": 1, "eval__every": 0} | changes
    run(folder, tmp_path / "run", **fixed)
    bf16 = fixed["optim__dtype"] == "bf16"
    found = own_values(tmp_path / "run/critic", PACKED, torch.bfloat16 if bf16 else torch.float32, upcast=bf16)
    assert len(found.unique()) > 6
    torch.testing.assert_close(found, values[0], rtol=1e-5, atol=2e-2 if bf16 else 1e-5)
    about = json.loads((tmp_path / "run/critic/about.json").read_text())
    assert about["step"] == 1 and about["score"] is not None
    if fixed["zero__stage"] < 3:
        return
    # As with an engine that has weights of its own: a run that only finishes has gathered none to sample from.
    before = load_file(tmp_path / "run/critic/model.safetensors")
    monkeypatch.setattr(SamplingWeights, "gather", lambda self: pytest.fail("the whole actor would be on each GPU"))
    (tmp_path / "run/critic/model.safetensors").unlink()
    run(folder, tmp_path / "run", **fixed, resume="auto")
    after = load_file(tmp_path / "run/critic/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_next_run_begins_with_the_values_of_the_last_one(folder, tmp_path, values):
    run(folder, tmp_path / "first", **LEARNS, steps=1, eval__every=0)
    for stage in (0, 3):
        more = {"critic__model": tmp_path / "first/critic", "actor__lr": 1e-9, "critic__lr": 0, "zero__stage": stage}
        run(folder, tmp_path / f"stage-{stage}", **LEARNS | more, steps=1, eval__every=0)
    for again in values[1:]:
        torch.testing.assert_close(again, values[0], rtol=1e-6, atol=1e-6)


def test_rest_leaves_no_critic(folder, tmp_path):
    train_rest.train(parse(rest_runs.settings(folder, tmp_path / "run", steps=1), REST), start_world(1))
    assert (tmp_path / "run/actor").is_dir() and not list((tmp_path / "run").rglob("critic*"))
