"""Which settings may change when a run is resumed: pinned for every setting of every command."""

import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checkpoint.resume import CheckpointError, _check_fit, settings, versions
from fastppo.checkpoint.run_state import random_state, saved_random_state, seed_random, set_random_state
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
    "zero.offload": "rounding",
    "zero.offload_frozen": "free",
    "zero.offload_optimizer": "rounding",
    "parallel.sequence": "rounding",
    "zero.offload_parameters": "rounding",
    "zero.stage": "rounding",
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


@pytest.mark.parametrize("kind", [Config, RewardTrainingConfig, SFTConfig, DPOConfig])
def test_another_number_of_ranks_or_another_layout_is_logged_with_what_it_means(kind, caplog):
    caplog.set_level(logging.WARNING, "fastppo")
    config = kind()
    about: dict[str, Any] = {"ranks": 4, "config": settings(config), "versions": versions()}
    config = replace(config, zero=replace(config.zero, stage=3, offload="cpu"))
    _check_fit(Path("out/step-00000001"), about, config, WORLD)
    means = "the state is carried over bit for bit, and from there the result is the same within rounding"
    assert [record.getMessage() for record in caplog.records] == [
        f"out/step-00000001 was written by 4 rank(s), and this run has 1: {means}",
        f"zero.offload was none and is cpu: {means}",
        f"zero.stage was 1 and is 3: {means}",
    ]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (2, 4, "those of ranks 2 to 3 begin anew, seeded from (seed 7, step-00000003, rank)"),
        (1, 2, "those of rank 1 begin anew, seeded from (seed 7, step-00000003, rank)"),
        (3, 1, "those of ranks 1 to 2 are dropped"),
        (2, 2, None),
    ],
)
def test_a_rank_keeps_its_random_numbers_and_a_new_one_has_its_own(tmp_path, caplog, then, now, said):
    caplog.set_level(logging.WARNING, "fastppo")
    folder, before = tmp_path / "step-00000003", random_state()
    folder.mkdir()
    drawn: list[float] = []
    for rank in range(then):
        seed_random(1, rank)
        torch.save(random_state(), folder / f"rank-{rank:05d}.pt")
        drawn.append(random.random())
    found = []
    for _ in range(2):  # the rule gives the same each time
        for rank in range(now):
            set_random_state(saved_random_state(folder, then, 7, World(rank, now, torch.device("cpu"))))
            found.append(random.random())
    set_random_state(before)
    assert found[:now] == found[now:] and found[: min(then, now)] == drawn[: min(then, now)]
    assert len({*drawn, *found}) == max(then, now)
    expected = [] if said is None else [f"the random generators that a reward function may use: {said}"] * 2
    assert [record.getMessage() for record in caplog.records] == expected
