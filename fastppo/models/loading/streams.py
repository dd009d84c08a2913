"""Loading of safetensors files directly into the partitions of ZeRO-3, so that no rank ever holds a whole model.

The loader of transformers merges all files of a checkpoint in the memory of every rank before it fills parameters.
Here each parameter is partitioned as soon as its module is made, and each rank then copies its own partition of every
tensor from the mapped file: a tensor of the file is a view of the page cache, and only the pages of that partition are
read. No rank waits for another, and each rank reads only its own partitions, so a broadcast would save nothing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights, no_tie_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.loading_report import LoadStateDictInfo

from fastppo.config import Dtype
from fastppo.distributed import gathered  # imported first: it sets the accelerator of DeepSpeed
from fastppo.models.loading.quantized import check_scales

# isort: split
import deepspeed
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

log = logging.getLogger("fastppo")

Location = Literal["none", "cpu", "nvme"]


def partition_config(dtype: Dtype, offload: Location = "none", nvme_path: str | None = None) -> dict[str, Any]:
    """DeepSpeed's config for parameters that are partitioned as soon as they are made.

    offload: where the partitions are stored; "none" is the accelerator.
    """
    zero: dict[str, Any] = {"stage": 3}
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
        if offload == "nvme":
            zero["offload_param"]["nvme_path"] = nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed and not used
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
    }


def partition(model: PreTrainedModel, partitions: dict[str, Any]) -> PreTrainedModel:
    """Partition a model that is whole on every rank."""
    deepspeed.zero.Init(module=model, config_dict_or_path=partitions)
    return model


def weight_files(name: str, revision: str | None = None) -> list[Path] | None:
    """The safetensors files of a directory or of a model on the hub; None if it has none, for example only `.bin`."""
    find = partial(cached_file, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    single_file = find(SAFE_WEIGHTS_NAME)
    if single_file is not None:
        return [Path(single_file)]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return None
    files, _ = get_checkpoint_shard_files(name, index, revision=revision)
    return [Path(file) for file in files]


def stream(
    auto: Any,
    name: str,
    files: list[Path],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    partitions: dict[str, Any],
    revision: str | None = None,
) -> PreTrainedModel:
    """Load the model `name` from the given files; each rank gets its partition of every parameter. All ranks call it.

    auto: AutoModelForCausalLM or another such class; partitions: from `partition_config`. Buffers are whole on every
    rank. Raises ValueError, on all ranks, if the files lack a parameter or contain one of another shape, and OSError
    or SafetensorError if they cannot be read.
    """
    outline = _outline(auto, config, dtype)
    with contextlib.ExitStack() as stack:
        readers: dict[str, Any] = {}  # tensor's name in the files -> the open file
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            readers.update(dict.fromkeys(reader.keys(), reader))
        mapping = _map_tensors(outline, readers)
        _check_complete(outline, mapping, readers)
        check_scales(mapping.unexpected)
        model = _make_partitioned(auto, config, dtype, partitions)
        _tie(model, mapping, readers)
        _fill(model, outline, mapping, readers)
    if mapping.unexpected:
        examples = ", ".join(sorted(mapping.unexpected)[:5])
        log.info("%s: %d tensors are not part of the model (%s)", name, len(mapping.unexpected), examples)
    if model.can_generate():
        with contextlib.suppress(OSError):  # most fine-tuned models have none; the model's config replaces it
            model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def copy_parts(auto: Any, model: PreTrainedModel, partitions: dict[str, Any]) -> PreTrainedModel | None:
    """A second model with the same weights; each rank copies its own partitions. None if partitions are on NVMe."""
    sources: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    offload = partitions["zero_optimization"].get("offload_param", {}).get("device")
    if offload == "nvme" or any(p.ds_tensor.final_location == OffloadDeviceEnum.nvme for p in sources.values()):
        return None
    second = _make_partitioned(auto, copy.deepcopy(model.config), model.dtype, partitions)
    second.all_tied_weights_keys = dict(model.all_tied_weights_keys)
    second.tie_weights(recompute_mapping=False)
    for name, parameter in second.named_parameters():
        cast(Any, parameter).ds_tensor.copy_(sources[name].ds_tensor)
    for buffer, source_buffer in zip(second.buffers(), model.buffers(), strict=True):
        buffer.data = source_buffer.clone()
    second.generation_config = copy.deepcopy(model.generation_config)
    cast(Any, second)._weight_conversions = getattr(model, "_weight_conversions", None)
    return cast(PreTrainedModel, second.eval())


def _outline(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: its names and shapes."""
    with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights(), no_tie_weights():
        return auto.from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-any-return]


