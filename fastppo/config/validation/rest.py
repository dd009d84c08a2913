"""Rules about the settings of ReST."""

from __future__ import annotations

import math
from itertools import pairwise

from fastppo.config.commands.rest import RestConfig
from fastppo.config.validation.data import check_data, check_rollout, check_sampling
from fastppo.config.validation.health import check_health
from fastppo.config.validation.learning import among, check_parallel, check_zero, other_ranks
from fastppo.config.validation.models import check_models
from fastppo.config.validation.ranges import ONLINE_RANGES, Ranges, check_betas, check_ranges, check_train
from fastppo.config.validation.rewards import check_rewards, check_waiting
from fastppo.config.validation.run import check_checkpoints, check_tracking
from fastppo.errors import ConfigError

RANGES: Ranges = (
    ("0 or more", lambda x: 0 <= x < math.inf, "checkpoint.within_step"),
    (
        "1 or more",
        lambda x: x >= 1,
        "grow.prompts grow.batch_size improve.max_per_prompt improve.epochs improve.batch_size"
        " improve.microbatch_tokens mixture.limit",
    ),
    ("2 or more", lambda x: x >= 2, "mixture.max_tokens"),
    ("greater than 0 and at most 1", lambda x: 0 < x <= 1, "improve.lr_factor"),
    ("0 or more and less than 1", lambda x: 0 <= x < 1, "mixture.share"),
)


def validate_rest(config: RestConfig, ranks: int = 1) -> None:
    """Raise `ConfigError` for the first rule that the settings violate. ranks: the number of processes of the run."""
    check_ranges(config, (*ONLINE_RANGES, *RANGES))
    check_betas(config.optim)
    check_train("actor.train", config.actor.train)
    check_models(config)
    check_rewards(config)
    check_data(config)
    check_sampling(config)
    check_rollout(config, ranks)
    _check_sizes(config, check_parallel(config, ranks))
    _check_thresholds(config)
    _check_mixture(config)
    check_zero(config)
    check_checkpoints(config)
    check_tracking(config)
    _check_actions(config)
    check_health(config)
    check_waiting(config, ranks)


def _check_sizes(config: RestConfig, groups: int) -> None:
    size, samples = config.grow.batch_size, config.sampling.samples_per_prompt
    if size % samples:
        raise ConfigError(
            f"grow.batch_size is {size} and sampling.samples_per_prompt {samples}: the responses to a prompt are drawn"
            f" together, and {size} is not a multiple of {samples}. Set batch_size to {size - size % samples + samples}."
        )
    if config.improve.batch_size % groups:
        raise ConfigError(
            f"improve.batch_size is {config.improve.batch_size} and there are {among(config, groups)}, among which the"
            f" responses are divided equally. Set it to a multiple of {groups}, or"
            f" {other_ranks(config.improve.batch_size, groups, config)}."
        )
    if config.improve.keep == "best" and samples == 1:
        raise ConfigError(
            "improve.keep is best and sampling.samples_per_prompt 1: the best of one response is any response, which"
            " teaches nothing. Set samples_per_prompt to 2 or more."
        )


def _check_thresholds(config: RestConfig) -> None:
    improve, given = config.improve, config.improve.thresholds
    shown = None if given is None else list(given)
    if improve.keep == "best":
        if given is not None:
            raise ConfigError(
                f"improve.thresholds is {shown} and improve.keep best, which learns from each prompt's best response"
                " whatever its score. Leave out thresholds, or set keep to quantile or value."
            )
        return
    if not improve.levels:
        raise ConfigError(
            f"improve.keep is {improve.keep} and improve.thresholds {shown}: give a threshold for each Improve, as in"
            " --improve.thresholds '[0, 0.5]'."
        )
    if improve.keep == "quantile" and not all(0 <= level < 1 for level in given or ()):
        raise ConfigError(
            f"improve.thresholds is {shown} and improve.keep quantile: each quantile must be at least 0 and below 1."
            " For scores as thresholds set keep to value."
        )
    if not all(map(math.isfinite, given or ())):
        raise ConfigError(f"improve.thresholds is {shown}; each must be a finite number.")
    if given is not None and any(later <= earlier for earlier, later in pairwise(given)):
        raise ConfigError(
            f"improve.thresholds is {shown}: from one Improve to the next the threshold must rise (Gulcehre et al.,"
            " 2023). Sort them, and give each once."
        )


def _check_mixture(config: RestConfig) -> None:
    mixture, size = config.mixture, config.improve.batch_size
    if mixture.share == 0:
        if mixture.path:
            raise ConfigError(
                f"mixture.path is {mixture.path} but mixture.share is 0, so that its demonstrations would have no"
                " effect. Set mixture.share above 0, or leave out mixture.path."
            )
        return
    if not mixture.path:
        raise ConfigError(
            f"mixture.share is {mixture.share} but mixture.path is not set: give a dataset on the hub, a directory or a"
            " file with demonstrations, or set mixture.share to 0."
        )
    if not 0 < config.demonstrations < size:
        raise ConfigError(
            f"mixture.share is {mixture.share} and improve.batch_size {size}: {config.demonstrations} of {size}"
            " responses in an update would be demonstrations, and both kinds need one. Change one of the two."
        )
    if mixture.max_tokens > config.microbatch_tokens:
        raise ConfigError(
            f"improve.microbatch_tokens is {config.microbatch_tokens}, but one demonstration can have"
            f" {mixture.max_tokens} tokens (mixture.max_tokens) and must fit into one microbatch. Raise"
            " improve.microbatch_tokens, or lower mixture.max_tokens."
        )


def _check_actions(config: RestConfig) -> None:
    for i, alarm in enumerate(config.health.alarms):
        where = f"health.alarms[{i}]"
        if alarm.action not in ("warn", "stop"):
            raise ConfigError(
                f"{where}.action is {alarm.action}, but ReST has no KL penalty to raise and no ratio to stop an epoch"
                " at: after a roll back it would do the same again. Use warn or stop."
            )
        if alarm.figure in ("approx_kl", "kl_exact", "kl_exact_sequence"):
            raise ConfigError(
                f"{where}.figure is {alarm.figure}, which ReST does not compute. Use kl_token or kl_sequence."
            )
