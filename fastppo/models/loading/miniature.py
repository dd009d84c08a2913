"""A small model of the same architecture, for checks before, or without, loading whole weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.models.parallel.group import sequence_group
from fastppo.models.rotary import LONGROPE, rope_parameters

log = logging.getLogger("fastppo")

HEADS, FEED_FORWARD, EXPERTS, VOCABULARY = 4, 256, 8, 512
WINDOW, SWITCH = 8, 16  # positions of a sliding window, and tokens up to which longrope uses its short factors
KINDS = 4  # a list with one value for each layer and more different values does not contain types of layers
LARGEST = 5 * 10**8  # weights of the largest model that the check accepts

# Settings of configs for the width of a feed-forward layer, the number of experts, a sliding window.
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size")
# Settings for the distance between layers of another type.
INTERVALS = ("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period", "attn_layer_period")

# Exceptions of transformers for sizes that are not compatible with each other.
MINIATURE_ERRORS = (
    *(ValueError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ImportError),
    StrictDataclassError,
)


def miniature(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make a model with two layers, or as many as include each type; a few heads of full width; random weights.

    auto: AutoModelForCausalLM or another such class, or the class of a model. Sliding windows and the length at which
    rotary frequencies switch are short, so that a short sequence exceeds them. If the sizes of a model depend on each
    other in a way that is not known here, fewer of them are made small. Raises the first of `MINIATURE_ERRORS` if no
    model can be made.
    """
    first_error: Exception | None = None
    steps = (_shorten, _shallow, _few_words, _few_experts, _narrow)
    with torch.random.fork_rng(devices=[]):  # must not change the random numbers of the run
        for count in range(len(steps), -1, -1):
            small = copy.deepcopy(config)
            try:
                for step in steps[:count]:
                    step(small)
                return _make(auto, small, dtype).to(device)  # type: ignore[no-any-return]
            except MINIATURE_ERRORS as error:
                first_error = first_error or error
                sizes = steps[count - 1].__doc__ if count else "its original sizes"
                log.info("%s: no model can be made with %s (%s)", type(config).__name__, sizes, error)
    assert first_error is not None
    raise first_error


def _make(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model, after a forward pass on three tokens. Raises ValueError if it has more weights than `LARGEST`."""
    as_defined = {"dtype": dtype, "attn_implementation": "eager"}  # transformers' SDPA ignores the softcap of Gemma-2
    make = getattr(auto, "from_config", None) or auto._from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(copy.deepcopy(config), **as_defined).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size / 1e9:.1f} billion weights after all known sizes were made small")
    torch.manual_seed(0)
    model = make(config, **as_defined).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(4.0)  # with initial weights logits are so similar that errors would be invisible
        model.base_model(torch.tensor([[1, 2, 3]]), use_cache=False)
    return model


def _shorten(config: PreTrainedConfig) -> None:
    """short windows and rotary switches"""
    text = config.get_text_config()
    for name in WINDOWS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > WINDOW:
            setattr(text, name, WINDOW)
    for rope in rope_parameters(text):
        switch = rope.get("original_max_position_embeddings") or 0
        if rope.get("rope_type") != LONGROPE or switch <= SWITCH:
            continue
        extension = text.max_position_embeddings / switch
        text.max_position_embeddings = int(SWITCH * extension)
        for holder in (rope, vars(text)):
            if "original_max_position_embeddings" in holder:
                holder["original_max_position_embeddings"] = SWITCH


def _shallow(config: PreTrainedConfig) -> None:
    """fewer layers"""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    lists = {name: values for name, values in _lists_of_layers(text)}
    first_of_each = [[*map(repr, values)].index(repr(value)) for values in lists.values() for value in values]
    if (getattr(text, "first_k_dense_replace", None) or 0) > 1:
        text.first_k_dense_replace = 1
    intervals = [n for name in INTERVALS if isinstance(n := getattr(text, name, None), int)]
    small_depth = min(depth, max([1, *first_of_each, *intervals]) + 1)
    if (getattr(text, "num_kv_shared_layers", None) or 0) > 0:  # upper layers use the keys and values of lower ones
        text.num_kv_shared_layers = min(small_depth, text.num_kv_shared_layers)
        small_depth = min(depth, 2 * small_depth)
    text.num_hidden_layers = small_depth
    for name, values in lists.items():
        setattr(text, name, values[: text.num_hidden_layers])


def _lists_of_layers(text: PreTrainedConfig) -> Iterator[tuple[str, list[Any]]]:
    """Names and values of the settings that list the type of each layer."""
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
    # Heads keep their width: a config may have a list of rotary scales as long as a head is wide.
    text = config.get_text_config()
    heads, width = text.num_attention_heads, text.hidden_size
    few = max(HEADS, sequence_group().size)  # each rank that splits a row has a head
    few_heads = min(few, heads)
    key_heads = getattr(text, "num_key_value_heads", None)
    if key_heads is not None:
        grouped = few_heads // 2 if key_heads > 1 and few_heads == few else 1
        text.num_key_value_heads = few_heads if key_heads == heads else grouped
    text.num_attention_heads = few_heads
    text.hidden_size = few_heads * (_head_width(text) or width // heads)
    if getattr(text, "word_embed_proj_dim", None) == width:
        text.word_embed_proj_dim = text.hidden_size
    for name in WIDTHS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(text, name, min(value, FEED_FORWARD))
        elif isinstance(value, list):  # one width for each layer (Gemma-3n)
            setattr(text, name, [min(each, FEED_FORWARD) for each in value])


def _head_width(text: PreTrainedConfig) -> int | None:
    try:
        return getattr(text, "head_dim", None)
    except MINIATURE_ERRORS:  # Gemma-4 has one for each type of layer, and reading the attribute raises
        return None
