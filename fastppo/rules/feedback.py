"""Rules between the settings of the rewards."""

from __future__ import annotations

import math

from fastppo.config import Config, ConfigError


def check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError(
            "rewards is empty: PPO needs at least one source of reward. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]'."""
        )
    for i, reward in enumerate(config.rewards):
        if (reward.function is None) == (reward.model is None):
            both = "neither is" if reward.function is None else f"function is {reward.function}, model {reward.model}"
            raise ConfigError(f"rewards[{i}] needs exactly one of function and model; {both} set.")
        if reward.function is not None and not all(reward.function.rpartition(":")[::2]):
            raise ConfigError(f"rewards[{i}].function is {reward.function}; write module:function or file.py:function.")
        if not math.isfinite(reward.weight):
            raise ConfigError(f"rewards[{i}].weight is {reward.weight}; it must be a finite number.")
    if config.ppo.bootstrap_truncated:
        raise ConfigError(
            "ppo.bootstrap_truncated is true, but each of the rewards scores the whole response on its last token."
            " For a response that was cut this asks the value of its last state to be V = score + V, which has no"
            " fixed point at gamma = 1: V grows without end. Set it to false; ppo.truncation_penalty is the way to"
            " treat such responses differently."
        )
