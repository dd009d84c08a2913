"""What the plan says, and what training makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from architectures import RECIPES, preset

from fastppo import plan
from fastppo.config import Config
from fastppo.config.command_line import parse
from fastppo.distributed.world import World
from fastppo.models.loading.policies import load_causal
from fastppo.models.roles import ModelError
from fastppo.planner import check
from fastppo.planner.machine import Machine, parse_bytes
from fastppo.planner.plan import make_plan, measured_roles

REWARDS = '[{"function": "a:b"}]'
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def settings(tmp_path):
    model = tiny.saved(tmp_path / "model", tiny.causal())
    return ["--actor.model", model, "--rewards", REWARDS, "--data.path", "x.jsonl", "--ppo.microbatch_tokens", "4096"]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = 0
    try:
        plan.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_that_fits_is_shown_role_by_role_and_stage_by_phase(settings, capsys):
    code, out, _ = run([*settings, "--gpus", "2", "--gpu-memory", "80GB", "--host-memory", "1TB"], capsys)
    assert code == 0
    for word in ("actor", "critic", "reference", "sampling", "feedback", "experience", "learning", "NVMe", "fits"):
        assert word in out


def test_the_models_of_the_judge_are_counted_as_those_of_the_reward(settings, tmp_path):
    model = tiny.saved(tmp_path / "reward", tiny.classifier())
    judge = f'[{{"ensemble": ["{model}", "{model}"]}}, {{"function": "a:b"}}]'
    config = parse([*settings, "--rewards", f'[{{"model": "{model}"}}]', "--health.judge", judge])
    found = {member.name: member.size.parameters for member in measured_roles(config, cpu=True)}
    names = [member.name for member in measured_roles(config, cpu=True)]
    assert names == ["actor", "critic", "reference", "reward 1", "judge 1", "judge 1"]
    assert found["judge 1"] == found["reward 1"] > 0


@pytest.mark.slow
def test_a_run_that_does_not_fit_exits_with_1_and_names_flags_that_make_it_fit(tmp_path, capsys):
    argv = [*preset(tmp_path, "1.3b"), "--zero.offload_optimizer", "none"]
    machine = ["--gpus", "1", "--gpu-memory", "24GB", "--host-memory", "128GB"]
    code, _, err = run([*argv, *machine], capsys)
    assert code == 1
    assert "does not fit" in err and "GPU memory" in err
    change = err.partition("The smallest change that fits: ")[2].split()
    assert change == ["--zero.offload_optimizer", "cpu"]
    assert make_plan(parse([*argv, *change]), Machine(1, 1, 24 * 10**9, 128 * 10**9)).fits


def test_gathered_weights_that_are_too_large_for_a_gpu_are_named(tmp_path, capsys):
    """Where nodes have one GPU each there is none beside it to split them with vLLM."""
    machine = ["--gpus", "1", "--nodes", "16", "--gpu-memory", "80GB", "--host-memory", "2TB"]
    inside = ["--rollout.engine", "inprocess", "--rollout.vllm.tensor_parallel_size", "1"]
    code, _, err = run([*preset(tmp_path, "70b"), *inside, *machine], capsys)
    assert code == 1
    assert "whole on each GPU to sample from, take 138.0 GB" in err and "GPUs with more memory" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "host"),
    [
        *[("1.3b", 1, 24, 128), ("7b", 8, 40, 1000), ("13b", 8, 80, 1000), ("34b", 8, 80, 2000)],
        *[("tldr-1b", 1, 80, 128), ("gsm8k-ppo", 1, 24, 128), ("gsm8k-grpo", 1, 24, 128), ("gsm8k-vapo", 1, 80, 128)],
    ],
)
def test_a_preset_fits_the_machine_it_is_for(tmp_path, name, gpus, gpu, host):
    config = parse(preset(tmp_path, name), ranks=gpus)
    made = make_plan(config, Machine(gpus, 1, gpu * 10**9, host * 10**9))
    assert made.fits
    if name in RECIPES:
        needed, there = (f"{size / 1e9:.1f}" for size in made.needs["GPU"])
        again = next(line for line in made.choices if "activation_checkpointing" in line).split(": ")[1].split(",")[0]
        [row] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` | {gpu} GB | ")]
        assert f"| {needed} of {there} GB | {made.peak[0]} | {again} |" in row
        assert ("reference" in row) == ("reference during feedback" in "".join(made.choices))


@pytest.mark.slow
def test_the_preset_of_rest_fits_the_machine_it_is_for(tmp_path, capsys):
    machine = ["--gpus", "8", "--gpu-memory", "80GB", "--host-memory", "1TB"]
    code, out, _ = run(["--command", "rest", *preset(tmp_path, "8b-rest"), *machine], capsys)
    assert code == 0 and "critic" not in out and "highest in learning" in out, out


def test_with_adapters_there_is_no_reference(settings):
    names = [m.name for m in measured_roles(parse([*settings, "--actor.lora.rank", "8"]), cpu=True)]
    assert names == ["actor", "critic"]


@pytest.mark.slow
def test_training_is_refused_where_it_cannot_fit(settings, monkeypatch, capsys):
    monkeypatch.setattr(check, "this_machine", lambda *args, **kwargs: Machine(1, 1, None, 2 * 10**8))
    config = parse(settings)
    with pytest.raises(check.PlanError, match=r"does not fit.*--plan warn"):
        check.check_plan(config, ALONE)
    assert "learning" in capsys.readouterr().out
    check.check_plan(replace(config, plan="warn"), ALONE)
    assert "does not fit" in capsys.readouterr().out
    check.check_plan(replace(config, plan="off"), ALONE)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_not_there_gives_the_message_of_loading_it(tmp_path):
    config = Config()
    missing = replace(config, actor=replace(config.actor, model=str(tmp_path)))
    with pytest.raises(ModelError) as planned:
        check.check_plan(missing, ALONE)
    with pytest.raises(ModelError) as loaded:
        load_causal("actor.model", str(tmp_path), None, None, torch.float32, torch.device("cpu"))
    assert str(planned.value) == str(loaded.value)


def test_amounts_of_memory():
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("1.5TiB") == 3 * 2**39 and parse_bytes("7") == 7
