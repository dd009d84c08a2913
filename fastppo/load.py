"""From a hub name, a directory or a GGUF file to the models of a run."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
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

from fastppo.config import ActorConfig, AnyConfig, Config, CriticConfig, ModelConfig
from fastppo.config.learning import Place
from fastppo.locate import locate
from fastppo.lora import add_adapters
from fastppo.miniature import miniature
from fastppo.models import (
    Backbone,
    Critic,
    ModelError,
    Policy,
    RewardModel,
    ValueHead,
    check_packing,
    copy_backbone,
    fuse_head,
    keep_trunk,
)
from fastppo.stream import copy_parts, gathered, partition, partition_config, stream, weight_files
from fastppo.trainable import set_trainable
from fastppo.trunk import trunk_depth

log = logging.getLogger("fastppo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Partitions = dict[str, Any] | None  # of `partition_config`; None: the model is whole on every rank


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from."""

    setting: str  # its name in the config, for errors
    name: str  # on the hub, a directory, or package:NAME
    gguf_file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.setting} = {self.name}"

    @property
    def place(self) -> str:
        """What transformers takes it by."""
        return str(locate(self.name))


def load_policies(
    config: Config, device: torch.device
) -> tuple[Policy, Critic | None, Policy, PreTrainedTokenizerBase]:
    """Actor, separate critic (None where it shares the actor's backbone), reference, and the tokenizer of all three.

    Where two start from the same weights, they are read once and copied. Weights that LoRA leaves frozen in both are
    shared instead: a critic has the actor's parameters below its own adapters, and the reference is the actor's very
    model, read with adapters off; it must not be frozen or moved. At ZeRO stage 3 parameters are partitioned, whole on
    no rank: until an engine gathers them no role can be called.
    """
    dtype = DTYPES[config.optim.dtype]
    actor, critic = config.actor, config.critic
    tokenizer = load_tokenizer("actor.model", actor.model, actor.gguf_file, actor.revision)
    base = _load_actor(config, dtype, device, trained_partitions(config))
    reference = _load_reference(config, base, tokenizer, dtype, device)
    value_model = None if critic.kind == "shared" else _load_critic(config, base, dtype, device)
    policy = Policy(base, ValueHead(width_of(base), dtype, device) if critic.kind == "shared" else None)
    choose_trained(policy, "actor", actor, actor.model, actor.revision, config.seed)
    if config.zero.stage < 3:
        keep_trunk(policy, reference if config.reference.model is None else None)
        if value_model is not None:
            keep_trunk(value_model)
    elif trunk_depth(policy.model):  # DeepSpeed fetches weights ahead in the order of layers, all of them
        log.info("zero.stage is 3: frozen layers are computed in every pass")
    if config.optim.activation_checkpointing:
        for role in filter(None, (policy, value_model)):
            role.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, value_model, reference, tokenizer


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
    name: str, dtype: torch.dtype, device: torch.device, partitions: Partitions = None, where: str = "rewards"
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, and its tokenizer; where: the setting it belongs to, for errors."""
    source = Source(f"{where}.model", name)
    model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
    labels = model.config.num_labels
    if labels != 1:
        raise ModelError(
            f"{where}.model = {name} has {labels} labels; a reward model has one, the score. Train one with"
            " num_labels=1, or wrap this classifier in a reward function that picks a label's logit."
        )
    if not hasattr(model, "score"):
        raise ModelError(
            f"{where}.model = {name} ({type(model).__name__}) has no `score` head on a causal backbone;"
            f" wrap it in a reward function ({where}.function) instead."
        )
    if partitions is None:
        check_packing(model)
    return RewardModel(model).requires_grad_(False).eval(), load_tokenizer(f"{where}.model", name)


def _load_reference(
    config: Config,
    actor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> Policy:
    reference, partitions = config.reference, frozen_partitions(config)
    if reference.model is None and config.actor.lora.rank:
        own = Policy(actor)
        own.adapters = False
        return own
    if reference.model is None:
        model = copy.deepcopy(actor) if partitions is None else _second_actor(config, actor, dtype, device, partitions)
    else:
        theirs = load_tokenizer("reference.model", reference.model, reference.gguf_file)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"reference.model = {reference.model} has another tokenizer than actor.model = {config.actor.model}"
                f" ({len(theirs)} and {len(tokenizer)} tokens), so KL between the two means nothing."
                " Use a reference with the actor's tokenizer; usually the SFT model that the actor starts from."
            )
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
        loaded_config = load_config(source)
        architecture = (loaded_config.architectures or [""])[0]
        if architecture.endswith("ForSequenceClassification"):  # start from a reward model: V(s) begins as its score
            model = load_model(AutoModelForSequenceClassification, source, dtype, device, partitions)
            if model.config.num_labels != 1:
                raise ModelError(
                    f"critic.model = {critic.model} has {model.config.num_labels} labels; a critic needs one"
                )
            if partitions is None:
                check_packing(model)
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


def choose_trained(
    role: Backbone,
    name: str,
    config: ActorConfig | CriticConfig | ModelConfig,
    source: str,
    revision: str | None,
    seed: int,
) -> None:
    """Freeze what does not train; with LoRA that is all but the adapters. A value head always trains."""
    set_trainable(role, config.train)
    if config.lora.rank:
        add_adapters(role.model, name, config.lora, seed=seed, source=str(locate(source)), revision=revision)


def load_causal(
    setting: str,
    name: str,
    gguf_file: str | None,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    partitions: Partitions = None,
) -> PreTrainedModel:
    """A causal language model with a fused head, checked on packed rows, dropout off.

    partitions: what `partition_config` gives, for a model that is whole on no rank.
    """
    return _load_causal(Source(setting, name, gguf_file, revision), dtype, device, partitions)


def _load_causal(source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions) -> PreTrainedModel:
    model = load_model(AutoModelForCausalLM, source, dtype, device, partitions)
    if partitions is not None:
        return fuse_head(model)
    check_packing(model)  # which fuses the head
    return model


def _load_actor(config: Config, dtype: torch.dtype, device: torch.device, partitions: Partitions) -> PreTrainedModel:
    actor = config.actor
    source = Source("actor.model", actor.model, actor.gguf_file, actor.revision)
    return _load_causal(source, dtype, device, partitions)


def _second_actor(
    config: Config, actor: PreTrainedModel, dtype: torch.dtype, device: torch.device, partitions: dict[str, Any]
) -> PreTrainedModel:
    """The actor's starting weights once more, in partitions: copied, or read again where they are on disks."""
    second = copy_parts(AutoModelForCausalLM, actor, partitions)
    return _load_actor(config, dtype, device, partitions) if second is None else fuse_head(second)


