"""A small model of the same architecture, for what has to be tried on whole weights where there are only partitions."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.model_code import model_code

log = logging.getLogger("fastppo")

HEADS, FEED_FORWARD, VOCABULARY = 4, 256, 512

# What transformers raises for widths that do not go together.
MISFIT = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError, StrictDataclassError)


def miniature(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Two layers, or as many as it takes to have each kind; a few heads of full width; random weights.

    auto: AutoModelForCausalLM or another such class, or a model's own. Where a model's widths hang together in a way
    that is not known here, they stay as they are and only layers are left out. Raises FastPPOError where its code does
    not even take that.
    """
    make = getattr(auto, "from_config", None) or auto._from_config
    as_defined = {"dtype": dtype, "attn_implementation": "eager"}  # transformers' SDPA leaves out Gemma-2's softcap
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers do not depend on it
        torch.manual_seed(0)
        try:
            model = make(_narrow(_shallow(config)), **as_defined)
        except MISFIT as error:
            log.info("%s cannot be made narrower to try it on packed rows (%s)", type(config).__name__, error)
            way = "Only models that can be made small are tried before they are loaded; use zero.stage below 3."
            with model_code(type(config).__name__, "made with few layers", way):
                model = make(_shallow(config), **as_defined)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.mul_(4.0)  # fresh weights give logits so alike that a wrong one would not stand out
    return model.to(device).eval()  # type: ignore[no-any-return]


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    lists = {name: x for name, x in text.to_dict().items() if isinstance(x, list) and len(x) == depth > 2}
    kinds = [tuple(str(x[i]) for x in lists.values()) for i in range(depth)]  # what is said of each layer
    first_of_each = [kinds.index(kind) for kind in set(kinds)]
    text.num_hidden_layers = min(depth, max([1, *first_of_each]) + 1)
    for name, values in lists.items():
        setattr(text, name, values[: text.num_hidden_layers])
    return config


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Fewer heads and not narrower ones: scales of rotary embeddings may come as lists of a head's width."""
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.hidden_size
    kept = min(HEADS, heads)
    key_heads = getattr(text, "num_key_value_heads", None)
    if key_heads is not None:
        text.num_key_value_heads = kept if key_heads == heads else kept // 2 if key_heads > 1 and kept == HEADS else 1
    text.num_attention_heads = kept
    text.hidden_size = kept * (getattr(text, "head_dim", None) or width // heads)
    if getattr(text, "word_embed_proj_dim", None) == width:
        text.word_embed_proj_dim = text.hidden_size
    for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), FEED_FORWARD))
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return config
