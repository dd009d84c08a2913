"""Config, tokenizer and weights of one model, from a hub name, a directory or a GGUF file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig

from fastppo.config import REWARD
from fastppo.data import locate
from fastppo.models.loading.demands import check_demands
from fastppo.models.loading.model_check import check_architecture
from fastppo.models.loading.model_code import model_code
from fastppo.models.loading.quantized import (
    check_plain,
    check_quantization,
    check_scales,
    forget_quantization,
    quantization_of,
    unquantized,
)
from fastppo.models.loading.source import WAYS, Source, check_library_model, check_name, check_no_adapter
from fastppo.models.loading.streams import partition, stream, weight_files
from fastppo.models.parallel.check import check_split
from fastppo.models.roles import ModelError

log = logging.getLogger("fastppo")

HEAD_SETTING = "value_head"  # in the config of a backbone with a value head beside it: the name of that file
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Exceptions of transformers for a model that it cannot make or read; torch asserts that padding has an embedding.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError, AssertionError)

Partitions = dict[str, Any] | None  # from `partition_config`; None: the model is whole on every rank


def load_tokenizer(
    setting: str, name: str, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    source = Source(setting, name, gguf_file, revision)
    check_name(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(locate(name)), gguf_file=gguf_file, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        check_library_model(source, error)
        raise ModelError(f"{source}: no tokenizer could be loaded ({_first_line(error)}). {WAYS}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_config(source: Source) -> PreTrainedConfig:
    """The config of a model with every dropout off and without its quantisation settings.

    Raises ModelError if no config can be read, or if the weights are quantised in a form that cannot be unpacked.
    """
    config = _read_config(source)
    quantization = quantization_of(config)
    if quantization is not None and not source.gguf_file:
        check_quantization(str(source), source.name, quantization)
    return unquantized(without_dropout(config))


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout of the config to 0, in place.

    `Backbone.train` keeps modules in eval mode, except those with activation checkpointing, and some of these (the
    layers of OPT) call the dropout function. Other random operations in them are found by the check at load.
    """
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and "drop" in key:
                setattr(part, key, 0.0)
    return config


def _read_config(source: Source) -> PreTrainedConfig:
    config = _config_from_files(source)
    check_no_adapter(source)
    with model_code(str(source), "used as a language model", "Give a model that is a causal language model alone."):
        config.get_text_config()  # fails for a model of several parts if none is marked as the language model
    return config


def _config_from_files(source: Source) -> PreTrainedConfig:
    check_name(source)
    try:
        if source.gguf_file:
            return copy.deepcopy(_gguf_config(source.place, source.gguf_file, source.revision))
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.place, revision=source.revision, trust_remote_code=False
        )
        return config
    except (OSError, ValueError, KeyError) as error:
        check_library_model(source, error)
        raise ModelError(f"{source}: no model could be loaded ({_first_line(error)}). {WAYS}") from error


@cache
def _gguf_config(place: str, file: str, revision: str | None) -> PreTrainedConfig:
    """The config of a GGUF file, cached: transformers takes seconds to read one, and a run needs it several times.

    Callers change the config, so they make a copy.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, gguf_file=file, revision=revision)
    return config


def load_classifier_config(source: Source) -> PreTrainedConfig:
    """The config of a reward model: a sequence classifier with one label. Raises ModelError for any other model."""
    config = load_config(source)
    if is_token_classifier(config) or hasattr(config, HEAD_SETTING):
        raise ModelError(
            f"{source} gives a number to each token, as the critic/ of a run does, and is no reward model, which scores"
            " a whole text. Give a sequence classifier with one label."
        )
    if config.architectures and not is_classifier(config):
        raise ModelError(
            f"{source} is a {config.architectures[0]} and no reward model: it has no score head, and a random head"
            " would give random scores. Train a reward model from it with"
            f" {REWARD.call} --model.path {source.name}, and give the model that this exports."
        )
    way = "Train one with num_labels=1, or wrap this classifier in a reward function that picks a label's logit."
    check_one_label(source, config, way)
    return config


def is_classifier(config: PreTrainedConfig) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def is_token_classifier(config: PreTrainedConfig) -> bool:
    return (config.architectures or [""])[0].endswith("ForTokenClassification")


def check_language_model(source: Source) -> None:
    """Raises ModelError for a classifier or a critic: they have all weights of a language model with a tied head."""
    config = load_config(source)
    if is_classifier(config) or is_token_classifier(config) or hasattr(config, HEAD_SETTING):
        name = (config.architectures or [type(config).__name__])[0]
        raise ModelError(
            f"{source} is a {name} and no language model: it gives numbers, as a reward model or the critic/ of a run"
            " does. Give the language model that it was made from, or the actor/ of that run."
        )


def check_one_label(source: Source, config: PreTrainedConfig, way: str) -> None:
    """Raises ModelError unless the classifier has one label; way: the way out, for the message."""
    if config.num_labels != 1:
        one = "a critic has one, the value" if is_token_classifier(config) else "a reward model has one, the score"
        raise ModelError(f"{source} has {config.num_labels} labels; {one}. {way}")


def context_of(config: PreTrainedConfig) -> int | None:
    """The context of a model, its longest sequence in tokens; None if its config has no limit.

    The context of a model with chunked attention (Llama-4) is one chunk, see `attention.Chunks`.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "attention_chunk_size")]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)


