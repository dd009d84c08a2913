"""Weights from safetensors files straight into the parts of ZeRO-3, so that no rank ever holds a whole model.

Hugging Face's own loader merges all files of a checkpoint in the memory of every rank before it hands anything out.
Here each parameter is partitioned as soon as its module is made, and each rank then copies its own part of every
tensor out of the mapped file: a tensor of the file is a view of the page cache, of which only the pages of that part
are read. No rank waits for another, and no rank reads what is not its own, so there is nothing to gain by a broadcast.
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

from fastppo.distributed import gathered  # first: it tells DeepSpeed which accelerator to take
from fastppo.models.loading.quantized import check_scales

# isort: split
import deepspeed
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

log = logging.getLogger("fastppo")

Location = Literal["none", "cpu", "nvme"]


def partition_config(
    dtype: Literal["fp32", "bf16"], offload: Location = "none", nvme_path: str | None = None
) -> dict[str, Any]:
    """DeepSpeed's config for parameters that are partitioned at birth.

    offload: where the parts live; "none" is the accelerator.
    """
    zero: dict[str, Any] = {"stage": 3}
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
        if offload == "nvme":
            zero["offload_param"]["nvme_path"] = nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; nothing here has a batch
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
    }


def partition(model: PreTrainedModel, partitions: dict[str, Any]) -> PreTrainedModel:
    """Partition a model that is whole on every rank."""
    deepspeed.zero.Init(module=model, config_dict_or_path=partitions)
    return model


def weight_files(name: str, revision: str | None = None) -> list[Path] | None:
    """The safetensors files of a directory or of a model on the hub; None where there are none, but `.bin` say."""
    find = partial(cached_file, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    whole = find(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [Path(whole)]
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
    """The model `name` of the given files, each rank with its own part of every parameter. All ranks call it.

    auto: AutoModelForCausalLM or another such class; partitions: what `partition_config` gives. Buffers are whole on
    every rank. Raises ValueError, on all ranks alike, if the files lack a parameter or hold one of another shape, and
    OSError or SafetensorError where they cannot be read.
    """
    outline = _outline(auto, config, dtype)
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}  # tensor's name in the files -> the open file
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            found.update(dict.fromkeys(reader.keys(), reader))
        plan = _match(outline, found)
        _refuse(outline, plan, found)
        check_scales(plan.unexpected)
        model = _born_partitioned(auto, config, dtype, partitions)
        _tie(model, plan, found)
        _fill(model, outline, plan, found)
    if plan.unexpected:
        some = ", ".join(sorted(plan.unexpected)[:5])
        log.info("%s: %d tensors have no place in the model (%s)", name, len(plan.unexpected), some)
    if model.can_generate():
        with contextlib.suppress(OSError):  # few fine-tuned models come with one; the model's config stands in for it
            model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def copy_parts(auto: Any, model: PreTrainedModel, partitions: dict[str, Any]) -> PreTrainedModel | None:
    """A second model of the same weights: each rank copies its own parts. None where parts are on disks."""
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    offload = partitions["zero_optimization"].get("offload_param", {}).get("device")
    if offload == "nvme" or any(p.ds_tensor.final_location == OffloadDeviceEnum.nvme for p in own.values()):
        return None
    double = _born_partitioned(auto, copy.deepcopy(model.config), model.dtype, partitions)
    double.all_tied_weights_keys = dict(model.all_tied_weights_keys)
    double.tie_weights(recompute_mapping=False)
    for name, parameter in double.named_parameters():
        cast(Any, parameter).ds_tensor.copy_(own[name].ds_tensor)
    for buffer, other in zip(double.buffers(), model.buffers(), strict=True):
        buffer.data = other.clone()
    double.generation_config = copy.deepcopy(model.generation_config)
    cast(Any, double)._weight_conversions = getattr(model, "_weight_conversions", None)
    return cast(PreTrainedModel, double.eval())


def _outline(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory: its names and shapes."""
    with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights(), no_tie_weights():
        return auto.from_config(copy.deepcopy(config), dtype=dtype)  # type: ignore[no-any-return]


def _born_partitioned(
    auto: Any, config: PreTrainedConfig, dtype: torch.dtype, partitions: dict[str, Any]
) -> PreTrainedModel:
    # Types are left to transformers, as everywhere else: DeepSpeed would round buffers such as rotary frequencies.
    overrides = [DeepSpeedTensorOverride.device]
    with no_init_weights(), no_tie_weights(), _Unsent(config_dict_or_path=partitions, tensor_overrides=overrides):
        return auto.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


