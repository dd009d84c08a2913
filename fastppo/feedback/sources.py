"""The sources of reward that a config names."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config, RewardConfig
from fastppo.engine import Frozen, World
from fastppo.feedback.function import function_source
from fastppo.feedback.model import ModelSource, ensemble
from fastppo.feedback.pattern import pattern_source
from fastppo.feedback.remote import remote_source
from fastppo.feedback.responses import Source
from fastppo.load import DTYPES, frozen_partitions, load_reward
from fastppo.residency import Residency


def load_functions(rewards: Sequence[RewardConfig]) -> dict[str, Source]:
    """The Python functions among the sources, imported. Done before any model loads, so a typo costs no minutes."""
    return {r.function: function_source(r.function) for r in rewards if r.function is not None}


def load_sources(
    config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """Every source of the config with its weight, in order; tokenizer: the actor's."""
    return [(_load(reward, config, tokenizer, world, residency), reward.weight) for reward in config.rewards]


def _load(
    reward: RewardConfig, config: Config, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> Source:
    if reward.function is not None:
        return function_source(reward.function)
    if reward.pattern is not None:
        return pattern_source(reward.pattern)
    if reward.url is not None:
        return remote_source(reward)

    def model(name: str) -> Source:
        loaded, theirs = load_reward(name, DTYPES[config.optim.dtype], world.device, frozen_partitions(config))
        frozen = Frozen(loaded, config.optim, config.zero)
        residency.add("rewards", frozen)
        return ModelSource(
            frozen, theirs, tokenizer, budget=config.ppo.microbatch_tokens, zero=config.zero, world=world
        )

    if reward.model is not None:
        return model(reward.model)
    return ensemble([model(name) for name in reward.ensemble], reward.combine)
