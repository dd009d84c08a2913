"""Writing a trained value function so that transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel

from fastppo.errors import ModelError
from fastppo.models.critics.form import (
    HEAD_FILE,
    classifier_config,
    classifies_last_states,
    linear_head,
)
from fastppo.models.loading.weights import HEAD_SETTING
from fastppo.models.lora import merged_state
from fastppo.models.roles import Critic, Policy


def save_value_model(role: Critic | Policy, folder: Path, state: dict[str, Tensor] | None = None) -> str:
    """Write backbone and value head into `folder`, adapters merged, in the dtype of the run; returns how to load them.

    As AutoModelForTokenClassification with one label, whose logit at a token is V of the text up to it, this token
    included: V of the state that the next token is written in. The trainer's V of a response token is therefore the
    logit at the position before (`Packed.predictors`). Families without such a class get their backbone, and the value
    head beside it (`critics.form`).

    role: with a value head; its vocabulary head is not written. state: of the role, whole (`whole_state`), given where
    its parameters are partitioned. Raises ModelError if the backbone is none that transformers would load again, and
    OSError or safetensors' and transformers' own errors if a file cannot be written.
    """
    state = role.state_dict() if state is None else state
    head = {part: state[f"value_head.{part}"].detach() for part in ("weight", "bias")}
    weights, config = _backbone_state(role, state), role.model.config
    classifier = _token_classifier(config, role.model.dtype)
    if classifier is not None:
        model, name = classifier
        prefix = f"{model.base_model_prefix}."
        named = {prefix + key: tensor for key, tensor in weights.items()}
        named |= {f"{name}.{part}": tensor for part, tensor in head.items()}
        if named.keys() == model.state_dict().keys():
            model.save_pretrained(folder, state_dict=named)
            return "AutoModelForTokenClassification loads it"
    model = _backbone(config, role.model.dtype)
    if weights.keys() != model.state_dict().keys():
        raise ModelError(
            f"transformers would load a {type(model).__name__} for {config.model_type}, whose weights have other names"
            f" than those of the critic's backbone, a {type(role.model.base_model).__name__}. Its checkpoints have it."
        )
    model.save_pretrained(folder, state_dict=weights)
    save_file({part: tensor.cpu().contiguous() for part, tensor in head.items()}, folder / HEAD_FILE)
    return (
        f"transformers has no token classifier for {config.model_type} with a linear head and a bias, so its backbone"
        f" is what AutoModel loads, and {HEAD_FILE} has the value head"
    )


def _backbone_state(role: Critic | Policy, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole weights of the backbone alone, with merged adapters, by their names in it.

    state: of the role. Merged weights are in host memory (`merged_state`).
    """
    model = role.model
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    own = {name.removeprefix("model."): x.detach() for name, x in state.items() if name.startswith(f"model.{prefix}")}
    merged = merged_state(model, own) if hasattr(model, "peft_config") else own
    return {name.removeprefix(prefix): tensor for name, tensor in merged.items()}


def _token_classifier(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, str] | None:
    """The token classifier of the family on the meta device, and the name of its head; None if it cannot have V.

    A head without a bias could not: the trained one is no part of the weight.
    """
    labelled = classifier_config(config)
    if not classifies_last_states(labelled):
        return None
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(labelled, dtype=dtype, attn_implementation="eager")
    named_head = linear_head(model)
    return None if named_head is None or named_head[1].bias is None else (model, named_head[0])


def _backbone(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The backbone on the meta device, with the setting that tells of the value head beside it."""
    marked = copy.deepcopy(config)
    setattr(marked, HEAD_SETTING, HEAD_FILE)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(marked, dtype=dtype, attn_implementation="eager")
    return model
