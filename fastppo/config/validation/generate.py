"""Rules about the settings of drawing responses."""

from __future__ import annotations

import math

from fastppo.config.commands.generate import GenerateConfig
from fastppo.config.validation.data import check_prompts, check_rollout, check_sampling
from fastppo.config.validation.models import check_attention
from fastppo.config.validation.ranges import Ranges, check_ranges
from fastppo.config.validation.rewards import check_sources, check_waiting
from fastppo.errors import ConfigError

RANGES: Ranges = (
    ("0 or more", lambda x: 0 <= x < math.inf, "seed data.split_seed sampling.top_k sampling.min_new_tokens"),
    (
        "1 or more",
        lambda x: x >= 1,
        "threads batch_size microbatch_tokens data.first_tokens data.max_prompt_tokens data.limit"
        " sampling.max_new_tokens sampling.samples_per_prompt sampling.rows rollout.max_turns"
        " rollout.turn_tokens rollout.vllm.tensor_parallel_size",
    ),
    ("greater than 0", lambda x: 0 < x < math.inf, "timeout sampling.temperature rollout.time_limit"),
    ("1 to 1000", lambda x: 1 <= x <= 1000, "rollout.concurrency"),
    ("greater than 0 and at most 1", lambda x: 0 < x <= 1, "sampling.top_p rollout.vllm.gpu_memory_utilization"),
)


def validate_generate(config: GenerateConfig, ranks: int = 1) -> None:
    """Raises `ConfigError` for the first rule that the settings break on this many ranks (processes)."""
    check_ranges(config, RANGES)
    if not config.output:
        raise ConfigError(f"output is empty; name a folder for the run, as in --output {type(config).output}.")
    if not config.model.path:
        raise ConfigError(
            "model.path is not set: there is nothing to draw responses from. Give a hub name or a directory, such as"
            " the exported model of a run."
        )
    check_attention(config.attention, config.dtype, "dtype")
    check_sources("rewards", config.rewards)
    check_sources("judge", config.judge)
    check_prompts(config.data)
    data = config.data
    if data.eval_path is not None or data.eval_split != "train":
        given = f"eval_path is {data.eval_path}" if data.eval_path is not None else f"eval_split is {data.eval_split}"
        raise ConfigError(
            f"data.{given}, but this command holds no prompts out: it answers all of data.path. Give the prompts as"
            " data.path and data.split, and leave data.eval_path and data.eval_split out."
        )
    check_sampling(config)
    check_rollout(config, ranks)
    check_waiting(config, ranks)
