"""The sources of reward that a config names."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config, RewardConfig
from fastppo.engine import Frozen
from fastppo.feedback.function import function_source
from fastppo.feedback.model import ModelSource, ensemble
from fastppo.feedback.pattern import pattern_source
from fastppo.feedback.remote import remote_source
from fastppo.feedback.responses import Source
from fastppo.load import DTYPES, frozen_partitions, load_reward
from fastppo.residency import Residency
from fastppo.world import World


def load_functions(rewards: Sequence[RewardConfig], where: str = "rewards") -> dict[str, Source]:
    """The Python functions among the sources, imported. Done before any model loads, so a typo costs no minutes.

    where: the setting that the sources belong to, for errors.
    """
    return {r.function: function_source(r.function, where) for r in rewards if r.function is not None}


def load_sources(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """Every source of the config with its weight, in order; tokenizer: the actor's."""
    return [(_load(r, "rewards", config, tokenizer, world, residency), r.weight) for r in config.rewards]


def load_judge(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """The sources of the held-out judge with their weights, in order; none if there is no judge."""
    return [(_load(r, "health.judge", config, tokenizer, world, residency), r.weight) for r in config.health.judge]


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

    def model(name: str) -> Source:
        dtype = DTYPES[config.optim.dtype]
        loaded, theirs = load_reward(name, dtype, world.device, frozen_partitions(config), where)
        frozen = Frozen(loaded, config.optim, config.zero)
        residency.add("rewards", frozen)
        return ModelSource(
            frozen,
            theirs,
            tokenizer,
            budget=config.ppo.microbatch_tokens,
            zero=config.zero,
            world=world,
            name=f"{where}.model = {name}",
        )

    if reward.model is not None:
        return model(reward.model)
    return ensemble([model(name) for name in reward.ensemble], reward.combine)