def check_embedded(
    source: Source, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[int]], what: str
) -> None:
    """Raises ModelError if the sequences of token ids contain a token without an embedding in the model.

    what: the setting that names the texts. A tokenizer may have more tokens than its model if they are never used.
    """
    rows = load_config(source).get_text_config().vocab_size
    highest = max((max(tokens, default=0) for tokens in sequences), default=0)
    if highest >= rows:
        raise ModelError(
            f"{what}: a text contains token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and {source} has"
            f" embeddings of {rows} tokens only: its tokenizer has more tokens than the model. Resize the model's"
            " embeddings (model.resize_token_embeddings(len(tokenizer)), and save both), or use the model's original"
            " tokenizer."
        )


def load_model(
    auto: Any, source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions
) -> PreTrainedModel:
    """Check a model's architecture (`model_check`) and load it on `device`, or in partitions."""
    config = load_config(source)
    outline(auto, source, dtype)  # first the errors that need its modules and its config only
    check_architecture(auto, config, device, dtype)
    check_split(auto, config, device)
    if partitions is None:
        model = _load_whole(auto, source, config, dtype)
        cast(nn.Module, model).to(device)
    else:
        model = _load_parts(auto, source, config, dtype, partitions)
        for buffer in model.buffers():  # DeepSpeed has placed the parameters
            buffer.data = buffer.data.to(device)
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    log.info("%s: %s, %.0f M parameters", source.setting, source.name, size / 1e6)
    return model


def _load_parts(
    auto: Any, source: Source, config: PreTrainedConfig, dtype: torch.dtype, partitions: dict[str, Any]
) -> PreTrainedModel:
    try:
        files = None if source.gguf_file else weight_files(source.place, source.revision)
        if files is not None and quantization_of(_read_config(source)) is None:
            return stream(auto, source.place, files, config, dtype, partitions, source.revision)
    except UNREADABLE as error:
        raise _unreadable(source, config, error) from error
    log.warning(
        "%s: these weights are not plain safetensors, so each rank needs memory for the whole model during loading."
        " Files that save_pretrained writes are read in partitions.",
        source,
    )
    return partition(_load_whole(auto, source, config, dtype), partitions)


def _load_whole(auto: Any, source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    gguf_arguments: dict[str, Any] = {}
    quantization = None if source.gguf_file else quantization_of(_read_config(source))
    if source.gguf_file:
        gguf_arguments = {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    elif quantization is not None:
        config = copy.deepcopy(config)
        config.quantization_config = quantization | {"dequantize": True}
    way = "Its files and its config.json may be of different models, or of another version of transformers."
    with model_code(str(source), "loaded", way):
        try:
            model, loading_info = auto.from_pretrained(
                source.place,
                config=config,
                revision=source.revision,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by `_check_complete`
                trust_remote_code=False,
                **gguf_arguments,
            )
        except UNREADABLE as error:
            raise _unreadable(source, config, error) from error
    _check_complete(source, model, loading_info)
    try:
        check_scales(loading_info["unexpected_keys"])
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    if gguf_arguments or quantization is not None:
        forget_quantization(model)
        if dtype == torch.float32:  # some forms are always unpacked to bf16
            for p in model.parameters():
                p.data = p.data.float()
    check_plain(model)
    return cast(PreTrainedModel, model.eval())


def _check_complete(source: Source, model: PreTrainedModel, loading_info: dict[str, Any]) -> None:
    """Check that the files contain all weights in the right shapes: transformers would initialise others at random."""
    if mismatched := sorted(loading_info["mismatched_keys"]):
        examples = "; ".join(
            f"{name} has {tuple(shape)}, not {tuple(wanted)}" for name, shape, wanted in mismatched[:4]
        )
        raise ModelError(
            f"{source}: {len(mismatched)} tensors in its files do not have the shapes of its config.json ({examples});"
            " the files and the config belong to different models, or only one of them was changed, for example"
            " vocab_size without the embeddings."
        )
    if missing := sorted(loading_info["missing_keys"]):
        examples = ", ".join(missing[:4]) + ", ..." * (len(missing) > 4)
        raise ModelError(
            f"{source}: {len(missing)} weights of {type(model).__name__} are not in its files ({examples}). Give a"
            " checkpoint of this architecture."
        )


def outline(auto: Any, source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: modules and shapes, no weights. Raises the ModelError that loading would raise."""
    config = load_config(source)
    way = "Its config.json may lack a setting of this architecture, or be of another version of transformers."
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
            f" Its config.json gives pad_token_id {text.pad_token_id}, but the model has embeddings of"
            f" {text.vocab_size} tokens: set pad_token_id in config.json to the id of another token, or to null."
        )
    return ModelError(f"{source}: its weights could not be loaded ({_first_line(error)}).{way}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
