"""The models of a PPO run: the weights that each role starts from, and its trainable parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastppo.config import AnyConfig, CriticConfig, OnlineConfig, Place, ResponseSettings
from fastppo.models.critics.read import check_value_model, load_value_model
from fastppo.models.frozen_prefix import depth_of, prefix_depth
from fastppo.models.loading.source import Source
from fastppo.models.loading.streams import copy_parts, partition_config
from fastppo.models.loading.trained import choose_trained, recompute_layers
from fastppo.models.loading.weights import (
    DTYPES,
    Partitions,
    check_embedded,
    check_language_model,
    context_of,
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
    enable_prefix_states,
    fuse_head,
    width_of,
)
from fastppo.models.rotary import longrope_switch

log = logging.getLogger("fastppo")


def load_policies(config: OnlineConfig, device: torch.device) -> tuple[Policy, Critic | None, Policy]:
    """Load actor, separate critic (None: the actor's backbone has it, or there is none) and reference (`check_models`).

    Weights that two roles start from are read once and copied. Weights that LoRA freezes in both roles are shared: a
    critic uses the actor's parameters below its own adapters, and the reference is the actor's model with its adapters
    off; that one must not be frozen or moved. At ZeRO stage 3 parameters are partitioned: no role can be called before
    an engine gathers them.
    """
    dtype = DTYPES[config.optim.dtype]
    actor, critic = config.actor, config.value_function
    base = _load_actor(config, dtype, device, trained_partitions(config))
    reference = _load_reference(config, base, dtype, device)
    check_same_scales(Policy(base), reference, config)
    shared = critic is not None and critic.kind == "shared"
    value_model = None if critic is None or shared else _load_critic(critic, config, base, dtype, device)
    policy = Policy(base, ValueHead(width_of(base), dtype, device) if shared else None)
    choose_trained(policy, "actor", actor, actor.model, actor.revision, config.seed)
    if config.zero.stage < 3:
        enable_prefix_states(policy, reference if config.reference.model is None else None)
        if value_model is not None:
            enable_prefix_states(value_model)
    elif prefix_depth(policy.model):  # DeepSpeed prefetches the weights of all layers, in their order
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    for role in filter(None, (policy, value_model)):
        recompute_layers(role.model, config.optim.recomputed_layers(depth_of(role.model)))
    return policy, value_model, reference


def load_actor_tokenizer(config: OnlineConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the actor, which critic and reference share."""
    actor = config.actor
    return load_tokenizer("actor.model", actor.model, actor.gguf_file, actor.revision)


def actor_config(config: OnlineConfig) -> PreTrainedConfig:
    """The config of the actor, as `load_config` gives it."""
    return load_config(_actor_source(config))


def actor_context(config: OnlineConfig) -> int | None:
    """The context of the actor, in tokens; None if its config has no limit."""
    return context_of(actor_config(config))


def check_actor_tokens(
    config: OnlineConfig, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[int]], what: str
) -> None:
    """Raises ModelError for a token without an embedding in the actor; what: the setting that names the texts."""
    check_embedded(_actor_source(config), tokenizer, sequences, what)


