"""LoRA: adapters of low rank on frozen weights (Hu et al., 2021), by peft.

A weight W of shape (out, in) stays as it is, and W + alpha / rank * B A is used: A of shape (rank, in) and B of shape
(out, rank) train, in the model's dtype, and B starts at zero. So the actor with its adapters off is its own reference,
exactly, for as long as the run lasts (`models.adapters_off`).

Sampling runs on the same module, adapters unmerged: a merged weight rounds differently, and the first ratio of a batch
would no longer be 1. There is no dropout, for the same reason.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastppo.config import LoraConfig
from fastppo.models.roles import ModelError

log = logging.getLogger("fastppo")

PLAIN = (nn.Linear.forward, Conv1D.forward)  # a router may be a linear layer whose forward pass does more (PhiMoE)

NAME = "default"  # peft's name of a model's only adapter


def add_adapters(
    model: PreTrainedModel, role: str, lora: LoraConfig, *, seed: int, source: str, revision: str | None = None
) -> None:
    """Freeze the model, and put an adapter on each of `lora.targets` whose weight would have trained.

    model: with `requires_grad` as `models.set_trainable` leaves it. role: `actor` or `critic`, for messages.
    seed: of A, which is the same on every rank. source, revision: where the weights are from; an exported adapter names
    it. Raises ModelError if a target fits no linear layer, or if none of them would have trained.
    """
    import peft  # it takes two seconds, which runs without LoRA need not spend

    targets = _targets(model, role, lora.targets)
    trained = [name for name, layer in targets.items() if layer.weight.requires_grad]
    if not trained:
        raise ModelError(
            f"{role}.lora.targets = {lora.targets} names {len(targets)} linear layers of {type(model).__name__}, and"
            f" {role}.train lets the weights of none of them learn, so there is nothing to adapt."
            f" Set {role}.train to all, or to layers that hold targets."
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
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        peft.inject_adapter_in_model(config, model, NAME)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"{role}.lora.targets = {lora.targets}: peft cannot adapt them ({error})") from error
    finally:
        torch.set_rng_state(before)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s.lora: adapters on %d linear layers, %.2f M parameters", role, len(trained), size / 1e6)


def _targets(model: PreTrainedModel, role: str, targets: str) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers that the setting names. The vocabulary head is none of them: `models.FusedHead` is its own."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    linear = {name: layer for name, layer in linear.items() if type(layer).forward in PLAIN}
    if targets == "all-linear":
        return linear
    found: set[str] = set()
    for pattern in (part.strip() for part in targets.split(",")):
        fitting = {name for name in linear if name.endswith(f".{pattern}") or fnmatch(name, pattern)}
        if not fitting:
            raise ModelError(
                f"{role}.lora.targets = {targets}: no linear layer of {type(model).__name__} fits {pattern!r}. Give"
                f" all-linear, or some of {', '.join(sorted({name.rpartition('.')[2] for name in linear}))} (names or"
                " patterns such as *.mlp.*; embeddings and the vocabulary head take no adapter)."
            )
        found |= fitting
    return {name: layer for name, layer in linear.items() if name in found}


def merged_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state with its adapters merged, under the names that it has without them.

    state: that of the model where its own parameters are not whole (`sampling_weights.whole_state`).
    Each merged weight is a new tensor in the host's memory, its sum computed in fp32 where the model is and rounded
    once; the model stays as it is, and its device needs no room for a second one.
    """
    from peft.tuners.lora import LoraLayer

    config: Any = model.peft_config[NAME]
    adapted = {name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    state, merged = model.state_dict() if state is None else state, {}
    for key, value in state.items():
        owner, _, part = key.partition(".base_layer.")
        if owner in adapted and part == "weight":
            a, b = (state[f"{owner}.lora_{x}.{NAME}.weight"].float() for x in "AB")  # (rank, in), (out, rank)
            delta = config.lora_alpha / config.r * (b @ a)
            value = (value.float() + (delta.T if config.fan_in_fan_out else delta)).to(value.dtype)  # GPT-2: (in, out)
            value = value.cpu()
        if key.partition(".lora_")[0] not in adapted:
            merged[f"{owner}.{part}" if owner in adapted else key] = value
    return merged


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Write what `peft.PeftModel.from_pretrained(base, folder)` loads."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)  # none has an adapter
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config[NAME]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
