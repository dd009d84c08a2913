"""LoRA: adapters of low rank on frozen weights (Hu et al., 2021), computed by peft.

A weight W of shape (out, in) is frozen, and the forward pass uses W + alpha / rank * B A: A of shape (rank, in) and B
of shape (out, rank) train, in the dtype of the model, and B is initialised to zero. So the actor with its adapters off
is exactly its starting point, and serves as the reference during the whole run (`adapters_off`).

Sampling uses the same module with unmerged adapters: a merged weight rounds differently, and the first ratio of a
batch would no longer be 1. For the same reason the adapters have no dropout.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo.config import LoraConfig
from fastppo.errors import ModelError
from fastppo.models.layers.classes import own_class

log = logging.getLogger("fastppo")

# A subclass with another forward pass is no plain linear layer: PhiMoE's router computes more.
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)

NAME = "default"  # peft's name of the only adapter of a model


def add_adapters(
    model: PreTrainedModel, role: str, lora: LoraConfig, *, seed: int, source: str, revision: str | None = None
) -> None:
    """Freeze the model, and add an adapter to each linear layer of `lora.targets` whose weight is trainable.

    model: `requires_grad` is set by `set_trainable`. role: `actor` or `critic`, for messages. seed: of the initial
    values of A, the same on every rank. source, revision: the origin of the weights, which an exported adapter names.
    Raises ModelError if a target matches no linear layer, if none of the layers is trainable, or if adapters are to be
    exported that peft would load onto other weights.
    """
    import peft  # the import takes two seconds, which runs without LoRA save

    targets = _targets(model, role, lora.targets)
    trained = [name for name, layer in targets.items() if layer.weight.requires_grad]
    if not trained:
        raise ModelError(
            f"{role}.lora.targets = {lora.targets} names {len(targets)} linear layers of {type(model).__name__}, and"
            f" {role}.train makes none of their weights trainable, so no adapter can be added."
            f" Set {role}.train to all, or to layers that contain targets."
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
        target_modules=trained,
        fan_in_fan_out=all(isinstance(targets[name], Conv1D) for name in trained),
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
        revision=revision,
    )
    if lora.exports_adapters and _taken_for_experts(config, model):
        raise ModelError(
            f"{role}.lora.export is adapters, but peft would load adapters of {type(model).__name__} onto other"
            " weights: it takes dense layers and shared experts for the experts beside them, which have layers of these"
            f" names in older checkpoints. Set {role}.lora.export to merged, or {role}.lora.targets to"
            " q_proj,k_proj,v_proj,o_proj."
        )
    random_state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with _layers_as_named(model):
            peft.inject_adapter_in_model(config, model, NAME)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"{role}.lora.targets = {lora.targets}: peft cannot adapt them ({error})") from error
    finally:
        torch.set_rng_state(random_state)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s.lora: adapters on %d linear layers, %.2f M parameters", role, len(trained), size / 1e6)


@contextmanager
def _layers_as_named(model: PreTrainedModel) -> Iterator[None]:
    """Within this context peft adapts the layers that it is given the names of.

    For some types of models it changes the names first, from those that experts had in transformers 4. There every
    `gate_proj` was of an expert; where another layer has this name, peft would leave it out and adapt the experts in
    its stead. So it is not told the type.
    """
    settings = vars(model.config)
    before = settings.copy()  # which usually has no type: the class of the config has it
    settings["model_type"] = ""
    try:
        yield
    finally:
        settings.pop("model_type")
        settings.update(before)


def _taken_for_experts(config: Any, model: PreTrainedModel) -> bool:
    """Whether peft, which will know the type of the model, would load these adapters onto experts."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model, None)
    except ValueError:  # it would not load them at all
        return True
    return bool(read.target_parameters)


def _targets(model: PreTrainedModel, role: str, targets: str) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers that the setting names. The vocabulary head is excluded: it is a `roles.FusedHead`."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    linear = {name: layer for name, layer in linear.items() if own_class(layer).forward in PLAIN_FORWARDS}
    if targets == "all-linear":
        return linear
    target_names: set[str] = set()
    for pattern in (part.strip() for part in targets.split(",")):
        matches = {name for name in linear if name.endswith(f".{pattern}") or fnmatch(name, pattern)}
        if not matches:
            raise ModelError(
                f"{role}.lora.targets = {targets}: no linear layer of {type(model).__name__} matches {pattern!r}. Give"
                f" all-linear, or some of {', '.join(sorted({name.rpartition('.')[2] for name in linear}))} (names or"
                " patterns such as *.mlp.*; embeddings and the vocabulary head cannot have an adapter)."
            )
        target_names |= matches
    return {name: layer for name, layer in linear.items() if name in target_names}


def merged_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of the model with merged adapters, under the parameter names of a model without adapters.

    state: given where the parameters of the model are partitioned (`sampling_weights.whole_state`). Each merged weight
    is a new tensor in host memory; its sum is computed in fp32 on the device of the model and rounded once. The model
    does not change, and its device needs no memory for a second model.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    state, merged = model.state_dict() if state is None else state, {}
    for key, value in state.items():
        owner, _, part = key.partition(".base_layer.")
        if owner in adapted and part == "weight":
            value = merged_weight(model, value, *(state[f"{owner}.lora_{x}.{NAME}.weight"] for x in "AB")).cpu()
        if key.partition(".lora_")[0] not in adapted:
            merged[f"{owner}.{part}" if owner in adapted else key] = value
    return merged


def merged_weight(model: PreTrainedModel, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + alpha / rank * B A as a new tensor, summed in fp32 and rounded once to the dtype of W.

    weight: (out, in), or (in, out) in GPT-2; a: (rank, in); b: (out, rank).
    """
    config: Any = model.peft_config[NAME]
    delta = config.lora_alpha / config.r * (b.float() @ a.float())
    merged: Tensor = (weight.float() + (delta.T if config.fan_in_fan_out else delta)).to(weight.dtype)
    return merged


def adapter_weights(model: nn.Module) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of each adapted weight, by the id of the weight; empty for a model without adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    weights = [tuple(getattr(layer, f"lora_{x}")[NAME].weight for x in "AB") for layer in layers]
    return {id(layer.get_base_layer().weight): (a, b) for layer, (a, b) in zip(layers, weights, strict=True)}


def save_adapters(model: PreTrainedModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapters in the form that `peft.PeftModel.from_pretrained(base, folder)` loads.

    state: given where the parameters of the model are partitioned (`sampling_weights.whole_state`).
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    adapters = get_peft_model_state_dict(model, state, adapter_name=NAME, save_embedding_layers=False)
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config[NAME]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this context the LoRA adapters of a model are off.

    Only for passes without gradient: activation checkpointing would recompute them later with adapters. The switch of
    peft also sets `requires_grad` to False, which must not happen to a parameter of a DeepSpeed optimizer.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
