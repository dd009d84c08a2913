"""The allowed values of single settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from fastppo.config.learning import OptimConfig
from fastppo.errors import ConfigError

# The allowed range in words, its test, and the settings that it applies to. A setting that is null is not checked.
# NaN fails every comparison and therefore every test.
Ranges = tuple[tuple[str, Callable[[float], bool], str], ...]

ONLINE_RANGES: Ranges = (
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "seed steps actor.lr actor.lora.rank data.split_seed sampling.top_k sampling.min_new_tokens optim.warmup_steps"
        " optim.weight_decay optim.max_grad_norm optim.max_skipped optim.activation_checkpointing eval.every"
        " eval.prompts eval.seed eval.show track.responses checkpoint.every checkpoint.keep_best health.roll_backs",
    ),
    (
        "1 or more",
        lambda x: x >= 1,
        "threads data.first_tokens data.max_prompt_tokens data.limit sampling.max_new_tokens sampling.samples_per_prompt"
        " sampling.rows rollout.max_turns rollout.turn_tokens rollout.vllm.tensor_parallel_size track.responses_every"
        " checkpoint.keep_last health.window",
    ),
    (
        "greater than 0",
        lambda x: 0 < x < math.inf,
        "sampling.temperature eval.temperature optim.eps timeout rollout.time_limit actor.lora.alpha",
    ),
    ("1 to 1000", lambda x: 1 <= x <= 1000, "rollout.concurrency"),
    ("greater than 1", lambda x: 1 < x < math.inf, "health.raise_kl"),
    ("greater than 0 and less than 1", lambda x: 0 < x < 1, "actor.average"),
    ("greater than 0 and at most 1", lambda x: 0 < x <= 1, "sampling.top_p rollout.vllm.gpu_memory_utilization"),
)


def check_ranges(config: Any, ranges: Ranges) -> None:
    for meaning, holds, names in ranges:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is None or value in ("auto", "adaptive"):  # where a setting may be that, its type says so
                continue
            if not holds(value):
                raise ConfigError(f"{name} is {value}; it must be {meaning}.")


def check_betas(optim: OptimConfig) -> None:
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas is {list(optim.betas)}; each must be at least 0 and less than 1.")


def check_train(name: str, train: int | str) -> None:
    if train == "" or (isinstance(train, int) and train < 1):
        raise ConfigError(f"{name} is {train!r}; give all, a number of upper layers (1 or more) or name patterns.")
