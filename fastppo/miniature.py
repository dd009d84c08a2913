"""A small model of the same architecture, for what has to be tried on whole weights before partitioned ones exist."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("fastppo")

VOCABULARY = 512
EXPERTS_AND_MORE = 256  # widths of feed-forward layers
TOO_LARGE = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError)


def miniature(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Two layers or more, as many as it takes to have one of each kind, a few heads of full width, random weights.

    Where the widths of a model hang together in a way that is not known here, they stay, and only layers are left out.
    """
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers do not depend on it
        torch.manual_seed(0)
        try:
            model = auto.from_config(_narrow(_shallow(config)), dtype=dtype)
        except TOO_LARGE as error:
            log.info("%s is tried at its full width (%s)", type(config).__name__, error)
            model = auto.from_config(_shallow(config), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.mul_(4.0)  # fresh weights give logits so alike that a wrong one would not stand out
    return model.to(device).eval()  # type: ignore[no-any-return]


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    first_of_each = [kinds.index(kind) for kind in set(kinds)]
    depth = min(text.num_hidden_layers, max([1, *first_of_each]) + 1)
    text.num_hidden_layers = depth
    if kinds:
        text.layer_types = kinds[:depth]
    return config


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.hidden_size
    head_dim = getattr(text, "head_dim", None) or width // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    kept = min(4, heads)
    text.num_attention_heads = kept
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = kept if groups == heads else 1 if groups == 1 or kept < 4 else 2
    text.hidden_size = kept * head_dim
    if getattr(text, "word_embed_proj_dim", None) == width:
        text.word_embed_proj_dim = text.hidden_size
    for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), EXPERTS_AND_MORE))
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return config