class _Unsent(deepspeed.zero.Init):  # type: ignore[misc]
    """zero.Init, but parameters that are made within this context are not sent from rank 0 to the others.

    They hold nothing yet. Sending them would move the whole model over the network and touch all of its memory. Those
    that are partitioned later (a value head, adapters) have values, which DeepSpeed makes the same on all ranks.
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
class _Plan:
    """Which tensors of the files become which of the model."""

    plain: dict[str, str] = field(default_factory=dict)  # name in the model -> name in the files
    converted: dict[str, WeightConverter] = field(default_factory=dict)  # first name in the model -> how it is made
    unexpected: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    conversions: list[Any] = field(default_factory=list)  # those in use, for a model that is saved again


def _match(outline: PreTrainedModel, found: dict[str, Any]) -> _Plan:
    """Names in the files to names in the model, by all that transformers knows of old names and other layouts."""
    plan, state = _Plan(), outline.state_dict()
    conversions = get_model_conversion_mapping(outline)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    rename: Callable[..., tuple[str, str | None]] = partial(
        rename_source_key, base_model_prefix=outline.base_model_prefix, meta_state_dict=state
    )
    filled = set()
    for key in sorted(found, key=dot_natural_key):  # in the order in which parts of a tensor are put together
        target, pattern = rename(key, renamings, converters)
        if target not in state and key in state:
            target, pattern = rename(key, [], [])
        if target not in state:
            plan.unexpected.add(target)
        elif pattern is None:
            plan.plain[target] = key
            filled.add(target)
        else:
            converter = plan.converted.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(target, key, pattern, cast(Any, partial(found[key].get_tensor, key)))
            first, *others = converter.target_patterns
            filled |= {target} | {target.replace(first, other) for other in others}
    ties = outline.all_tied_weights_keys
    groups = [{target, source} for target, source in ties.items()]
    filled |= set().union(*(group for group in groups if group & filled))
    plan.missing = {name for name, _ in outline.named_parameters(remove_duplicate=False)} - filled
    info = LoadStateDictInfo(plan.missing, plan.unexpected, set(), [], {}, set())
    outline._adjust_missing_and_unexpected_keys(info)
    plan.missing, plan.unexpected = info.missing_keys, info.unexpected_keys
    plan.conversions = [c for c in conversions if c.was_used()]
    return plan


def _refuse(outline: PreTrainedModel, plan: _Plan, found: dict[str, Any]) -> None:
    """Raise ValueError if the files do not hold this model."""
    if plan.missing:
        some = ", ".join(sorted(plan.missing, key=dot_natural_key)[:8])
        raise ValueError(
            f"{len(plan.missing)} parameters of {type(outline).__name__} are not in its files: {some}"
            f"{', ...' if len(plan.missing) > 8 else ''}; give a checkpoint of this kind of model"
        )
    state = outline.state_dict()
    shapes = {target: tuple(found[key].get_slice(key).get_shape()) for target, key in plan.plain.items()}
    wrong = [f"{t} has {shape}, not {tuple(state[t].shape)}" for t, shape in shapes.items() if shape != state[t].shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors in its files do not have the shapes that its config.json asks for:"
            f" {'; '.join(wrong[:4])}; the two belong to different models"
        )


def _tie(model: PreTrainedModel, plan: _Plan, found: dict[str, Any]) -> None:
    """Make tied weights one parameter, before they take up room as two.

    Files may hold both. They are tied if they are equal there, and else left apart, as transformers does.
    """
    absent = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(plan.plain)
    for target, source in list(model.all_tied_weights_keys.items()):
        if not {target, source} <= set(plan.plain):
            continue
        one, other = (found[key].get_tensor(key) for key in (plan.plain[target], plan.plain[source]))
        if torch.equal(one, other):
            absent.add(target)
            del plan.plain[target]
        else:
            del model.all_tied_weights_keys[target]
            log.warning("%s and %s differ in the files, so they are not tied as config.json says", target, source)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)


@torch.no_grad()
def _fill(model: PreTrainedModel, outline: PreTrainedModel, plan: _Plan, found: dict[str, Any]) -> None:
    """Every tensor of the plan into the model; what no file holds (buffers, above all) as the model begins it."""
    targets: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    targets |= dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in _tensors(outline, plan, found):
        _copy_own_part(targets[name], tensor)
        targets[name]._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone then
    rest = [p for p in model.parameters() if not getattr(p, "_is_hf_initialized", False)]
    with gathered(rest, written_by=0):
        model.initialize_weights()
    cast(Any, model)._weight_conversions = plan.conversions


def _tensors(outline: PreTrainedModel, plan: _Plan, found: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names in the model and their whole tensors: views of a mapped file, or one at a time made of several of them."""
    for name, key in plan.plain.items():
        yield name, found[key].get_tensor(key)
    shapes = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    for first, converter in plan.converted.items():
        try:
            made = converter.convert(first, model=outline, config=outline.config)
        except RuntimeError as error:
            raise ValueError(f"{first} cannot be put together from the tensors in its files: {error}") from error
        for name, tensors in made.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{name}, put together from the tensors in its files, has the shape {tuple(tensor.shape)}, and its"
                    f" config.json asks for {tuple(shapes[name])}; some are missing, or belong to another model"
                )
            yield name, tensor


def _copy_own_part(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` to where DeepSpeed keeps it; a buffer is copied whole."""
    if not isinstance(target, nn.Parameter):
        target.copy_(whole)
        return
    part: Any = target.ds_tensor  # type: ignore[attr-defined]  # (parameter's elements / ranks, rounded up,)
    if part.final_location == OffloadDeviceEnum.nvme:  # DeepSpeed fetches it from the disks and writes it back
        with gathered([target], written_by=0):
            if torch.distributed.get_rank() == 0:
                target.copy_(whole)
        return
    first = part.ds_numel * target.ds_zero_partition_rank  # type: ignore[attr-defined]
    mine = whole.reshape(-1)[first : first + part.ds_numel]
    part[: len(mine)].copy_(mine)
    part[len(mine) :].zero_()  # past the end of the tensor: what happened to be in memory could be NaN
