"""One model: its config, its tokenizer and its weights, from a hub name, a directory or a GGUF file."""

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
from fastppo.models.loading.model_check import check_kind
from fastppo.models.loading.model_code import model_code
from fastppo.models.loading.quantized import (
    check_plain,
    check_quantization,
    check_scales,
    forget_quantization,
    quantization_of,
    unquantized,
)
from fastppo.models.loading.source import WAYS, Source, check_name, check_no_adapter, check_own_kind
from fastppo.models.loading.streams import partition, stream, weight_files
from fastppo.models.roles import ModelError

log = logging.getLogger("fastppo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What transformers raises for a model that it cannot make or read; torch asserts that padding has an embedding.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError, AssertionError)

Partitions = dict[str, Any] | None  # of `partition_config`; None: the model is whole on every rank


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
        check_own_kind(source, error)
        raise ModelError(f"{source}: no tokenizer could be loaded ({_first_line(error)}). {WAYS}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config with every dropout off, and without what it says of quantised weights.

    Raises ModelError where no config can be read, and for weights that are quantised in a way that cannot be unpacked.
    """
    config = _read_config(source)
    quantization = quantization_of(config)
    if quantization is not None and not source.gguf_file:
        check_quantization(str(source), source.name, quantization)
    return unquantized(without_dropout(config))


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with every dropout set to 0, in itself and not in a copy.

    `Backbone.train` keeps modules in eval mode, but not those that recompute activations, and some of these (OPT's
    layers) drop functionally. Whatever else a model does at random there, the check at load finds.
    """
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and "drop" in key:
                setattr(part, key, 0.0)
    return config


def _read_config(source: Source) -> PreTrainedConfig:
    config = _found_config(source)
    check_no_adapter(source)
    with model_code(str(source), "used as a language model", "Give a causal language model of its own."):
        config.get_text_config()  # of a model of several parts, of which it must be told which one writes
    return config


def _found_config(source: Source) -> PreTrainedConfig:
    check_name(source)
    try:
        if source.gguf_file:
            return copy.deepcopy(_gguf_config(source.place, source.gguf_file, source.revision))
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.place, revision=source.revision, trust_remote_code=False
        )
        return config
    except (OSError, ValueError, KeyError) as error:
        check_own_kind(source, error)
        raise ModelError(f"{source}: no model could be loaded from there ({_first_line(error)}). {WAYS}") from error


@cache
def _gguf_config(place: str, file: str, revision: str | None) -> PreTrainedConfig:
    """The config of a GGUF file, kept: transformers takes seconds to read one, and a run asks several times.

    Callers alter theirs, so they take a copy.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, gguf_file=file, revision=revision)
    return config


def load_classifier_config(source: Source) -> PreTrainedConfig:
    """The config of a reward model: a sequence classifier with one label. Raises ModelError for any other."""
    config = load_config(source)
    if config.architectures and not is_classifier(config):
        raise ModelError(
            f"{source} is a {config.architectures[0]} and no reward model: it"
            " has no score head, and a random one would score at random. Train one from it with"
            f" {REWARD.call} --model.path {source.name}, and give what that leaves."
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
    """The longest sequence that a model takes, in tokens; None if its config does not tell.

    One that attends within chunks (Llama-4) takes one chunk, see `attention.Chunks`.
    """
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "attention_chunk_size")]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)


def check_embedded(
    source: Source, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Iterable[int]], what: str
) -> None:
    """Raises ModelError for a token that the model has no embedding of, in sequences of token ids of its tokenizer.

    what: the setting that names the texts. A tokenizer may know more tokens than its model where they are never used.
    """
    rows = load_config(source).get_text_config().vocab_size
    highest = max((max(tokens, default=0) for tokens in sequences), default=0)
    if highest >= rows:
        raise ModelError(
            f"{what}: a text holds token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and {source} has"
            f" embeddings of {rows} tokens alone: its tokenizer was given more than the model. Resize the model's"
            " embeddings (model.resize_token_embeddings(len(tokenizer)), and save both), or use its own tokenizer."
        )


def load_model(
    auto: Any, source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions
) -> PreTrainedModel:
    """A model on `device`, or in partitions. `fastppo.models.loading.model_check` has checked its kind."""
    config = load_config(source)
    outline(auto, source, dtype)  # what its modules and its config alone can tell comes first
    check_kind(auto, config, device, dtype)
    if partitions is None:
        model = _load_whole(auto, source, config, dtype)
        cast(nn.Module, model).to(device)
    else:
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
        if files is not None and quantization_of(_read_config(source)) is None:
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
    given: dict[str, Any] = {}
    quantization = None if source.gguf_file else quantization_of(_read_config(source))
    if source.gguf_file:
        given = {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    elif quantization is not None:
        config = copy.deepcopy(config)
        config.quantization_config = quantization | {"dequantize": True}
    way = "Its files may be of another model than its config.json, or of another version of transformers."
    with model_code(str(source), "loaded", way):
        try:
            model, found = auto.from_pretrained(
                source.place,
                config=config,
                revision=source.revision,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                trust_remote_code=False,
                **given,
            )
        except UNREADABLE as error:
            raise _unreadable(source, config, error) from error
    _check_complete(source, model, found)
    try:
        check_scales(found["unexpected_keys"])
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    if given or quantization is not None:
        forget_quantization(model)
        if dtype == torch.float32:  # some forms are unpacked in bf16 whatever is asked for
            for p in model.parameters():
                p.data = p.data.float()
    check_plain(model)
    return cast(PreTrainedModel, model.eval())


def _check_complete(source: Source, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Whether the files hold all weights in the right shapes: transformers would put random numbers in their place."""
    if wrong := sorted(found["mismatched_keys"]):
        some = "; ".join(f"{name} has {tuple(there)}, not {tuple(asked)}" for name, there, asked in wrong[:4])
        raise ModelError(
            f"{source}: {len(wrong)} tensors in its files do not have the shapes of its config.json ({some});"
            " the two belong to different models, or one of them was changed alone, as vocab_size is where a"
            " vocabulary grows."
        )
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:4]) + ", ..." * (len(missing) > 4)
        raise ModelError(
            f"{source}: {len(missing)} weights of {type(model).__name__} are not in its files ({some}). Give a"
            " checkpoint of this kind of model."
        )


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
