"""From a hub name, a directory or a GGUF file to the models of a run."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import GgufConfig

from fastppo.config import Config, RewardConfig
from fastppo.locate import locate
from fastppo.models import (
    Critic,
    ModelError,
    Policy,
    RewardModel,
    ValueHead,
    check_packing,
    copy_backbone,
    keep_trunk,
    set_trainable,
)

log = logging.getLogger("fastppo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_policies(
    config: Config, device: torch.device
) -> tuple[Policy, Critic | None, Policy, PreTrainedTokenizerBase]:
    """Actor, separate critic (None where it shares the actor's backbone), reference, and the tokenizer of all three.

    Where two start from the same weights, they are read once and copied.
    """
    dtype = DTYPES[config.optim.dtype]
    actor, critic = config.actor, config.critic
    tokenizer = load_tokenizer("actor.model", actor.model, actor.gguf_file, actor.revision)
    base = load_causal("actor.model", actor.model, actor.gguf_file, actor.revision, dtype, device)
    reference = _load_reference(config, base, tokenizer, dtype, device)
    value_model = None if critic.kind == "shared" else _load_critic(config, base, dtype, device)
    policy = Policy(base, ValueHead(width_of(base), dtype, device) if critic.kind == "shared" else None)
    set_trainable(policy, actor.train)
    keep_trunk(policy, reference if config.reference.model is None else None)
    if value_model is not None:
        keep_trunk(value_model)
    if config.optim.activation_checkpointing:
        for role in filter(None, (policy, value_model)):
            role.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, value_model, reference, tokenizer


def load_reward(
    config: RewardConfig, dtype: torch.dtype, device: torch.device
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, and the tokenizer it was trained with."""
    assert config.model is not None
    model = load_model("rewards.model", AutoModelForSequenceClassification, config.model, None, None, dtype, device)
    labels = model.config.num_labels
    if labels != 1:
        raise ModelError(
            f"rewards.model = {config.model} has {labels} labels; a reward model has one, the score. Train one with"
            " num_labels=1, or wrap this classifier in a reward function that picks a label's logit."
        )
    if not hasattr(model, "score"):
        raise ModelError(
            f"rewards.model = {config.model} ({type(model).__name__}) has no `score` head on a causal backbone;"
            " wrap it in a reward function (rewards.function) instead."
        )
    check_packing(model)
    return RewardModel(model).requires_grad_(False).eval(), load_tokenizer("rewards.model", config.model)


def _load_reference(
    config: Config,
    actor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> Policy:
    reference = config.reference
    if reference.model is None:
        model = copy.deepcopy(actor)
    else:
        theirs = load_tokenizer("reference.model", reference.model, reference.gguf_file)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"reference.model = {reference.model} has another tokenizer than actor.model = {config.actor.model}"
                f" ({len(theirs)} and {len(tokenizer)} tokens), so KL between the two means nothing."
                " Use a reference with the actor's tokenizer; usually the SFT model that the actor starts from."
            )
        model = load_causal("reference.model", reference.model, reference.gguf_file, None, dtype, device)
    return Policy(model).requires_grad_(False).eval()


def _load_critic(config: Config, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Critic:
    critic = config.critic
    head = ValueHead(width_of(actor), dtype, device)
    if critic.model is None:
        backbone = copy_backbone(actor)
    else:
        loaded_config = load_config("critic.model", critic.model, critic.gguf_file, None)
        architecture = (loaded_config.architectures or [""])[0]
        if architecture.endswith("ForSequenceClassification"):  # start from a reward model: V(s) begins as its score
            model = load_model(
                "critic.model", AutoModelForSequenceClassification, critic.model, None, None, dtype, device
            )
            if model.config.num_labels != 1:
                raise ModelError(
                    f"critic.model = {critic.model} has {model.config.num_labels} labels; a critic needs one"
                )
            check_packing(model)
            head = ValueHead(width_of(model), dtype, device)
            head.weight.data.copy_(cast(nn.Linear, model.score).weight.data)
        else:
            model = load_causal("critic.model", critic.model, critic.gguf_file, None, dtype, device)
            head = ValueHead(width_of(model), dtype, device)
        backbone = cast(PreTrainedModel, model.base_model)
    role = Critic(backbone, head)
    set_trainable(role, critic.train)
    return role


def load_causal(
    setting: str, name: str, gguf_file: str | None, revision: str | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A causal language model with a fused head, checked on packed rows, dropout off."""
    model = load_model(setting, AutoModelForCausalLM, name, gguf_file, revision, dtype, device)
    check_packing(model)
    return model


def load_tokenizer(
    setting: str, name: str, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(locate(name)), gguf_file=gguf_file, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{setting} = {name}: no tokenizer could be loaded ({_first_line(error)})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_config(setting: str, name: str, gguf_file: str | None, revision: str | None) -> PreTrainedConfig:
    """The model's config with every dropout off.

    Off in the config and not by eval(): activation checkpointing needs train mode, and some models (OPT) drop
    functionally in it. A policy that drops at random is another policy at every call, and ratios mean nothing.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(locate(name)), gguf_file=gguf_file, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{setting} = {name}: no model could be loaded from there ({_first_line(error)})."
            " Give a Hugging Face hub name, a directory made by save_pretrained, or a directory with gguf_file."
        ) from error
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in key):
            setattr(config, key, 0.0)
    return config


def load_model(
    setting: str,
    auto: Any,
    name: str,
    gguf_file: str | None,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    config = load_config(setting, name, gguf_file, revision)
    extra = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)} if gguf_file else {}
    try:
        model = auto.from_pretrained(str(locate(name)), config=config, revision=revision, dtype=dtype, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{setting} = {name}: its weights could not be loaded ({_first_line(error)})") from error
    if gguf_file:
        _forget_quantization(model)
    log.info("%s: %s, %.0f M parameters", setting, name, sum(p.numel() for p in model.parameters()) / 1e6)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights were unpacked at load; transformers would still refuse to train or save the model."""
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)


def width_of(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
