"""Creating the sources of reward of a config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import ResponseSettings, RewardConfig
from fastppo.data import NO_ARGUMENTS, Messages, PromptSet, template_arguments
from fastppo.distributed import Frozen, Residency, World
from fastppo.models import DTYPES, frozen_partitions, load_reward, load_tokenizer
from fastppo.rewards.functions.function import function_source
from fastppo.rewards.model import Ensemble, ModelSource, chat_tokens
from fastppo.rewards.pattern import pattern_source
from fastppo.rewards.remote import remote_source
from fastppo.rewards.responses import Source
from fastppo.rewards.verify.source import MathSource, check_column, check_installed

log = logging.getLogger("fastppo")


def check_imports(rewards: Sequence[RewardConfig], where: str = "rewards") -> None:
    """Import the Python functions among the sources, and look for the packages that others need, to find errors before
    a model is loaded, which takes minutes.

    where: the setting with the sources, for errors. Raises RewardError.
    """
    for reward in rewards:
        if reward.function is not None:
            function_source(reward.function, where)
        if reward.math is not None:
            check_installed(reward, where)


def check_references(config: ResponseSettings, world: World, *prompts: PromptSet) -> None:
    """Check, before a model is loaded, that the data has the columns with reference answers, and that these can be
    read. All ranks call it. Raises RewardError."""
    for where, rewards in (("rewards", config.rewards), (config.judge_setting, config.judge)):
        for reward in rewards:
            if reward.math is not None:
                check_column(reward, where, world, *prompts)


def check_chats(config: ResponseSettings, tokenizer: PreTrainedTokenizerBase, *prompts: PromptSet) -> None:
    """Check, before a model is loaded, that the chat templates of reward models and judges accept these prompts.

    One chat is tested for each sequence of roles. tokenizer: the actor's. Raises RewardError.
    """
    chats = [chat for part in prompts for chat in part.messages if chat is not None]
    kinds = {tuple(message["role"] for message in chat): chat for chat in chats}
    for where, rewards in (("rewards", config.rewards), (config.judge_setting, config.judge)):
        for reward in rewards if kinds else ():
            setting = f"{where}.model" if reward.model is not None else f"{where}.ensemble"
            for name in (each for each in (reward.model, *reward.ensemble) if each is not None):
                reward_tokenizer = load_tokenizer(setting, name)
                for chat in kinds.values() if reward_tokenizer.chat_template is not None else ():
                    chat_tokens(
                        f"{setting} = {name}",
                        chat,
                        _any_answer(config),
                        reward_tokenizer,
                        _arguments(config, reward_tokenizer, tokenizer),
                    )


def _any_answer(config: ResponseSettings) -> Messages:
    """A response to a chat, with all the roles that it may have."""
    turn, roles = {"role": "assistant", "content": "yes"}, ("user", "tool") if config.data.tools else ("user",)
    if config.rollout.environment is None:
        return [turn]
    return [turn, *(message for role in roles for message in ({"role": role, "content": "and?"}, turn))]


def _arguments(
    config: ResponseSettings, reward_tokenizer: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase
) -> Mapping[str, Any]:
    """The arguments of a reward model's chat template: `data.template` and `data.tools`, if it is the actor's template.

    reward_tokenizer: the reward model's tokenizer; actors: the actor's.
    """
    return template_arguments(config.data) if reward_tokenizer.chat_template == actors.chat_template else NO_ARGUMENTS


def load_sources(
    config: ResponseSettings, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """Load every source in `rewards`, in order; returns each with its weight. tokenizer: the actor's."""
    numbered = enumerate(config.rewards, start=1)
    return [(_load(r, "rewards", f"reward {i}", config, tokenizer, world, residency), r.weight) for i, r in numbered]


def load_judge(
    config: ResponseSettings, tokenizer: PreTrainedTokenizerBase, world: World, residency: Residency
) -> list[tuple[Source, float]]:
    """Load the sources of the held-out judge, in order; returns each with its weight, empty without a judge."""
    where = config.judge_setting
    if world.rank == 0:
        for name in shared_sources(config):
            log.warning(
                "%s and rewards both have %s: a judge that is also the reward rises with it and cannot show reward"
                " hacking. Use another model or function as judge.",
                *(where, name),
            )
    numbered = enumerate(config.judge, start=1)
    return [(_load(r, where, f"judge {i}", config, tokenizer, world, residency), r.weight) for i, r in numbered]


def shared_sources(config: ResponseSettings) -> list[str]:
    """The sources that are both in `rewards` and in the judge; models are compared by their resolved paths."""
    rewards, judges = ([name for r in group for name in _names(r)] for group in (config.rewards, config.judge))
    return [name for name in dict.fromkeys(judges) if name in rewards]


def _names(reward: RewardConfig) -> list[str]:
    models = [name for name in (reward.model, *reward.ensemble) if name is not None]
    paths = [str(Path(name).resolve()) if Path(name).exists() else name for name in models]
    others = (reward.function, reward.pattern, reward.url)
    columns = [] if reward.math is None else [f"math = {reward.math}"]
    return [*paths, *(name for name in others if name is not None), *columns]


def _load(
    reward: RewardConfig,
    where: str,
    role: str,
    config: ResponseSettings,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    residency: Residency,
) -> Source:
    """Load one source. where: the setting with it, for errors; role: its name in the memory plan."""
    if reward.function is not None:
        return function_source(reward.function, where)
    if reward.pattern is not None:
        return pattern_source(reward.pattern, where)
    if reward.math is not None:
        return MathSource(reward, where)
    if reward.url is not None:
        return remote_source(reward, where)

    def model(name: str, setting: str) -> Source:
        dtype = DTYPES[config.optim.dtype]
        loaded, reward_tokenizer = load_reward(name, dtype, world.device, frozen_partitions(config), setting)
        frozen = Frozen(loaded, config.optim, config.zero)
        residency.add("rewards", frozen, role)
        return ModelSource(
            frozen,
            reward_tokenizer,
            tokenizer,
            budget=config.microbatch_tokens,
            zero=config.zero,
            world=world,
            name=f"{setting} = {name}",
            template=_arguments(config, reward_tokenizer, tokenizer),
        )

    if reward.model is not None:
        return model(reward.model, f"{where}.model")
    return Ensemble([model(name, f"{where}.ensemble") for name in reward.ensemble], reward.combine)
