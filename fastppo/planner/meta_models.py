"""The roles of a run as the plan has them: their models on the meta device, built from their configs alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fastppo.config import (
    ActorConfig,
    AnyConfig,
    CriticConfig,
    GenerateConfig,
    OfflineConfig,
    OnlineConfig,
    ResponseSettings,
)
from fastppo.models import (
    DTYPES,
    Backbone,
    Critic,
    Policy,
    RewardModel,
    Source,
    ValueHead,
    add_adapters,
    fuse_head,
    load_classifier_config,
    outline,
    outline_trained,
    reference_source,
    sampled_source,
    set_trainable,
    width_of,
)
from fastppo.planner.footprint import Footprint
from fastppo.planner.memory import Role


def offline_roles(config: OfflineConfig, *, cpu: bool) -> list[Role]:
    """The one model that an offline method trains, and the one that it asks before."""
    found = [_measured("model", outline_trained(config), config, cpu=cpu, trains=True)]
    if config.frozen_model is not None:
        frozen = Policy(_causal(reference_source(config.frozen_model), DTYPES[config.optim.dtype]))
        found.append(_measured("reference", frozen.requires_grad_(False), config, cpu=cpu))
    return found


def _measured(
    name: str, role: Backbone, config: AnyConfig, *, cpu: bool, trains: bool = False, shared: int = 0
) -> Role:
    size = Footprint(role, DTYPES[config.optim.dtype], cpu=cpu)
    return Role(name, size, trains, size.parameters - shared)


def online_roles(config: OnlineConfig, *, cpu: bool) -> list[Role]:
    """Actor, critic, reference, and the models among the sources of reward."""
    dtype, actor, critic = DTYPES[config.optim.dtype], config.actor, config.value_function
    measured = partial(_measured, config=config, cpu=cpu)

    own = Source("actor.model", actor.model, actor.gguf_file, actor.revision)
    policy = Policy(_causal(own, dtype))
    if critic is not None and critic.kind == "shared":
        policy.value_head = _value_head(policy.model, dtype)
    _choose(policy, "actor", actor)
    found = [measured("actor", policy, trains=True)]
    if critic is not None and critic.kind == "separate":
        role = _critic(own if critic.model is None else Source("critic.model", critic.model, critic.gguf_file), dtype)
        _choose(role, "critic", critic)
        # Where both train adapters alone, the weights below them are the same ones, unless ZeRO has split them.
        both = critic.model is None and actor.lora.rank > 0 and critic.lora.rank > 0 and config.zero.stage < 3
        frozen = sum(p.numel() for p in role.parameters() if not p.requires_grad)
        found.append(measured("critic", role, trains=True, shared=frozen if both else 0))
    reference = config.reference
    if reference.model is not None:
        own = Source("reference.model", reference.model, reference.gguf_file)
    if reference.model is not None or actor.lora.rank == 0:  # else the reference is the actor, its adapters off
        found.append(measured("reference", Policy(_causal(own, dtype)).requires_grad_(False)))
    return found + _scoring_roles(config, dtype, measured)


def generation_roles(config: GenerateConfig, *, cpu: bool) -> list[Role]:
    """The model that responses are drawn from, and the models among the sources of reward."""
    dtype, measured = DTYPES[config.optim.dtype], partial(_measured, config=config, cpu=cpu)
    policy = Policy(_causal(sampled_source(config.model), dtype)).requires_grad_(False)
    return [measured("model", policy), *_scoring_roles(config, dtype, measured)]


def _scoring_roles(config: ResponseSettings, dtype: torch.dtype, measured: Callable[..., Role]) -> list[Role]:
    """The models among the sources of reward and the judge's."""
    found = []
    for kind, where, sources in (("reward", "rewards", config.rewards), ("judge", config.judge_setting, config.judge)):
        for i, source in enumerate(sources, start=1):
            for name in filter(None, (source.model, *source.ensemble)):
                own = Source(f"{where}.model", name)
                load_classifier_config(own)
                model = outline(AutoModelForSequenceClassification, own, dtype)
                found.append(measured(f"{kind} {i}", RewardModel(model).requires_grad_(False)))
    return found


def _causal(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    return fuse_head(outline(AutoModelForCausalLM, source, dtype))


def _critic(source: Source, dtype: torch.dtype) -> Critic:
    model = outline(AutoModelForCausalLM, source, dtype)
    return Critic(cast(PreTrainedModel, model.base_model), _value_head(model, dtype))


def _value_head(model: PreTrainedModel, dtype: torch.dtype) -> ValueHead:
    return ValueHead(width_of(model), dtype, torch.device("meta"))


def _choose(role: Backbone, name: str, config: ActorConfig | CriticConfig) -> None:
    set_trainable(role, config.train)
    if config.lora.rank:
        add_adapters(role.model, name, config.lora, seed=0, source="")
