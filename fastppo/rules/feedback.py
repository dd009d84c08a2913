"""Rules between the settings of the rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastppo.config import Config, ConfigError, RewardConfig


def check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError(
            "rewards is empty: PPO needs at least one source of reward. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]'."""
        )
    check_sources("rewards", config.rewards)
    if config.ppo.bootstrap_truncated:
        raise ConfigError(
            "ppo.bootstrap_truncated is true, but each of the rewards scores the whole response on its last token."
            " For a response that was cut this asks the value of its last state to be V = score + V, which has no"
            " fixed point at gamma = 1: V grows without end. Set it to false; ppo.truncation_penalty is the way to"
            " treat such responses differently."
        )


def check_sources(where: str, sources: Sequence[RewardConfig]) -> None:
    """Each source alone; where: the setting that they belong to."""
    for i, source in enumerate(sources):
        if (source.function is None) == (source.model is None):
            both = "neither is" if source.function is None else f"function is {source.function}, model {source.model}"
            raise ConfigError(f"{where}[{i}] needs exactly one of function and model; {both} set.")
        if source.function is not None and not all(source.function.rpartition(":")[::2]):
            raise ConfigError(f"{where}[{i}].function is {source.function}; write module:function or file.py:function.")
        if not math.isfinite(source.weight):
            raise ConfigError(f"{where}[{i}].weight is {source.weight}; it must be a finite number.")
