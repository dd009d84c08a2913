"""Reading the weights that a separate critic starts from where they are not the actor's: `critic.model`."""

from __future__ import annotations

from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.utils.hub import cached_file

from fastppo.distributed import gathered
from fastppo.errors import ModelError
from fastppo.models.critics.form import auto_class, classifier_config, classifies_last_states, head_file, linear_head
from fastppo.models.loading.source import Source
from fastppo.models.loading.weights import Partitions, check_one_label, is_classifier, load_config, load_model
from fastppo.models.roles import ValueHead, fuse_head, width_of

WAY = "Start from a language model, or from a classifier with num_labels=1."


def check_value_model(source: Source) -> None:
    """Check, without reading weights, that a critic can start from this model.

    A classifier has one label, whose head reads the last hidden states. Raises ModelError.
    """
    config = load_config(source)
    auto = auto_class(config)
    if auto is AutoModelForTokenClassification or is_classifier(config):
        check_one_label(source, config, WAY)
    if auto is AutoModelForTokenClassification and not classifies_last_states(classifier_config(config)):
        raise _no_linear_head(source, (config.architectures or [""])[0])


def load_value_model(
    source: Source, dtype: torch.dtype, device: torch.device, partitions: Partitions
) -> tuple[PreTrainedModel, ValueHead]:
    """Backbone and value head of a critic (`check_value_model`).

    From an exported critic (`critics.write`), or any token classifier with one label, V is its logit; from a sequence
    classifier, a reward model, V(s) is its score at first; from a language model V is zero at first.
    """
    config = load_config(source)
    auto = auto_class(config)
    model = load_model(auto, source, dtype, device, partitions)
    if auto is AutoModelForCausalLM:
        return cast(PreTrainedModel, model.base_model), ValueHead(width_of(fuse_head(model)), dtype, device)
    if auto is AutoModel:
        head = _head_of_file(source, str(head_file(config)))
        return model, _value_head(head["weight"], head.get("bias"), dtype, device)
    named_head = linear_head(model)
    if named_head is None:
        raise _no_linear_head(source, type(model).__name__)
    linear = named_head[1]
    with gathered(list(linear.parameters())):
        head_on_device = _value_head(linear.weight, linear.bias, dtype, device)
    return cast(PreTrainedModel, model.base_model), head_on_device


@torch.no_grad()
def _value_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> ValueHead:
    """weight: (1, H); bias: (1,), None: zero."""
    head = ValueHead(weight.shape[-1], dtype, device)
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    return head


def _head_of_file(source: Source, name: str) -> dict[str, Tensor]:
    try:
        path = cached_file(source.place, name, revision=source.revision)
        head = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{source}: its config names the value head {name}, and this file could not be read"
            f" ({' '.join(str(error).split())}). Give the whole folder that a run has exported."
        ) from error
    if head.get("weight", torch.empty(0)).dim() != 2 or head["weight"].shape[0] != 1:
        raise ModelError(f"{source}: {name} is no value head: it has no `weight` of shape (1, width).")
    return head


def _no_linear_head(source: Source, name: str) -> ModelError:
    return ModelError(
        f"{source} ({name}) has no head that is one linear layer on the last hidden states, so its values cannot be"
        " those of a critic. Start from a language model, a reward model, or the critic/ of a run."
    )
