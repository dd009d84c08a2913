"""Rules between the settings of the rewards."""

from __future__ import annotations

import math
import re
from urllib.parse import urlsplit

from fastppo.config import Config, ConfigError, RewardConfig


def check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError(
            "rewards is empty: PPO needs at least one source of reward. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]'."""
        )
    for i, reward in enumerate(config.rewards):
        _check_kind(i, reward)
        if reward.function is not None and not all(reward.function.rpartition(":")[::2]):
            raise ConfigError(f"rewards[{i}].function is {reward.function}; write module:function or file.py:function.")
        if not math.isfinite(reward.weight):
            raise ConfigError(f"rewards[{i}].weight is {reward.weight}; it must be a finite number.")
    ppo, longest = config.ppo, config.sampling.max_new_tokens
    if ppo.length_limit is None and ppo.length_penalty:
        raise ConfigError(
            f"ppo.length_penalty is {ppo.length_penalty} but ppo.length_limit is not set: there is nothing beyond it to"
            " be penalised. Give length_limit, in tokens."
        )
    if ppo.length_limit is not None and not (ppo.length_penalty and ppo.length_limit < longest):
        raise ConfigError(
            f"ppo.length_limit is {ppo.length_limit}, ppo.length_penalty {ppo.length_penalty} and"
            f" sampling.max_new_tokens {longest}: no response could be penalised. Take a limit below max_new_tokens and"
            " a penalty above 0, or leave out both."
        )
    if ppo.bootstrap_truncated:
        raise ConfigError(
            "ppo.bootstrap_truncated is true, but each of the rewards scores the whole response on its last token."
            " For a response that was cut this asks the value of its last state to be V = score + V, which has no"
            " fixed point at gamma = 1: V grows without end. Set it to false; ppo.truncation_penalty is the way to"
            " treat such responses differently."
        )


KINDS = ("function", "model", "ensemble", "pattern", "url")
OF_URL = ("timeout", "retries", "request_size", "concurrency")


def _check_kind(i: int, reward: RewardConfig) -> None:
    """What one source is, and the settings that belong to that kind alone."""
    given = [kind for kind in KINDS if getattr(reward, kind)]
    if len(given) != 1:
        what = " and ".join(f"{kind} is {getattr(reward, kind)}" for kind in given) or "none is set"
        raise ConfigError(f"rewards[{i}] needs exactly one of {', '.join(KINDS)}; {what}.")
    kind, default = given[0], RewardConfig()
    for names, owner in ((("combine",), "ensemble"), (OF_URL, "url")):
        for name in names:
            value = getattr(reward, name)
            if kind != owner and value != getattr(default, name):
                raise ConfigError(f"rewards[{i}].{name} is {value}, but it belongs to {owner}, and {kind} is set.")
    if kind == "ensemble" and len(reward.ensemble) < 2:
        raise ConfigError(f"rewards[{i}].ensemble has one model, {reward.ensemble[0]}; give two or more, or model.")
    if reward.pattern is not None:
        try:
            re.compile(reward.pattern)
        except re.error as error:
            raise ConfigError(f"rewards[{i}].pattern is {reward.pattern}, no regular expression: {error}.") from None
    if reward.url is not None and urlsplit(reward.url).scheme not in ("http", "https"):
        raise ConfigError(f"rewards[{i}].url is {reward.url}; it must begin with http:// or https://.")
    for name, least in (("timeout", 0.001), ("retries", 0), ("request_size", 1), ("concurrency", 1)):
        if not least <= getattr(reward, name) < math.inf:
            raise ConfigError(f"rewards[{i}].{name} is {getattr(reward, name)}; it must be {least} or more.")
