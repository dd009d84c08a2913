"""Which settings may change when a run is resumed: pinned for every setting of every command."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checkpoint.resume import CheckpointError, _check_fit, settings, versions
from fastppo.config import (
    AnyConfig,
    Config,
    DPOConfig,
    PPOConfig,
    RewardTrainingConfig,
    SamplingConfig,
    SFTConfig,
)
from fastppo.distributed.world import World

WORLD = World(0, 1, torch.device("cpu"))
ANOTHER = "a value that no setting has"

# What comes out does not depend on these, for any of the commands ...
FREE = {
    "attention": "rounding",
    "checkpoint.every": "free",
    "checkpoint.keep_best": "free",
    "checkpoint.keep_last": "free",
    "checkpoint.on_error": "free",
    "model.fused": "rounding",
    "optim.activation_checkpointing": "free",
    "optim.max_skipped": "free",
    "output": "free",
    "plan": "free",
    "resume": "free",
    "threads": "rounding",
    "timeout": "free",
    "track.profile_steps": "free",
    "track.progress": "free",
    "track.responses": "free",
    "track.responses_every": "free",
    "track.tensorboard": "free",
    "track.wandb": "free",
    "zero.deepspeed": "rounding",
    "zero.nvme_path": "free",
    "zero.offload_frozen": "free",
}
# ... and on these for one kind of them.
OF_PPO = FREE | {
    "actor.lora.export": "free",
    "eval.every": "free",
    "eval.show": "free",
    "health.alarms": "free",
    "health.raise_kl": "free",
    "health.roll_backs": "free",
    "health.window": "free",
    "ppo.microbatch_tokens": "rounding",
    "rollout.concurrency": "free",
    "rollout.time_limit": "free",
    "sampling.cuda_graphs": "free",
    "sampling.rows": "rounding",
    "rollout.vllm.tensor_parallel_size": "rounding",
    "rollout.vllm.gpu_memory_utilization": "rounding",
}
OF_OFFLINE_METHODS = FREE | {"keep_trunk_gb": "rounding", "microbatch_tokens": "rounding"}


def outcome(config: AnyConfig, name: str, caplog: pytest.LogCaptureFixture) -> str:
    """What becomes of a checkpoint whose run had another value of one setting."""
    caplog.clear()
    then = settings(config) | {name: [{"model": ANOTHER}] if name in ("rewards", "health.judge") else ANOTHER}
    about: dict[str, Any] = {"ranks": 1, "config": then, "versions": versions()}
    try:
        _check_fit(Path("runs/ppo/checkpoints/step-00000001"), about, config, WORLD)
    except CheckpointError as error:
        return "refused" if name in str(error) and ANOTHER in str(error) else f"refused without its name: {error}"
    return "rounding" if caplog.records else "free"


@pytest.mark.parametrize(
    ("kind", "free"),
    [
        (Config, OF_PPO),
        (RewardTrainingConfig, OF_OFFLINE_METHODS),
        (SFTConfig, OF_OFFLINE_METHODS),
        (DPOConfig, OF_OFFLINE_METHODS | {"chosen_fall": "free"}),
    ],
    ids=["PPO", "reward model", "SFT", "DPO"],
)
def test_a_setting_may_change_if_it_is_listed_here_and_is_refused_by_name_if_not(kind, free, caplog):
    caplog.set_level(logging.WARNING, "fastppo")
    config = kind()
    outcomes = {name: outcome(config, name, caplog) for name in settings(config)}
    assert {name: found for name, found in outcomes.items() if found != "refused"} == free


@pytest.mark.parametrize(
    ("settings_then", "importance", "now"),
    [
        ({}, "auto", None),
        ({"top_p": 0.9}, "none", None),
        ({"top_p": 0.9}, "auto", "token"),
        ({"top_k": 5}, "auto", "token"),
        ({}, "icepop", "icepop"),
    ],
)
def test_a_run_from_before_tokens_had_weights_goes_on_without_or_is_told_how(settings_then, importance, now):
    sampling = SamplingConfig(**settings_then)
    then = {name: x for name, x in settings(Config(sampling=sampling)).items() if "importance" not in name}
    about: dict[str, Any] = {"ranks": 1, "config": then, "versions": versions()}
    resumes = partial(_check_fit, Path("runs/ppo/checkpoints/step-00000001"), about)
    config = Config(sampling=sampling, ppo=PPOConfig(importance=importance))
    if now is None:
        resumes(config, WORLD)
        return
    with pytest.raises(
        CheckpointError, match=f'importance is "{now}", but .* was made with "none".*--ppo.importance "none"'
    ):
        resumes(config, WORLD)


@pytest.mark.parametrize("kind", [Config, RewardTrainingConfig, SFTConfig, DPOConfig])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_from_before_layers_were_fused_goes_on_with_a_warning_or_as_it_was(kind, fused, caplog):
    caplog.set_level(logging.WARNING, "fastppo")
    then = {name: x for name, x in settings(kind()).items() if name != "model.fused"}
    about: dict[str, Any] = {"ranks": 1, "config": then, "versions": versions()}
    config = kind()
    config = replace(config, model=replace(config.model, fused=fused))
    _check_fit(Path("runs/ppo/checkpoints/step-00000001"), about, config, WORLD)
    warning = "model.fused was False and is True: the result will not be the same bit for bit"
    assert [record.getMessage() for record in caplog.records] == ([warning] if fused else [])
