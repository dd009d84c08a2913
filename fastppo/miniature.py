"""A small model of the same architecture, for what has to be tried before, or without, loading whole weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.rotary import SWITCHES, ropes

log = logging.getLogger("fastppo")

HEADS, FEED_FORWARD, EXPERTS, VOCABULARY = 4, 256, 8, 512
WINDOW, SWITCH = 8, 16  # positions of a sliding window, and tokens up to which longrope turns by its short factors
KINDS = 4  # a list with more different values, one for each layer, does not tell kinds of layers

# Names under which configs have the width of a feed-forward layer, the number of experts, a sliding window.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size")
# Every so many layers one is of another kind.
INTERVALS = ("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period", "attn_layer_period")

# What transformers raises for widths that do not go together.
MISFIT = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError, StrictDataclassError)


def miniature(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Two layers, or as many as it takes to have each kind; a few heads of full width; random weights.

    auto: AutoModelForCausalLM or another such class. Windows and the lengths at which rotary frequencies switch are
    short, so that a short sequence goes beyond them. Where a model's widths hang together in a way that is not known
    here, they stay as they are and only layers are left out.
    """
    as_defined = {"dtype": dtype, "attn_implementation": "eager"}  # transformers' SDPA leaves out Gemma-2's softcap
    steps: tuple[Callable[[PreTrainedConfig], object], ...] = (_shorten, _shallow, _narrow)
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers do not depend on it
        for count in range(len(steps), -1, -1):
            torch.manual_seed(0)
            try:
                small = copy.deepcopy(config)
                for step in steps[:count]:
                    step(small)
                model = auto.from_config(small, **as_defined)
                break
            except MISFIT as error:
                if count == 0:
                    raise
                log.info("%s cannot be made smaller by %s (%s)", type(config).__name__, steps[count - 1].__doc__, error)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:
                    parameter.mul_(4.0)  # fresh weights give logits so alike that a wrong one would not stand out
    return model.to(device).eval()  # type: ignore[no-any-return]


def _shorten(config: PreTrainedConfig) -> None:
    """short windows and rotary switches"""
    text = config.get_text_config()
    for name in WINDOWS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > WINDOW:
            setattr(text, name, WINDOW)
    for rope in ropes(text):
        if rope["rope_type"] != SWITCHES or rope["original_max_position_embeddings"] <= SWITCH:
            continue
        longer = text.max_position_embeddings / rope["original_max_position_embeddings"]
        text.max_position_embeddings = int(SWITCH * longer)
        for holder in (rope, vars(text)):
            if "original_max_position_embeddings" in holder:
                holder["original_max_position_embeddings"] = SWITCH


def _shallow(config: PreTrainedConfig) -> None:
    """layers left out"""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    lists = {name: values for name, values in _lists_of_layers(text)}
    first_of_each = [[*map(repr, values)].index(repr(value)) for values in lists.values() for value in values]
    if (getattr(text, "first_k_dense_replace", None) or 0) > 1:
        text.first_k_dense_replace = 1
    intervals = [n for name in INTERVALS if isinstance(n := getattr(text, name, None), int)]
    text.num_hidden_layers = min(depth, max([1, *first_of_each, *intervals]) + 1)
    for name, values in lists.items():
        setattr(text, name, values[: text.num_hidden_layers])


def _lists_of_layers(text: PreTrainedConfig) -> Iterator[tuple[str, list[Any]]]:
    """Lists that say of each layer what kind it is, by name."""
    for name, values in vars(text).items():
        if not isinstance(values, list) or len(values) != text.num_hidden_layers or name.endswith(("_id", "_ids")):
            continue
        if name == "layer_types" or len({*map(repr, values)}) <= KINDS:
            yield name, values


def _narrow(config: PreTrainedConfig) -> None:
    """fewer heads and experts, narrower layers, a smaller vocabulary"""
    # Heads are not narrower: scales of rotary embeddings may come as lists of a head's width.
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
    for names, most in ((WIDTHS, FEED_FORWARD), (EXPERT_COUNTS, EXPERTS)):
        for name in names:
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, min(getattr(text, name), most))
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
