"""The forms that a value function has on disk.

A token classifier with one label, where transformers has one whose logits are a linear layer, with a bias, on the last
hidden states: that layer is then the value head. In other families (OPT, OLMo, Granite, ...) it is the backbone alone,
which AutoModel loads, and beside it the value head in a file of its own: their sequence classifiers, where there are
any, have a head without a bias.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastppo.models.loading.miniature import MINIATURE_ERRORS, miniature
from fastppo.models.loading.weights import HEAD_SETTING, is_classifier, is_token_classifier

HEAD_FILE = "value_head.safetensors"  # `weight` (1, H) and `bias` (1,), in the dtype of the backbone
LABEL = "value"  # of the classifier's one logit


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads the weights which a critic starts from, by what its config says they are."""
    if is_token_classifier(config):
        return AutoModelForTokenClassification
    if is_classifier(config):
        return AutoModelForSequenceClassification
    return AutoModel if head_file(config) is not None else AutoModelForCausalLM


def head_file(config: PreTrainedConfig) -> str | None:
    """The name of the file with the value head, beside the weights of a backbone; None for every other model."""
    name = getattr(config, HEAD_SETTING, None)
    return name if isinstance(name, str) else None


def linear_head(model: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """Name and module of the linear layer with one output that is all of a model outside of its backbone, or None."""
    children = dict(model.named_children())
    heads = {n: m for n, m in children.items() if m is not model.base_model and next(m.parameters(), None) is not None}
    name, head = next(iter(heads.items()), ("", None))
    return (name, head) if len(heads) == 1 and isinstance(head, nn.Linear) and head.out_features == 1 else None


def classifier_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy for a token classifier with one label."""
    labelled = copy.deepcopy(config)
    if hasattr(labelled, HEAD_SETTING):  # of the model that the run started from
        delattr(labelled, HEAD_SETTING)
    labelled.num_labels, labelled.id2label, labelled.label2id = 1, {0: LABEL}, {LABEL: 0}
    return labelled


def classifies_last_states(config: PreTrainedConfig) -> bool:
    """Whether the family has a token classifier with one label whose logits are its linear head on the last states.

    config: of such a classifier. A small random model of it is computed, since a class may do more than its modules
    show; bit for bit, on a CPU, in fp32.
    """
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return False
    try:
        small = miniature(AutoModelForTokenClassification, config, torch.float32, torch.device("cpu"))
        named_head = linear_head(small)
        if named_head is None:
            return False
        head, tokens = named_head[1], torch.tensor([[3, 1, 2, 5, 4]])
        with torch.no_grad():
            if head.bias is not None:
                head.bias.fill_(0.5)  # zero at first
            logits = small(tokens, use_cache=False).logits
            return torch.equal(logits, head(small.base_model(tokens, use_cache=False).last_hidden_state))
    except MINIATURE_ERRORS:  # what trains has passed the check at load, so its classifier has some trait of its own
        return False
