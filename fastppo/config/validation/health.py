"""Rules between the settings of health."""

from __future__ import annotations

import math

from fastppo.config.health import FIGURES, AlarmConfig
from fastppo.config.ppo import Config
from fastppo.config.validation.rewards import check_sources
from fastppo.errors import ConfigError

SHARES = ("self_bleu", "repetition", "duplicates", "length_correlation", "rewarded_phrase")


def check_health(config: Config) -> None:
    check_sources("health.judge", config.health.judge)
    for i, alarm in enumerate(config.health.alarms):
        _check_level(f"health.alarms[{i}]", alarm)
        _check_alarm(f"health.alarms[{i}]", alarm, config)


def _check_level(where: str, alarm: AlarmConfig) -> None:
    figure = FIGURES[alarm.figure]
    if alarm.level is None:
        if alarm.action != "warn":
            raise ConfigError(
                f"{where}.level is null and its action {alarm.action}: there is nothing to act on. Give a level; null"
                " is for warn alone, to take a standing warning away."
            )
        return
    allowed, holds = {
        ("lower", "times start"): ("between 0 and 1, a part of what the figure was at the start", 0 < alarm.level < 1),
        ("higher", "times start"): ("above 1, a multiple of what the figure was at the start", alarm.level > 1),
    }.get((figure.worse, figure.level_is), ("above 0", alarm.level > 0))
    if alarm.figure in SHARES:
        allowed, holds = "above 0 and below 1, beyond which the figure cannot go", 0 < alarm.level < 1
    if not (holds and math.isfinite(alarm.level)):
        raise ConfigError(f"{where}.level is {alarm.level} for {alarm.figure}; it must be {allowed}.")


def _check_alarm(where: str, alarm: AlarmConfig, config: Config) -> None:
    health, every = config.health, config.checkpoint.every
    if (alarm.action == "stop_epoch") != (alarm.figure == "approx_kl") and alarm.action != "warn":
        raise ConfigError(
            f"{where} has figure {alarm.figure} and action {alarm.action}: approx_kl is known after each update and"
            " stop_epoch ends the learning from a batch there, so each goes with the other or with warn. The rest of"
            " the figures are known once a step."
        )
    if alarm.figure.startswith("judge") and not health.judge:
        raise ConfigError(
            f"{where}.figure is {alarm.figure}, but health.judge is empty: nothing judges the responses. Give a judge,"
            """ as in --health.judge '[{"function": "my_module:my_function"}]'."""
        )
    if alarm.figure.startswith("kl_exact") and config.ppo.kl_kind != "exact":
        raise ConfigError(
            f"{where}.figure is {alarm.figure}, but ppo.kl_kind is {config.ppo.kl_kind}: the KL over the whole"
            " vocabulary is not computed. Set kl_kind to exact, or watch kl_token or kl_sequence."
        )
    if alarm.action in ("raise_kl", "roll_back") and config.ppo.kl_coef == 0:
        raise ConfigError(
            f"{where}.action is {alarm.action}, which multiplies the KL coefficient, but ppo.kl_coef is 0 and would"
            " stay 0. Give kl_coef a positive value, or let the action be stop."
        )
    if alarm.action == "roll_back" and not 0 < every < config.steps:
        raise ConfigError(
            f"{where}.action is roll_back, but with checkpoint.every {every} and {config.steps} steps there is never a"
            f" checkpoint to go back to. Set checkpoint.every to 1 up to {config.steps - 1}, or let the action be stop."
        )
