"""Rules between the settings of the rewards."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastppo.config.ppo import Config
from fastppo.config.rewards import FIRST_WAIT, LONGEST_WAIT, OF_URL, RewardConfig
from fastppo.errors import ConfigError


def check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ConfigError(
            "rewards is empty: PPO needs at least one source of reward. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]'."""
        )
    check_sources("rewards", config.rewards)
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
LARGEST_WEIGHT = (2 - 2**-23) * 2.0**127  # fp32 holds no larger number


def check_sources(where: str, sources: Sequence[RewardConfig]) -> None:
    """Each source alone; where: the setting that they belong to."""
    for i, source in enumerate(sources):
        name = f"{where}[{i}]"
        _check_kind(name, source)
        if source.function is not None and not all(source.function.rpartition(":")[::2]):
            raise ConfigError(f"{name}.function is {source.function}; write module:function or file.py:function.")
        if not abs(source.weight) <= LARGEST_WEIGHT:
            raise ConfigError(f"{name}.weight is {source.weight}; it must be a number that fp32 holds.")
    if sources and not any(source.weight for source in sources):
        raise ConfigError(f"{where} all have weight 0: every score would be 0. Give one of them another weight.")


def _check_kind(where: str, source: RewardConfig) -> None:
    """What one source is, and the settings that belong to that kind alone."""
    given = [kind for kind in KINDS if getattr(source, kind)]
    if len(given) != 1:
        what = " and ".join(f"{kind} is {getattr(source, kind)}" for kind in given) or "none is set"
        raise ConfigError(f"{where} needs exactly one of {', '.join(KINDS)}; {what}.")
    kind, default = given[0], RewardConfig()
    for names, owner in ((("combine",), "ensemble"), (OF_URL, "url")):
        for name in names:
            value = getattr(source, name)
            if kind != owner and value != getattr(default, name):
                raise ConfigError(f"{where}.{name} is {value}, but it belongs to {owner}, and {kind} is set.")
    if kind == "ensemble" and len(source.ensemble) < 2:
        raise ConfigError(f"{where}.ensemble has one model, {source.ensemble[0]}; give two or more, or model.")
    if source.pattern is not None:
        try:
            re.compile(source.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}.pattern is {source.pattern}, no regular expression: {error}.") from None
    if source.url is not None:
        _check_url(f"{where}.url", source.url)
    for name, (least, most) in OF_URL.items():
        if not least <= getattr(source, name) <= most:
            range_ = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise ConfigError(f"{where}.{name} is {getattr(source, name)}; it must be {range_}.")


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # which is looked at here
    except ValueError as error:
        raise ConfigError(f"{name} is {url}, which is no address: {error}.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{name} is {url}; it must begin with http:// or https:// and name a host.")


def check_waiting(config: Config, ranks: int) -> None:
    """All tries of one request together; a rank that waits for them longer than the others wait for it loses them."""
    groups = (("rewards", config.rewards), ("health.judge", config.health.judge))
    for name, source in ((f"{where}[{i}]", source) for where, group in groups for i, source in enumerate(group)):
        pauses = sum(min(FIRST_WAIT * 2**n, LONGEST_WAIT) for n in range(source.retries))
        longest = source.timeout * (source.retries + 1) + pauses
        if ranks > 1 and source.url is not None and longest >= config.timeout:
            raise ConfigError(
                f"{name}.timeout is {source.timeout:g} and {name}.retries {source.retries}: one request may take"
                f" {longest:g} s with its pauses, but timeout is {config.timeout:g}, and then the other ranks give up."
                f" Raise timeout above {longest:g}, or lower one of these."
            )
