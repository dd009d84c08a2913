"""Rules about the settings of the rewards."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastppo.config.commands.generate import GenerateConfig
from fastppo.config.commands.online import OnlineConfig
from fastppo.config.commands.ppo import Config
from fastppo.config.rewards import (
    FIRST_WAIT,
    LONGEST_WAIT,
    MOST_VERIFIERS,
    SERVICE_SETTINGS,
    TIME_LIMIT,
    RewardConfig,
)
from fastppo.errors import ConfigError


def check_rewards(config: OnlineConfig) -> None:
    if not config.rewards and config.rollout.environment is None:
        raise ConfigError(
            "rewards is empty: at least one source of reward is needed. Give one, as in"
            """ --rewards '[{"function": "my_module:my_function"}]', or a rollout.environment that rewards turns."""
        )
    check_sources("rewards", config.rewards)


def check_shaping(config: Config) -> None:
    """What PPO makes of a score."""
    ppo, longest = config.ppo, config.sampling.max_new_tokens
    if ppo.length_limit is None and ppo.length_penalty:
        raise ConfigError(
            f"ppo.length_penalty is {ppo.length_penalty} but ppo.length_limit, beyond which it applies, is not set."
            " Give length_limit, in tokens."
        )
    if ppo.length_limit is not None and not (ppo.length_penalty and ppo.length_limit < longest):
        raise ConfigError(
            f"ppo.length_limit is {ppo.length_limit}, ppo.length_penalty {ppo.length_penalty} and"
            f" sampling.max_new_tokens {longest}: no response could be penalised. Set a limit below max_new_tokens and"
            " a penalty above 0, or leave out both."
        )
    if ppo.bootstrap_truncated:
        raise ConfigError(
            "ppo.bootstrap_truncated is true, but each of the rewards gives the score of a response to its last token."
            " The value target of the last state of a truncated response would be V = score + V, which has no fixed"
            " point at gamma = 1: V would grow without limit. Set it to false; to treat truncated responses"
            " differently, use ppo.truncation_penalty."
        )


KINDS = ("function", "model", "ensemble", "pattern", "math", "url")
LARGEST_WEIGHT = (2 - 2**-23) * 2.0**127  # the largest number in fp32


def check_sources(where: str, sources: Sequence[RewardConfig]) -> None:
    """Check each source separately. where: the setting that contains them."""
    for i, source in enumerate(sources):
        name = f"{where}[{i}]"
        _check_kind(name, source)
        if source.function is not None and not all(source.function.rpartition(":")[::2]):
            raise ConfigError(f"{name}.function is {source.function}; write module:function or file.py:function.")
        if not abs(source.weight) <= LARGEST_WEIGHT:
            raise ConfigError(f"{name}.weight is {source.weight}; it must be within the range of fp32.")
    if sources and not any(source.weight for source in sources):
        raise ConfigError(f"{where} all have weight 0: every score would be 0. Give at least one another weight.")


def _check_kind(where: str, source: RewardConfig) -> None:
    """Check that a source has exactly one kind, and only the settings of that kind."""
    given = [kind for kind in KINDS if getattr(source, kind)]
    if len(given) != 1:
        what = " and ".join(f"{kind} is {getattr(source, kind)}" for kind in given) or "none is set"
        raise ConfigError(f"{where} needs exactly one of {', '.join(KINDS)}; {what}.")
    kind, default = given[0], RewardConfig()
    for names, owner in ((("combine",), "ensemble"), (("time_limit",), "math"), (SERVICE_SETTINGS, "url")):
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
            raise ConfigError(f"{where}.pattern is {source.pattern}, not a regular expression: {error}.") from None
    if source.url is not None:
        _check_url(f"{where}.url", source.url)
    for name, (least, most) in (*SERVICE_SETTINGS.items(), ("time_limit", TIME_LIMIT)):
        if not least <= getattr(source, name) <= most:
            range_ = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise ConfigError(f"{where}.{name} is {getattr(source, name)}; it must be {range_}.")


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise ConfigError(f"{name} is {url}, which is not a URL: {error}.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{name} is {url}; it must start with http:// or https:// and contain a host name.")


def check_waiting(config: OnlineConfig | GenerateConfig, ranks: int) -> None:
    """Check that no source takes longer than the ranks wait for each other (`timeout`): a service for all attempts of
    one request, the comparison of answers for a batch in which none can be compared."""
    groups = (("rewards", config.rewards), (config.judge_setting, config.judge)) if ranks > 1 else ()
    for name, source in ((f"{where}[{i}]", source) for where, group in groups for i, source in enumerate(group)):
        if source.url is not None:
            _check_service_time(name, source, config.timeout)
        if source.math is not None:
            processes = min(MOST_VERIFIERS, config.threads or MOST_VERIFIERS)
            _check_math_time(name, source, config.timeout, math.ceil(config.drawn_together / ranks / processes))


def _check_service_time(name: str, source: RewardConfig, timeout: float) -> None:
    pauses = sum(min(FIRST_WAIT * 2**n, LONGEST_WAIT) for n in range(source.retries))
    longest = source.timeout * (source.retries + 1) + pauses
    if longest >= timeout:
        raise ConfigError(
            f"{name}.timeout is {source.timeout:g} and {name}.retries {source.retries}: one request may take"
            f" {longest:g} s with its retries and pauses, but the other ranks wait only timeout = "
            f"{timeout:g} s. Raise timeout above {longest:g}, or lower one of these."
        )


def _check_math_time(name: str, source: RewardConfig, timeout: float, answers: int) -> None:
    """answers: the most that one process of a rank compares in a batch."""
    longest = answers * source.time_limit
    if longest >= timeout:
        raise ConfigError(
            f"{name}.time_limit is {source.time_limit:g}: a rank may take {longest:g} s for a batch, {answers} answers"
            f" in each of its processes, but the other ranks wait only timeout = {timeout:g} s. Raise timeout above"
            f" {longest:g}, or lower time_limit."
        )
