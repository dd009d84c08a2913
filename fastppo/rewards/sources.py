"""The sources of reward that a config names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config, RewardConfig
from fastppo.data import NO_ARGUMENTS, PromptSet
from fastppo.distributed import Frozen, Residency, World
from fastppo.models import DTYPES, frozen_partitions, load_reward, load_tokenizer
from fastppo.rewards.function import function_source
from fastppo.rewards.model import ModelSource, chat_tokens, ensemble
from fastppo.rewards.pattern import pattern_source
from fastppo.rewards.remote import remote_source
from fastppo.rewards.responses import Source

log = logging.getLogger("fastppo")


def load_functions(rewards: Sequence[RewardConfig], where: str = "rewards") -> None:
    """Import the Python functions among the sources. Done before any model loads, so a typo costs no minutes.

    where: the setting that the sources belong to, for errors.
    """
    for reward in rewards:
        if reward.function is not None:
            function_source(reward.function, where)


def check_chats(config: Config, tokenizer: PreTrainedTokenizerBase, *prompts: PromptSet) -> None:
    """Whether the templates of reward models and judges write the chats of these prompts, by the roles that they have.

    Done before any model loads. tokenizer: the actor's. Raises RewardError.
    """
    chats = [chat for part in prompts for chat in part.messages if chat is not None]
    kinds = {tuple(message["role"] for message in chat): chat for chat in chats}
    for where, rewards in (("rewards", config.rewards), ("health.judge", config.health.judge)):
        for reward in rewards if kinds else ():
            setting = f"{where}.model" if reward.model is not None else f"{where}.ensemble"
            for name in (each for each in (reward.model, *reward.ensemble) if each is not None):
                theirs = load_tokenizer(setting, name)
                for chat in kinds.values() if theirs.chat_template is not None else ():
                    chat_tokens(f"{setting} = {name}", chat, "yes", theirs, _arguments(config, theirs, tokenizer))


def _arguments(config: Config, theirs: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """What a reward model's chat template is given: `data.template`, if it is the actor's template."""
    return config.data.template if theirs.chat_template == actors.chat_template else NO_ARGUMENTS


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
            template=_arguments(config, theirs, tokenizer),
        )

    if reward.model is not None:
        return model(reward.model, f"{where}.model")
    return ensemble([model(name, f"{where}.ensemble") for name in reward.ensemble], reward.combine)
