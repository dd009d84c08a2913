"""The plan of SFT, reward modelling and DPO: what their one model needs, and a run that does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import stage_runs
import tiny
import torch
from architectures import ACTORS, LLAMA_8B, directory

from fastppo import plan, train_dpo, train_reward, train_sft
from fastppo.config import AnyConfig
from fastppo.config.command_line import DPO, REWARD, SFT, Command, parse
from fastppo.distributed.world import start_world
from fastppo.planner import check
from fastppo.planner.changes import smallest_change
from fastppo.planner.machine import Machine
from fastppo.planner.memory import Bytes
from fastppo.planner.plan import Plan, make_plan

pytestmark = pytest.mark.slow

COMMANDS: dict[str, Command[Any]] = {"pairs": REWARD, "answers": SFT, "dpo": DPO}
SMALL, LARGE = Machine(1, 1, 24 * 10**9, 128 * 10**9), Machine(8, 1, 40 * 10**9, 10**12)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("7b"), *ACTORS["7b"])


def config_of(kind: str, model: str, **changes: Any) -> AnyConfig:
    fixed = {"model.path": model, "data.path": "x.jsonl", "batch_size": 64}
    given = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    config: AnyConfig = parse([part for k, v in given.items() for part in (f"--{k}", str(v))], COMMANDS[kind])
    return config


def held(found: Plan, phase: str = "learning") -> Bytes:
    (places,) = (share.places for share in found.shares if share.phase == phase)
    return places.gpu


@pytest.mark.parametrize("kind", COMMANDS)
def test_zero_and_adapters_take_memory_away(seven_billion, kind):
    fixed = {"optim__activation_checkpointing": "true"}
    whole = make_plan(config_of(kind, seven_billion, **fixed), LARGE)
    assert held(whole).optimizer == pytest.approx(12 * 7.6e9 / 8, rel=0.1)
    split = make_plan(config_of(kind, seven_billion, zero__stage=3, **fixed), LARGE)
    assert held(split).states < held(whole).states / 2.5 and split.fits and not whole.fits
    adapted = make_plan(config_of(kind, seven_billion, model__lora__rank=16, **fixed), LARGE)
    assert held(adapted).optimizer < held(whole).optimizer / 50 and adapted.fits


def test_only_a_language_model_has_logits_and_a_trained_head_alone_no_activations(seven_billion):
    fixed = {"optim__activation_checkpointing": "false"}
    scored, written = (held(make_plan(config_of(kind, seven_billion, **fixed), LARGE)) for kind in ("pairs", "answers"))
    assert written.workspace - scored.workspace > 2 * 8192 * 3584  # of the head: gradients of its states at least
    head = held(make_plan(config_of("pairs", seven_billion, model__train="head", keep_trunk_gb=0, **fixed), LARGE))
    assert head.optimizer == 12 * 3584 // 8 and head.activations < scored.activations / 20


def test_kept_prefixes_are_bounded_by_the_setting_and_by_the_examples_there_can_be(seven_billion):
    def kept(**changes: Any) -> int:
        some, none = (
            held(make_plan(config_of("pairs", seven_billion, model__train="head", **more), LARGE)).buffers
            for more in (changes, changes | {"keep_trunk_gb": 0})
        )
        return some - none

    assert kept(eval__examples=0) == 2 * 10**9
    assert kept(eval__examples=0, steps=1, batch_size=8) == 8 * 2 * 1024 * 3584 * 2
    assert kept(eval__examples=2, data__limit=4) == (4 + 2) * 2 * 1024 * 3584 * 2
    assert kept(zero__stage=3) == 0


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_that_does_not_fit_is_told_what_to_change_in_its_own_settings(tmp_path, capsys, kind):
    command, model = COMMANDS[kind], directory(tmp_path, *ACTORS["1.3b"])
    argv = ["--command", command.name, "--model.path", model, "--data.path", "x.jsonl"]
    machine = ["--gpus", "1", "--gpu-memory", "24GB", "--host-memory", "128GB"]
    with pytest.raises(SystemExit) as stop:
        plan.main([*argv, *machine])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "this run does not fit: " in error
    change = error.partition("The smallest change that fits: ")[2].split()
    assert make_plan(parse([*argv[2:], *change], command), SMALL).fits
    config_of(kind, model, **dict(zip((name[2:] for name in change[::2]), change[1::2], strict=True)))


def test_a_command_is_named_as_it_is_typed_or_as_its_script_is(seven_billion, capsys):
    argv = ["--model.path", seven_billion, "--data.path", "x.jsonl", "--gpus", "8", "--gpu-memory", "400GB"]
    shown = []
    for name in ("reward", "train_reward", "sft", "train_sft"):
        plan.main(["--command", name, *argv, "--host-memory", "1TB"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2] == shown[3]
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--command", "rewards", *argv])
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("kind", COMMANDS)
def test_training_is_refused_before_the_model_loads(tmp_path, monkeypatch, capsys, kind):
    """There is a config and no weights; the message of loading them would be another."""
    tiny.causal().config.save_pretrained(tmp_path / "model")
    argv = stage_runs.settings(tmp_path, kind, plan="check")
    train: Any = {"pairs": train_reward, "answers": train_sft, "dpo": train_dpo}[kind].train
    monkeypatch.setattr(check, "this_machine", lambda *args, **kwargs: Machine(1, 1, None, 2 * 10**8))
    with pytest.raises(check.PlanError, match=r"host memory are needed .*--plan warn"):
        train(parse(argv, COMMANDS[kind]), start_world(1))
    assert "evaluation" in capsys.readouterr().out


def test_a_run_that_fits_goes_through_with_its_plan_shown(tmp_path, capsys):
    folder = stage_runs.prepare(tmp_path)
    argv = stage_runs.settings(folder, "pairs", plan="check", steps=1, eval__examples=4)
    train_reward.train(parse(argv, REWARD), start_world(1))
    assert re.search(r"host: [\d.]+ of [\d.]+ GB, fits", capsys.readouterr().out)
    assert (folder / "out/reward_model/model.safetensors").is_file()


def test_the_plan_begins_from_a_reward_model_as_training_does(tmp_path):
    classifier = tiny.classifier()
    found = make_plan(config_of("pairs", tiny.saved(tmp_path, classifier), optim__dtype="fp32"), LARGE)
    assert held(found).weights == sum(p.numel() * p.element_size() for p in classifier.parameters())
    assert classifier.dtype == torch.float32


def test_a_reference_of_its_own_has_a_phase_of_its_own(seven_billion):
    fixed = {"optim__activation_checkpointing": "true", "zero__stage": 3}
    alone, both = (
        make_plan(config_of("dpo", seven_billion, **fixed, **more), LARGE)
        for more in ({}, {"reference__model": seven_billion})
    )
    assert {share.phase for share in both.shares} == {"reference", "learning", "evaluation"}
    for phase in ("learning", "evaluation"):
        assert held(both, phase) == held(alone, phase)
    asked = held(both, "reference")
    largest = 152064 * 3584 * 2  # bytes of the module that is whole
    assert asked.weights == pytest.approx(2 * 7.6e9 / 8 + largest, rel=0.02)
    assert asked.gradients == asked.optimizer == 0 < asked.activations
    whole = make_plan(config_of("dpo", seven_billion, reference__model=seven_billion, zero__stage=2), LARGE)
    assert held(whole, "reference").weights == pytest.approx(2 * 7.6e9, rel=0.02)


def test_a_large_reference_that_does_not_fit_is_moved_to_the_host(tmp_path, seven_billion):
    small = directory(tmp_path, *ACTORS["1.3b"])
    config = config_of("dpo", small, reference__model=seven_billion, model__lora__rank=8)
    plan = make_plan(config, Machine(1, 1, 17 * 10**9, 10**12))
    assert plan.peak[0] == "reference" and not plan.fits
    assert smallest_change(plan) == {"zero.stage": 3, "zero.offload_frozen": "cpu"}


def test_the_preset_of_dpo_fits_the_machine_it_is_for_also_with_another_reference(tmp_path, capsys):
    model = directory(tmp_path, "llama", LLAMA_8B)
    argv = ["--command", "dpo", "--config", "8b-dpo", "--model.path", model]
    machine = ["--gpus", "8", "--gpu-memory", "80GB", "--host-memory", "1TB"]
    plan.main([*argv, *machine])
    assert "GPU: 67.3 of 75.0 GB, fits" in (shown := capsys.readouterr().out) and "highest in learning" in shown
    plan.main([*argv, *machine, "--reference.model", model])
    assert "GPU: 67.3 of 75.0 GB, fits" in capsys.readouterr().out
