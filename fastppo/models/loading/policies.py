"""The models of a run: which weights each role starts from, and what of it trains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastppo.config import AnyConfig, Config, Place
from fastppo.distributed import gathered
from fastppo.models.frozen_prefix import prefix_depth
from fastppo.models.loading.source import Source
from fastppo.models.loading.streams import copy_parts, partition_config
from fastppo.models.loading.trained import choose_trained
from fastppo.models.loading.weights import (
    DTYPES,
    Partitions,
    check_embedded,
    check_one_label,
    context_of,
    is_classifier,
    load_classifier_config,
    load_config,
    load_model,
    load_tokenizer,
)
from fastppo.models.roles import (
    Critic,
    ModelError,
    Policy,
    RewardModel,
    ValueHead,
    copy_backbone,
    fuse_head,
    keep_prefix,
    width_of,
)
from fastppo.models.rotary import switch_of

log = logging.getLogger("fastppo")


def load_policies(config: Config, device: torch.device) -> tuple[Policy, Critic | None, Policy]:
    """Actor, separate critic (None where it shares the actor's backbone) and reference, as `check_models` has them.

    Where two start from the same weights, they are read once and copied. Weights that LoRA leaves frozen in both are
    shared instead: a critic has the actor's parameters below its own adapters, and the reference is the actor's very
    model, read with adapters off; it must not be frozen or moved. At ZeRO stage 3 parameters are partitioned, whole on
    no rank: until an engine gathers them no role can be called.
    """
    dtype = DTYPES[config.optim.dtype]
    actor, critic = config.actor, config.critic
    base = _load_actor(config, dtype, device, trained_partitions(config))
    reference = _load_reference(config, base, dtype, device)
    check_same_scales(Policy(base), reference, config)
    value_model = None if critic.kind == "shared" else _load_critic(config, base, dtype, device)
    policy = Policy(base, ValueHead(width_of(base), dtype, device) if critic.kind == "shared" else None)
    choose_trained(policy, "actor", actor, actor.model, actor.revision, config.seed)
    if config.zero.stage < 3:
        keep_prefix(policy, reference if config.reference.model is None else None)
        if value_model is not None:
            keep_prefix(value_model)
    elif prefix_depth(policy.model):  # DeepSpeed fetches weights ahead in the order of layers, all of them
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    if config.optim.activation_checkpointing:
        for role in filter(None, (policy, value_model)):
            role.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, value_model, reference


def load_actor_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """That of critic and reference too."""
    actor = config.actor
    return load_tokenizer("actor.model", actor.model, actor.gguf_file, actor.revision)


def actor_context(config: Config) -> int | None:
    """The longest sequence that the actor takes, in tokens; None if its config does not tell."""
    return context_of(load_config(_actor_source(config)))


def check_actor_tokens(
    config: Config, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[int]], what: str
) -> None:
    """Raises ModelError for a token that the actor has no embedding of; what: the setting that names the texts."""
    check_embedded(_actor_source(config), tokenizer, sequences, what)


def check_models(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the models of a run are there and fit the actor, as far as can be told without their weights.

    tokenizer: the actor's. Raises ModelError.
    """
    critic, reference = config.critic, config.reference
    _check_switch(_actor_source(config), config)
    if reference.model is not None:
        source = Source("reference.model", reference.model, reference.gguf_file)
        reason = "KL between the two means nothing"
        way = "Use a reference with the actor's tokenizer; usually the SFT model that the actor starts from."
        _check_reader(source, config, tokenizer, reason, way)
    if critic.kind == "separate" and critic.model is not None:
        source = Source("critic.model", critic.model, critic.gguf_file)
        if is_classifier(found := load_config(source)):
            check_one_label(source, found, "Start from a language model, or from a classifier with num_labels=1.")
        reason = "it would read other words than the actor writes"
        way = "Use a model with the actor's tokenizer, or leave out critic.model to start from the actor's weights."
        _check_reader(source, config, tokenizer, reason, way)
    for where, sources in (("rewards", config.rewards), ("health.judge", config.health.judge)):
        for name in (name for each in sources for name in (each.model, *each.ensemble) if name is not None):
            load_classifier_config(Source(f"{where}.model", name))


def _check_reader(source: Source, config: Config, tokenizer: PreTrainedTokenizerBase, reason: str, way: str) -> None:
    """Whether a model can read what the actor is asked and writes; reason, way: of another tokenizer, for errors."""
    actor, vocabulary = _actor_source(config), tokenizer.get_vocab()
    theirs = load_tokenizer(source.setting, source.name, source.gguf_file)
    if theirs.get_vocab() != vocabulary:
        raise ModelError(
            f"{source} has another tokenizer than {actor} ({len(theirs)} and {len(tokenizer)} tokens), so {reason}."
            f" {way}"
        )
    shape, own = load_config(source).get_text_config(), load_config(actor).get_text_config()
    rows, written = shape.vocab_size, min(own.vocab_size, max(vocabulary.values()) + 1)
    if rows < written:
        raise ModelError(
            f"{source} has embeddings of {rows} tokens, and the actor writes {written} different ones. {way}"
        )
    prompt, response, context = config.data.max_prompt_tokens, config.sampling.max_new_tokens, context_of(shape)
    if context is not None and prompt + response > context:
        raise ModelError(
            f"data.max_prompt_tokens {prompt} + sampling.max_new_tokens {response} = {prompt + response} tokens, but"
            f" the context of {source} holds {context}. Lower one of the two, or give another model."
        )
    _check_switch(source, config)


def _check_switch(source: Source, config: Config) -> None:
    """Whether what a model says of a token depends on how many follow, as it does where longrope switches.

    Tokens drawn one by one, with the short factors, would be learned from with the long ones, as another policy's.
    """
    prompt, response = config.data.max_prompt_tokens, config.sampling.max_new_tokens
    switch = switch_of(load_config(source))
    if switch is not None and prompt + response > switch:
        raise ModelError(
            f"data.max_prompt_tokens {prompt} + sampling.max_new_tokens {response} = {prompt + response} tokens, but"
            f" beyond original_max_position_embeddings = {switch} tokens {source} turns all tokens of a sequence by"
            " other rotary factors (longrope), so it would not be the model any more that the first ones were drawn"
            " from. Lower one of the two, or give a model without longrope."
        )


def check_same_scales(actor: Policy, reference: Policy, config: Config) -> None:
    """Whether the op of the exact KL, which has one softcap and one logit scale, can take both heads."""
    own, theirs = ((p.head.softcap, p.head.logit_scale) for p in (actor, reference))
    if own != theirs and config.ppo.kl_kind == "exact":
        raise ModelError(
            f"reference.model {config.reference.model} caps its logits at {theirs[0]} and multiplies them by"
            f" {theirs[1]:g}, actor.model {config.actor.model} at {own[0]} and by {own[1]:g}: ppo.kl_kind exact takes"
            " both under one. Set ppo.kl_kind to k3, or give a reference of the actor's family."
        )


def trained_partitions(config: AnyConfig) -> Partitions:
    """How the parameters of what trains are partitioned; None below ZeRO stage 3."""
    return _partitions(config, config.zero.parameters_on)


def frozen_partitions(config: Config) -> Partitions:
    """How the parameters of reference and reward models are partitioned; None below ZeRO stage 3."""
    return _partitions(config, config.zero.frozen_on)


def _partitions(config: AnyConfig, place: Place) -> Partitions:
    zero = config.zero
    return None if zero.stage < 3 else partition_config(config.optim.dtype, place, zero.nvme_path)


def load_reward(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    partitions: Partitions = None,
    setting: str = "rewards.model",
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, and its tokenizer; setting: the one that names it, for errors."""
    source = Source(setting, name)
    load_classifier_config(source)
    model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
    if not hasattr(model, "score"):
        raise ModelError(
            f"{source} ({type(model).__name__}) has no `score` head on a causal backbone; wrap it in a reward function"
            " (rewards.function) instead."
        )
    return RewardModel(model).requires_grad_(False).eval(), load_tokenizer(setting, name)


def _load_reference(config: Config, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Policy:
    reference, partitions = config.reference, frozen_partitions(config)
    if reference.model is None and config.actor.lora.rank:
        own = Policy(actor)
        own.adapters = False
        return own
    if reference.model is None:
        model = copy.deepcopy(actor) if partitions is None else _second_actor(config, actor, dtype, device, partitions)
    else:
        source = Source("reference.model", reference.model, reference.gguf_file)
        model = _load_causal(source, dtype, device, partitions)
    return Policy(model).requires_grad_(False).eval()


def _load_critic(config: Config, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Critic:
    critic, partitions = config.critic, trained_partitions(config)
    head = ValueHead(width_of(actor), dtype, device)
    if critic.model is None and partitions is None:
        backbone = copy_backbone(actor, same_weights=config.actor.lora.rank > 0 and critic.lora.rank > 0)
    elif critic.model is None:
        second = _second_actor(config, actor, dtype, device, cast("dict[str, Any]", partitions))
        backbone = cast(PreTrainedModel, second.base_model)
    else:
        source = Source("critic.model", critic.model, critic.gguf_file)
        if is_classifier(load_config(source)):  # start from a reward model: V(s) begins as its score
            model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
            head = ValueHead(width_of(model), dtype, device)
            score = cast(nn.Linear, model.score).weight
            with gathered([score]):
                head.weight.data.copy_(score.data)
        else:
            model = _load_causal(source, dtype, device, partitions)
            head = ValueHead(width_of(model), dtype, device)
        backbone = cast(PreTrainedModel, model.base_model)
    role = Critic(backbone, head)
    choose_trained(role, "critic", critic, critic.model or config.actor.model, None, config.seed)
    return role


def load_causal(
    setting: str,
    name: str,
    gguf_file: str | None,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    partitions: Partitions = None,
) -> PreTrainedModel:
    """A causal language model with a fused head, its kind checked (`fastppo.models.loading.model_check`), dropout off.

    partitions: what `partition_config` gives, for a model that is whole on no rank.
    """
    return _load_causal(Source(setting, name, gguf_file, revision), dtype, device, partitions)


def _load_causal(source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions) -> PreTrainedModel:
    return fuse_head(load_model(AutoModelForCausalLM, source, dtype, device, partitions))


def _load_actor(config: Config, dtype: torch.dtype, device: torch.device, partitions: Partitions) -> PreTrainedModel:
    return _load_causal(_actor_source(config), dtype, device, partitions)


def _actor_source(config: Config) -> Source:
    actor = config.actor
    return Source("actor.model", actor.model, actor.gguf_file, actor.revision)


def _second_actor(
    config: Config, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device, partitions: dict[str, Any]
) -> PreTrainedModel:
    """The actor's starting weights once more, in partitions: copied, or read again where they are on disks."""
    second = copy_parts(AutoModelForCausalLM, actor, partitions)
    return _load_actor(config, dtype, device, partitions) if second is None else fuse_head(second)