def load_tokenizer(
    setting: str, name: str, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(locate(name)), gguf_file=gguf_file, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{setting} = {name}: no tokenizer could be loaded ({_first_line(error)})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config with every dropout off.

    Off in the config and not by eval(): activation checkpointing needs train mode, and some models (OPT) drop
    functionally in it. A policy that drops at random is another policy at every call, and ratios mean nothing.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.place, gguf_file=source.gguf_file, revision=source.revision
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source}: no model could be loaded from there ({_first_line(error)})."
            " Give a Hugging Face hub name, a directory made by save_pretrained, or a directory with gguf_file."
        ) from error
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in key):
            setattr(config, key, 0.0)
    return config


def load_model(
    auto: Any, source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions
) -> PreTrainedModel:
    """A model on `device`, not yet checked on packed rows; or one in partitions, of whose kind a small one was."""
    config = load_config(source)
    if partitions is None:
        model = _load_whole(auto, source, config, dtype)
        cast(nn.Module, model).to(device)
    else:
        check_packing(miniature(auto, config, dtype, device))
        model = _load_parts(auto, source, config, dtype, partitions)
        for buffer in model.buffers():  # parameters are where DeepSpeed keeps them
            buffer.data = buffer.data.to(device)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    log.info("%s: %s, %.0f M parameters", source.setting, source.name, size / 1e6)
    return model


def _load_parts(
    auto: Any, source: Source, config: PreTrainedConfig, dtype: torch.dtype, partitions: dict[str, Any]
) -> PreTrainedModel:
    try:
        files = None if source.gguf_file else weight_files(source.place, source.revision)
        if files is not None and getattr(config, "quantization_config", None) is None:
            return stream(auto, source.place, files, config, dtype, partitions, source.revision)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{source}: its weights could not be loaded ({_first_line(error)})") from error
    log.warning(
        "%s: these weights are not plain safetensors, so each rank holds the whole model while it loads. What"
        " save_pretrained has written once is read in parts.",
        source,
    )
    return partition(_load_whole(auto, source, config, dtype), partitions)


def _load_whole(auto: Any, source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    gguf: dict[str, Any] = {}
    if source.gguf_file:
        gguf = {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        model = auto.from_pretrained(source.place, config=config, revision=source.revision, dtype=dtype, **gguf)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{source}: its weights could not be loaded ({_first_line(error)})") from error
    if gguf:
        _forget_quantization(model)
    return cast(PreTrainedModel, model.eval())


def outline(auto: Any, source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights. Raises ModelError as loading it would."""
    config = load_config(source)
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: its weights could not be loaded ({_first_line(error)})") from error


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
