"""Rules about the settings of health figures and alarms."""

from __future__ import annotations

import math

from fastppo.config.commands.online import OnlineConfig
from fastppo.config.commands.ppo import Config
from fastppo.config.health import FIGURES, AlarmConfig
from fastppo.config.validation.rewards import check_sources
from fastppo.errors import ConfigError

SHARES = ("self_bleu", "repetition", "duplicates", "length_correlation", "rewarded_phrase", "effective_samples")


def check_health(config: OnlineConfig) -> None:
    check_sources("health.judge", config.health.judge)
    for i, alarm in enumerate(config.health.alarms):
        _check_level(f"health.alarms[{i}]", alarm)
        _check_alarm(f"health.alarms[{i}]", alarm, config)


def check_kl_alarms(config: Config) -> None:
    """What alarms need of PPO's KL penalty."""
    for i, alarm in enumerate(config.health.alarms):
        where = f"health.alarms[{i}]"
        if alarm.figure.startswith("kl_exact") and not config.exact_kl:
            raise ConfigError(
                f"{where}.figure is {alarm.figure}, but ppo.kl_kind is {config.ppo.kl_kind}: the KL over the whole"
                " vocabulary is not computed. Set kl_kind to exact, or use kl_token or kl_sequence."
            )
        if alarm.action in ("raise_kl", "roll_back") and config.ppo.kl_coef == 0:
            raise ConfigError(
                f"{where}.action is {alarm.action}, which multiplies the KL coefficient, but ppo.kl_coef is 0 and would"
                " stay 0. Give kl_coef a positive value, or set the action to stop."
            )


def _check_level(where: str, alarm: AlarmConfig) -> None:
    figure = FIGURES[alarm.figure]
    if alarm.level is None:
        if alarm.action != "warn":
            raise ConfigError(
                f"{where}.level is null and its action {alarm.action}: the action needs a level. Give one; null is"
                " allowed only with warn, to turn a default warning off."
            )
        return
    allowed, holds = {
        ("lower", "times start"): ("between 0 and 1, a part of the figure's value at the start", 0 < alarm.level < 1),
        ("higher", "times start"): ("above 1, a multiple of the figure's value at the start", alarm.level > 1),
    }.get((figure.worse, figure.level_is), ("above 0", alarm.level > 0))
    if alarm.figure in SHARES:
        allowed, holds = "above 0 and below 1, which is the figure's maximum", 0 < alarm.level < 1
    if not (holds and math.isfinite(alarm.level)):
        raise ConfigError(f"{where}.level is {alarm.level} for {alarm.figure}; it must be {allowed}.")


def _check_alarm(where: str, alarm: AlarmConfig, config: OnlineConfig) -> None:
    health, every = config.health, config.checkpoint.every
    if (alarm.action == "stop_epoch") != (alarm.figure == "approx_kl") and alarm.action != "warn":
        raise ConfigError(
            f"{where} has figure {alarm.figure} and action {alarm.action}: stop_epoch leaves out the remaining updates"
            " of a batch, and only approx_kl is known after each update; the other figures are known once per step. Use"
            " approx_kl with stop_epoch or warn, and the other figures with another action."
        )
    if alarm.figure.startswith("judge") and not health.judge:
        raise ConfigError(
            f"{where}.figure is {alarm.figure}, but health.judge is empty: there are no judge scores. Give a judge,"
            """ as in --health.judge '[{"function": "my_module:my_function"}]'."""
        )
    if alarm.action == "roll_back" and not 0 < every < config.steps:
        raise ConfigError(
            f"{where}.action is roll_back, but with checkpoint.every {every} and {config.steps} steps there is never a"
            f" checkpoint to roll back to. Set checkpoint.every to 1 up to {config.steps - 1}, or the action to stop."
        )