def _make_partitioned(
    auto: Any, config: PreTrainedConfig, dtype: torch.dtype, partitions: dict[str, Any]
) -> PreTrainedModel:
    # transformers sets the dtypes: DeepSpeed would also round buffers such as rotary frequencies.
    overrides = [DeepSpeedTensorOverride.device]
    with no_init_weights(), no_tie_weights(), _NoBroadcast(config_dict_or_path=partitions, tensor_overrides=overrides):
        return auto.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


class _NoBroadcast(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init without the broadcast from rank 0 of the parameters that are made within this context.

    They have no values yet. A broadcast would send the whole model over the network and touch all of its memory.
    Parameters that are partitioned later (a value head, adapters) have values, which DeepSpeed broadcasts.
    """

    def __enter__(self) -> None:
        self._within = True
        super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        self._within = False
        return super().__exit__(*raised)

    def _zero_init_param(self, param: Any) -> None:
        if self._within:
            self._convert_to_deepspeed_param(param)
            param.partition()
        else:
            super()._zero_init_param(param)


@dataclass
class _Mapping:
    """The mapping from tensors in the files to tensors of the model."""

    plain: dict[str, str] = field(default_factory=dict)  # name in the model -> name in the files
    converted: dict[str, WeightConverter] = field(default_factory=dict)  # first name in the model -> its converter
    unexpected: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    conversions: list[Any] = field(default_factory=list)  # those in use, needed when the model is saved


def _map_tensors(outline: PreTrainedModel, readers: dict[str, Any]) -> _Mapping:
    """Map names in the files to names in the model, with transformers' tables of old names and other layouts."""
    mapping, state = _Mapping(), outline.state_dict()
    conversions = get_model_conversion_mapping(outline)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    rename: Callable[..., tuple[str, str | None]] = partial(
        rename_source_key, base_model_prefix=outline.base_model_prefix, meta_state_dict=state
    )
    filled = set()
    for key in sorted(readers, key=dot_natural_key):  # in the order in which parts of a tensor are merged
        target, pattern = rename(key, renamings, converters)
        if target not in state and key in state:
            target, pattern = rename(key, [], [])
        if target not in state:
            mapping.unexpected.add(target)
        elif pattern is None:
            mapping.plain[target] = key
            filled.add(target)
        else:
            converter = mapping.converted.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(target, key, pattern, cast(Any, partial(readers[key].get_tensor, key)))
            first, *others = converter.target_patterns
            filled |= {target} | {target.replace(first, other) for other in others}
    ties = outline.all_tied_weights_keys
    groups = [{target, source} for target, source in ties.items()]
    filled |= set().union(*(group for group in groups if group & filled))
    mapping.missing = {name for name, _ in outline.named_parameters(remove_duplicate=False)} - filled
    info = LoadStateDictInfo(mapping.missing, mapping.unexpected, set(), [], {}, set())
    outline._adjust_missing_and_unexpected_keys(info)
    mapping.missing, mapping.unexpected = info.missing_keys, info.unexpected_keys
    mapping.conversions = [c for c in conversions if c.was_used()]
    return mapping


def _check_complete(outline: PreTrainedModel, mapping: _Mapping, readers: dict[str, Any]) -> None:
    """Raise ValueError if the files do not contain every parameter of the model in its shape."""
    if mapping.missing:
        examples = ", ".join(sorted(mapping.missing, key=dot_natural_key)[:8])
        raise ValueError(
            f"{len(mapping.missing)} parameters of {type(outline).__name__} are not in its files: {examples}"
            f"{', ...' if len(mapping.missing) > 8 else ''}; give a checkpoint of this architecture"
        )
    state = outline.state_dict()
    shapes = {target: tuple(readers[key].get_slice(key).get_shape()) for target, key in mapping.plain.items()}
    wrong = [f"{t} has {shape}, not {tuple(state[t].shape)}" for t, shape in shapes.items() if shape != state[t].shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors in its files do not have the shapes that its config.json requires:"
            f" {'; '.join(wrong[:4])}; the files and the config belong to different models"
        )


def _tie(model: PreTrainedModel, mapping: _Mapping, readers: dict[str, Any]) -> None:
    """Make each pair of tied weights one parameter, before memory is used for two.

    Files may contain both. They are tied if the two are equal, and else kept separate, as transformers does.
    """
    absent = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(mapping.plain)
    for target, source in list(model.all_tied_weights_keys.items()):
        if not {target, source} <= set(mapping.plain):
            continue
        one, other = (readers[key].get_tensor(key) for key in (mapping.plain[target], mapping.plain[source]))
        if torch.equal(one, other):
            absent.add(target)
            del mapping.plain[target]
        else:
            del model.all_tied_weights_keys[target]
            log.warning("%s and %s differ in the files, so they are not tied, unlike config.json says", target, source)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)


