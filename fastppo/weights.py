"""One model: its config, its tokenizer and its weights, from a hub name, a directory or a GGUF file."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

from fastppo.demands import check_demands
from fastppo.locate import PREFIX, locate
from fastppo.miniature import miniature
from fastppo.model_code import model_code
from fastppo.models import ModelError, check_packing
from fastppo.stream import partition, stream, weight_files

log = logging.getLogger("fastppo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # on the Hugging Face hub: of a model, or of its owner and the model

# What transformers raises for a model that it cannot make or read; torch asserts that padding has an embedding.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError, AssertionError)

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


WAYS = "Give a Hugging Face hub name, a directory made by save_pretrained, or a directory with gguf_file."

# What the quickstart's stages hand on, and the command that leaves it.
LEFT_BY = {
    "runs/quickstart-sft/model": "deepspeed fastppo/train_sft.py --config quickstart-sft",
    "runs/quickstart-reward/reward_model": "deepspeed fastppo/train_reward.py --config quickstart-reward",
}


def load_tokenizer(
    setting: str, name: str, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    source = Source(setting, name, gguf_file, revision)
    _check_name(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(locate(name)), gguf_file=gguf_file, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: no tokenizer could be loaded ({_first_line(error)}). {WAYS}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config with every dropout off.

    Off in the config and not by eval(): activation checkpointing needs train mode, and some models (OPT) drop
    functionally in it. A policy that drops at random is another policy at every call, and ratios mean nothing.
    """
    _check_name(source)
    try:
        if source.gguf_file:
            config = copy.deepcopy(_gguf_config(source.place, source.gguf_file, source.revision))
        else:
            config = AutoConfig.from_pretrained(source.place, revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: no model could be loaded from there ({_first_line(error)}). {WAYS}") from error
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in key):
            setattr(config, key, 0.0)
    return config


@cache
def _gguf_config(place: str, file: str, revision: str | None) -> PreTrainedConfig:
    """The config of a GGUF file, kept: transformers takes seconds to read one, and a run asks several times.

    Callers alter theirs, so they take a copy.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, gguf_file=file, revision=revision)
    return config


def _check_name(source: Source) -> None:
    """Raises ModelError for a path that is not there and can be no name on the hub, of which its errors say little."""
    packaged = source.name.startswith(PREFIX)
    if not packaged and not HUB_NAME.fullmatch(source.name) and not Path(source.name).exists():
        stage = LEFT_BY.get(str(Path(source.name)))
        way = WAYS if stage is None else f"It is left by `{stage}`, and `make demo` runs all stages of the quickstart."
        raise ModelError(f"{source}: there is no such directory. {way}")


def load_classifier_config(source: Source) -> PreTrainedConfig:
    """The config of a reward model: a sequence classifier with one label. Raises ModelError for any other."""
    config = load_config(source)
    if config.architectures and not is_classifier(config):
        raise ModelError(
            f"{source} is a {config.architectures[0]} and no reward model: it"
            " has no score head, and a random one would score at random. Train one from it with"
            f" fastppo/train_reward.py --model.path {source.name}, and give what that leaves."
        )
    way = "Train one with num_labels=1, or wrap this classifier in a reward function that picks a label's logit."
    check_one_label(source, config, way)
    return config


def is_classifier(config: PreTrainedConfig) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def check_one_label(source: Source, config: PreTrainedConfig, way: str) -> None:
    """Raises ModelError for a classifier with more labels or fewer, with this way out."""
    if config.num_labels != 1:
        raise ModelError(f"{source} has {config.num_labels} labels; a reward model has one, the score. {way}")


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model takes, in tokens; None if its config does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


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
    except UNREADABLE as error:
        raise _unreadable(source, config, error) from error
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
        model, found = auto.from_pretrained(
            source.place, config=config, revision=source.revision, dtype=dtype, output_loading_info=True, **gguf
        )
    except UNREADABLE as error:
        raise _unreadable(source, config, error) from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers in their place
        some = ", ".join(missing[:4]) + ", ..." * (len(missing) > 4)
        raise ModelError(
            f"{source}: {len(missing)} weights of {type(model).__name__} are not in its files ({some}). Give a"
            " checkpoint of this kind of model."
        )
    if gguf:
        _forget_quantization(model)
    return cast(PreTrainedModel, model.eval())


def outline(auto: Any, source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no weights. Raises ModelError as loading it would."""
    config = load_config(source)
    way = "Its config.json may lack what this kind of model needs, or be of another version of transformers."
    with model_code(str(source), "made from its config", way):
        try:
            with torch.device("meta"):
                model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()
        except UNREADABLE as error:
            raise _unreadable(source, config, error) from error
    check_demands(model)
    return model


def _unreadable(source: Source, config: PreTrainedConfig, error: Exception) -> ModelError:
    text = config.get_text_config()
    way = ""
    if isinstance(error, AssertionError) and (text.pad_token_id or 0) >= text.vocab_size:
        way = (
            f" Its config.json names token {text.pad_token_id} for padding and has embeddings of {text.vocab_size}:"
            " write the id of another token there as pad_token_id, or null."
        )
    return ModelError(f"{source}: its weights could not be loaded ({_first_line(error)}).{way}")


def _forget_quantization(model: PreTrainedModel) -> None:
    """The weights were unpacked at load; transformers would still refuse to train or save the model."""
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
