"""A small model of the same architecture, for what has to be tried before, or without, loading whole weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.models.rotary import SWITCHES, ropes

log = logging.getLogger("fastppo")

HEADS, FEED_FORWARD, EXPERTS, VOCABULARY = 4, 256, 8, 512
WINDOW, SWITCH = 8, 16  # positions of a sliding window, and tokens up to which longrope turns by its short factors
KINDS = 4  # a list with more different values, one for each layer, does not tell kinds of layers
LARGEST = 5 * 10**8  # weights of a model that nobody knows how to make smaller

# Names under which configs have the width of a feed-forward layer, the number of experts, a sliding window.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size")
# Every so many layers one is of another kind.
INTERVALS = ("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period", "attn_layer_period")

# What transformers raises for widths that do not go together.
MISFIT = (
    *(ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ImportError),
    StrictDataclassError,
)


def miniature(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Two layers, or as many as it takes to have each kind; a few heads of full width; random weights.

    auto: AutoModelForCausalLM or another such class, or a model's own. Windows and the lengths at which rotary
    frequencies switch are short, so that a short sequence goes beyond them. Where a model's sizes hang together in a
    way that is not known here, they stay as they are and only layers are left out. Raises the first of `MISFIT` if no
    model can be made.
    """
    first: Exception | None = None
    steps = (_shorten, _shallow, _few_words, _few_experts, _narrow)
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers do not depend on it
        for count in range(len(steps), -1, -1):
            small = copy.deepcopy(config)
            try:
                for step in steps[:count]:
                    step(small)
                return _made(auto, small, dtype).to(device)  # type: ignore[no-any-return]
            except MISFIT as error:
                first = first or error
                without = steps[count - 1].__doc__ if count else "its own sizes"
                log.info("%s cannot be tried with %s (%s)", type(config).__name__, without, error)
    assert first is not None
    raise first


def _made(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model, if it is not too large and computes something on three tokens."""
    as_defined = {"dtype": dtype, "attn_implementation": "eager"}  # transformers' SDPA leaves out Gemma-2's softcap
    make = getattr(auto, "from_config", None) or auto._from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(copy.deepcopy(config), **as_defined).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size / 1e9:.1f} billion weights when all is made small that can be")
    torch.manual_seed(0)
    model = make(config, **as_defined).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(4.0)  # fresh weights give logits so alike that a wrong one would not stand out
        model.base_model(torch.tensor([[1, 2, 3]]), use_cache=False)
    return model


def _shorten(config: PreTrainedConfig) -> None:
    """short windows and rotary switches"""
    text = config.get_text_config()
    for name in WINDOWS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > WINDOW:
            setattr(text, name, WINDOW)
    for rope in ropes(text):
        own = rope.get("original_max_position_embeddings") or 0
        if rope.get("rope_type") != SWITCHES or own <= SWITCH:
            continue
        longer = text.max_position_embeddings / own
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
    kept = min(depth, max([1, *first_of_each, *intervals]) + 1)
    if (getattr(text, "num_kv_shared_layers", None) or 0) > 0:  # the upper ones read keys and values of the lower ones
        text.num_kv_shared_layers, kept = min(kept, text.num_kv_shared_layers), min(depth, 2 * kept)
    text.num_hidden_layers = kept
    for name, values in lists.items():
        setattr(text, name, values[: text.num_hidden_layers])


def _lists_of_layers(text: PreTrainedConfig) -> Iterator[tuple[str, list[Any]]]:
    """Lists that say of each layer what kind it is, by name."""
    for name, values in vars(text).items():
        if not isinstance(values, list) or len(values) != text.num_hidden_layers or name.endswith(("_id", "_ids")):
            continue
        if name == "layer_types" or len({*map(repr, values)}) <= KINDS:
            yield name, values


def _few_words(config: PreTrainedConfig) -> None:
    """a smaller vocabulary"""
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if "vocab_size" in name and isinstance(value, int):
            setattr(text, name, min(value, VOCABULARY))
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            setattr(text, name, 0)


def _few_experts(config: PreTrainedConfig) -> None:
    """fewer experts"""
    text = config.get_text_config()
    chosen, groups = (getattr(text, name, None) or 1 for name in ("num_experts_per_tok", "n_group"))
    for name in EXPERT_COUNTS:
        if isinstance(count := getattr(text, name, None), int):
            setattr(text, name, min(count, max(EXPERTS, chosen, 2 * groups)))


def _narrow(config: PreTrainedConfig) -> None:
    """fewer heads and narrower layers"""
    # Heads are not narrower: scales of rotary embeddings may come as lists of a head's width.
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.hidden_size
    kept = min(HEADS, heads)
    key_heads = getattr(text, "num_key_value_heads", None)
    if key_heads is not None:
        text.num_key_value_heads = kept if key_heads == heads else kept // 2 if key_heads > 1 and kept == HEADS else 1
    text.num_attention_heads = kept
    text.hidden_size = kept * (_head_width(text) or width // heads)
    if getattr(text, "word_embed_proj_dim", None) == width:
        text.word_embed_proj_dim = text.hidden_size
    for name in WIDTHS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(text, name, min(value, FEED_FORWARD))
        elif isinstance(value, list):  # of each layer (Gemma-3n)
            setattr(text, name, [min(each, FEED_FORWARD) for each in value])


def _head_width(text: PreTrainedConfig) -> int | None:
    try:
        return getattr(text, "head_dim", None)
    except MISFIT:  # Gemma-4 has one for each type of layer, and its config refuses to name one
        return None