def check_models(config: OnlineConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check, without reading weights, that the models of a run exist and are compatible with the actor.

    tokenizer: of the actor. Raises ModelError.
    """
    critic, reference, texts = config.value_function, config.reference, _actor_texts(config, tokenizer)
    check_language_model(_actor_source(config))
    check_switch(_actor_source(config), config)
    if reference.model is not None:
        source = Source("reference.model", reference.model, reference.gguf_file)
        check_language_model(source)
        reason = "the KL between the two has no meaning"
        way = "Use a reference with the actor's tokenizer; usually the SFT model that the actor starts from."
        check_reader(source, texts, reason, way)
        check_switch(source, config)
    if critic is not None and critic.kind == "separate" and critic.model is not None:
        source = Source("critic.model", critic.model, critic.gguf_file)
        check_value_model(source)
        reason = "its token ids stand for other text than the actor's"
        way = "Use a model with the actor's tokenizer, or leave out critic.model to start from the actor's weights."
        check_reader(source, texts, reason, way)
        check_switch(source, config)
    check_reward_models(config)


def check_reward_models(config: ResponseSettings) -> None:
    """Check, without reading weights, that the models among the sources of reward have one label. Raises ModelError."""
    for where, sources in (("rewards", config.rewards), (config.judge_setting, config.judge)):
        for name in (name for each in sources for name in (each.model, *each.ensemble) if name is not None):
            load_classifier_config(Source(f"{where}.model", name))


class Texts(NamedTuple):
    """The texts of a model that trains, which another model of the run is to read as well."""

    source: Source  # of the model that trains
    tokenizer: PreTrainedTokenizerBase  # its own
    holds: str  # what this model does with a token, for messages: "the actor can write"
    longest: int  # tokens
    bound: str  # the settings that limit them to it, with their values
    shorten: str  # what to do to these


def _actor_texts(config: OnlineConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    prompt, response = config.data.max_prompt_tokens, config.sampling.max_new_tokens
    bound = f"data.max_prompt_tokens {prompt} + sampling.max_new_tokens {response} = {prompt + response} tokens"
    shorten = "Lower one of the two"
    return Texts(_actor_source(config), tokenizer, "the actor can write", prompt + response, bound, shorten)


def check_reader(source: Source, texts: Texts, reason: str, way: str) -> None:
    """Check, without reading weights, that a model can read the texts of another one, token by token.

    reason, way: the consequence of a different tokenizer and the way out, for the message. Raises ModelError.
    """
    vocabulary = texts.tokenizer.get_vocab()
    tokenizer = load_tokenizer(source.setting, source.name, source.gguf_file)
    if tokenizer.get_vocab() != vocabulary:
        raise ModelError(
            f"{source} has another tokenizer than {texts.source} ({len(tokenizer)} and {len(texts.tokenizer)} tokens),"
            f" so {reason}. {way}"
        )
    model, other = (load_config(each).get_text_config() for each in (source, texts.source))
    tokens = min(other.vocab_size, max(vocabulary.values()) + 1)
    if model.vocab_size < tokens:
        raise ModelError(
            f"{source} has embeddings of {model.vocab_size} tokens, and {texts.holds} {tokens} tokens. {way}"
        )
    context = context_of(model)
    if context is not None and texts.longest > context:
        raise ModelError(
            f"{texts.bound}, but the context of {source} holds {context}. {texts.shorten}, or give another model."
        )


def check_switch(source: Source, config: ResponseSettings) -> None:
    """Raise ModelError if sequences may exceed the length at which longrope switches to its long factors.

    The logits of a token would then depend on how many tokens follow it: tokens would be sampled with the short factors
    and learned from with the long ones, that is, with another policy.
    """
    prompt, response = config.data.max_prompt_tokens, config.sampling.max_new_tokens
    switch = longrope_switch(load_config(source))
    if switch is not None and prompt + response > switch:
        raise ModelError(
            f"data.max_prompt_tokens {prompt} + sampling.max_new_tokens {response} = {prompt + response} tokens, but"
            f" for sequences longer than original_max_position_embeddings = {switch} tokens {source} uses other rotary"
            " factors (longrope) for all tokens, so it would no longer be the model that the first tokens were sampled"
            " from. Lower one of the two, or give a model without longrope."
        )


def check_same_scales(actor: Policy, reference: Policy, config: OnlineConfig) -> None:
    """Check that the op of the exact KL, which has one softcap and one logit scale, can be used with both heads."""
    (actor_cap, actor_scale), (ref_cap, ref_scale) = ((p.head.softcap, p.head.logit_scale) for p in (actor, reference))
    if (actor_cap, actor_scale) != (ref_cap, ref_scale) and config.exact_kl:
        raise ModelError(
            f"reference.model {config.reference.model} caps its logits at {ref_cap} and multiplies them by"
            f" {ref_scale:g}, actor.model {config.actor.model} at {actor_cap} and by {actor_scale:g}: ppo.kl_kind exact"
            " needs the same for both. Set ppo.kl_kind to k3, or give a reference of the actor's family."
        )


def trained_partitions(config: AnyConfig) -> Partitions:
    """The partitioning of trained roles; None below ZeRO stage 3."""
    return _partitions(config, config.zero.parameters_on)


def frozen_partitions(config: AnyConfig | ResponseSettings) -> Partitions:
    """The partitioning of reference and reward models; None below ZeRO stage 3."""
    return _partitions(config, config.zero.frozen_on)


def _partitions(config: AnyConfig | ResponseSettings, place: Place) -> Partitions:
    zero = config.zero
    return None if zero.stage < 3 else partition_config(config.optim.dtype, place, zero.nvme_path)


def load_reward(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    partitions: Partitions = None,
    setting: str = "rewards.model",
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with one label, and its tokenizer; setting: names the model, for messages."""
    source = Source(setting, name)
    load_classifier_config(source)
    model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
    if not hasattr(model, "score"):
        raise ModelError(
            f"{source} ({type(model).__name__}) has no `score` head on a causal backbone; wrap it in a reward function"
            " (rewards.function) instead."
        )
    return RewardModel(model).requires_grad_(False).eval(), load_tokenizer(setting, name)


def _load_reference(config: OnlineConfig, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Policy:
    reference, partitions = config.reference, frozen_partitions(config)
    if reference.model is None and config.actor.lora.rank:
        actor_without_adapters = Policy(actor)
        actor_without_adapters.adapters = False
        return actor_without_adapters
    if reference.model is None:
        model = copy.deepcopy(actor) if partitions is None else _second_actor(config, actor, dtype, device, partitions)
    else:
        source = Source("reference.model", reference.model, reference.gguf_file)
        model = _load_causal(source, dtype, device, partitions)
    return Policy(model).requires_grad_(False).eval()


def _load_critic(
    critic: CriticConfig, config: OnlineConfig, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> Critic:
    partitions = trained_partitions(config)
    head = ValueHead(width_of(actor), dtype, device)
    if critic.model is None and partitions is None:
        backbone = copy_backbone(actor, same_weights=config.actor.lora.rank > 0 and critic.lora.rank > 0)
    elif critic.model is None:
        second = _second_actor(config, actor, dtype, device, cast("dict[str, Any]", partitions))
        backbone = cast(PreTrainedModel, second.base_model)
    else:
        source = Source("critic.model", critic.model, critic.gguf_file)
        backbone, head = load_value_model(source, dtype, device, partitions)
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
    """Load a causal language model with a fused head and dropout off, after its check (`model_check`).

    partitions: from `partition_config`, for a model that is partitioned over the ranks.
    """
    return _load_causal(Source(setting, name, gguf_file, revision), dtype, device, partitions)


def _load_causal(source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions) -> PreTrainedModel:
    check_language_model(source)
    return fuse_head(load_model(AutoModelForCausalLM, source, dtype, device, partitions))


def _load_actor(
    config: OnlineConfig, dtype: torch.dtype, device: torch.device, partitions: Partitions
) -> PreTrainedModel:
    return _load_causal(_actor_source(config), dtype, device, partitions)


def _actor_source(config: OnlineConfig) -> Source:
    actor = config.actor
    return Source("actor.model", actor.model, actor.gguf_file, actor.revision)


def _second_actor(
    config: OnlineConfig, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device, partitions: dict[str, Any]
) -> PreTrainedModel:
    """A second, partitioned model with the actor's initial weights: copied, or read again if they are on NVMe."""
    second = copy_parts(AutoModelForCausalLM, actor, partitions)
    return _load_actor(config, dtype, device, partitions) if second is None else fuse_head(second)