@torch.no_grad()
def _fill(model: PreTrainedModel, outline: PreTrainedModel, mapping: _Mapping, readers: dict[str, Any]) -> None:
    """Copy every tensor of the files into the model; initialise the tensors (mostly buffers) that no file contains."""
    targets: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    targets |= dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in _tensors(outline, mapping, readers):
        _copy_rank_part(targets[name], tensor)
        targets[name]._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers does not initialise it
    uninitialized = [p for p in model.parameters() if not getattr(p, "_is_hf_initialized", False)]
    with gathered(uninitialized, written_by=0):
        model.initialize_weights()
    cast(Any, model)._weight_conversions = mapping.conversions


def _tensors(outline: PreTrainedModel, mapping: _Mapping, readers: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names in the model and their whole tensors: views of a mapped file, or converted from several, one at a time."""
    for name, key in mapping.plain.items():
        yield name, readers[key].get_tensor(key)
    shapes = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    for first, converter in mapping.converted.items():
        try:
            converted = converter.convert(first, model=outline, config=outline.config)
        except RuntimeError as error:
            raise ValueError(f"{first} cannot be converted from the tensors in its files: {error}") from error
        for name, tensors in converted.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{name}, converted from the tensors in its files, has the shape {tuple(tensor.shape)}, but its"
                    f" config.json requires {tuple(shapes[name])}; tensors are missing, or belong to another model"
                )
            yield name, tensor


def _copy_rank_part(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's partition of `whole` into DeepSpeed's tensor of it; a buffer is copied whole."""
    if not isinstance(target, nn.Parameter):
        target.copy_(whole)
        return
    part: Any = target.ds_tensor  # type: ignore[attr-defined]  # (parameter's elements / ranks, rounded up,)
    if part.final_location == OffloadDeviceEnum.nvme:  # DeepSpeed reads it from NVMe and writes it back
        with gathered([target], written_by=0):
            if torch.distributed.get_rank() == 0:
                target.copy_(whole)
        return
    first = part.ds_numel * target.ds_zero_partition_rank  # type: ignore[attr-defined]
    rank_part = whole.reshape(-1)[first : first + part.ds_numel]
    part[: len(rank_part)].copy_(rank_part)
    part[len(rank_part) :].zero_()  # padding past the end of the tensor: uninitialised memory could be NaN
