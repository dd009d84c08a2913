"""The sources of reward that a config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config, RewardConfig
from fastppo.engine import Frozen
from fastppo.feedback.function import function_source
from fastppo.feedback.model import ModelSource, ensemble
from fastppo.feedback.pattern import pattern_source
from fastppo.feedback.remote import remote_source
from fastppo.feedback.responses import Source
from fastppo.load import frozen_partitions, load_reward
from fastppo.residency import Residency
from fastppo.weights import DTYPES
from fastppo.world import World

log = logging.getLogger("fastppo")


def load_functions(rewards: Sequence[RewardConfig], where: str = "rewards") -> None:
    """Import the Python functions among the sources. Done before any model loads, so a typo costs no minutes.

    where: the setting that the sources belong to, for errors.
    """
    for reward in rewards:
        if reward.function is not None:
            function_source(reward.function, where)


def load_sources(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """Every source of the config with its weight, in order; tokenizer: the actor's."""
    return [(_load(r, "rewards", config, tokenizer, world, residency), r.weight) for r in config.rewards]


def load_judge(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """The sources of the held-out judge with their weights, in order; none if there is no judge."""
    if world.rank == 0:
        for twin in shared_sources(config):
            log.warning(
                "health.judge and rewards both have %s: a judge that is the reward itself rises with it and cannot tell"
                " when the reward is exploited. Judge by another model or function.",
                twin,
            )
    return [(_load(r, "health.judge", config, tokenizer, world, residency), r.weight) for r in config.health.judge]


def shared_sources(config: Config) -> list[str]:
    """What stands both in `rewards` and in `health.judge`; a model by where it is, however the path is written."""
    rewards, judges = ([name for r in group for name in _names(r)] for group in (config.rewards, config.health.judge))
    return [name for name in dict.fromkeys(judges) if name in rewards]


def _names(reward: RewardConfig) -> list[str]:
    models = [name for name in (reward.model, *reward.ensemble) if name is not None]
    where = [str(Path(name).resolve()) if Path(name).exists() else name for name in models]
    others = (reward.function, reward.pattern, reward.url)
    return [*where, *(name for name in others if name is not None)]


def _load(
    reward: RewardConfig,
    where: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    residency: Residency,
) -> Source:
    """where: the setting that the source belongs to, for errors."""
    if reward.function is not None:
        return function_source(reward.function, where)
    if reward.pattern is not None:
        return pattern_source(reward.pattern, where)
    if reward.url is not None:
        return remote_source(reward, where)

    def model(name: str, setting: str) -> Source:
        dtype = DTYPES[config.optim.dtype]
        loaded, theirs = load_reward(name, dtype, world.device, frozen_partitions(config), setting)
        frozen = Frozen(loaded, config.optim, config.zero)
        residency.add("rewards", frozen)
        return ModelSource(
            frozen,
            theirs,
            tokenizer,
            budget=config.ppo.microbatch_tokens,
            zero=config.zero,
            world=world,
            name=f"{setting} = {name}",
        )

    if reward.model is not None:
        return model(reward.model, f"{where}.model")
    return ensemble([model(name, f"{where}.ensemble") for name in reward.ensemble], reward.combine)
