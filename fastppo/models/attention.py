"""Attention over packed rows and over the sampler's cache, as one function in transformers' attention registry.

A model whose attention is set to `ATTENTION` is called with one of two keywords, which transformers hands down to
every layer untouched:

- `packed=Spans`: the row holds whole sequences end to end, and each attends to itself alone;
- `cache=Cache`: as above in prefill, and one new position for each row in decode, at that row's own length.

No model code is patched. What a model asks of its attention beyond causality is honoured (a window, whether it comes
as `sliding_window` or in the mask alone; `softcap`) or refused: silently leaving it out would train another model than
the one that was loaded.

On CUDA flash-attn computes it where it can (`fastppo.models.flash`); elsewhere PyTorch does, and decode is an op.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from fastppo import ops
from fastppo.errors import FastPPOError
from fastppo.models.flash import FlashAttention, choose_flash

ATTENTION = "fastppo_packed"

_flash: FlashAttention | None = None  # what `compute_with` was given

# On the CPU, PyTorch's fused attention is slower than the plain products up to about this length: forward and backward
# over 16 sequences of 128 tokens and 9 heads take 60 ms against 20 in bf16, and over 8 of 512 tokens 166 against 230.
SHORT = 128

# Keywords that models pass to every attention function and that carry nothing which packing would lose.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal", "dropout"}


@dataclass(frozen=True)
class Window:
    """What stands for a mask that is more than causal: tokens see the newest `size` positions."""

    size: int


@dataclass(frozen=True)
class Chunks:
    """What stands for a mask by which tokens see those of their own chunk of `size` positions (Llama-4)."""

    size: int


@dataclass(frozen=True)
class Spans:
    """Where the sequences of a packed row lie, made once for all layers of a forward pass.

    Neighbours of equal length are attended to in one call; flash-attn takes all sequences in one.
    """

    runs: tuple[tuple[int, int, int], ...]  # (first row, number of sequences, their length)
    cu_seqlens: Tensor  # (B+1,) int32, on the device
    longest: int  # tokens of the longest sequence

    @staticmethod
    def of(lengths: list[int], device: torch.device) -> Spans:
        runs, start = [], 0
        for length, group in groupby(lengths):
            count = len(list(group))
            runs.append((start, count, length))
            start += count * length
        cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()
        return Spans(tuple(runs), cu_seqlens.to(device), max(lengths, default=0))


class Cache:
    """Keys and values of R rows, each with a length of its own. The buffers never move or grow.

    Prefill writes a packed row of prompts, `cache.rows[i]` being the row of the i-th prompt; decode appends one
    position to every active row. The model runs with `use_cache=False`: transformers' cache classes take no part.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device):
        heads, width = self.shape(config)
        shape = (config.num_hidden_layers, rows, heads, length, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # positions that each row holds
        self.rows = torch.arange(rows, device=device)  # (active,) int64, the rows in the batch
        self.spans: Spans | None = None  # the prompts' layout while they are prefilled, None in decode
        self.active: tuple[Tensor, Tensor] | None = None  # (active,) int32 each, lengths and rows as flash-attn wants

    @staticmethod
    def shape(config: PreTrainedConfig) -> tuple[int, int]:
        """Key/value heads, and the width of a head."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def begin_prefill(self, lengths: list[int]) -> None:
        self.spans = Spans.of(lengths, self.lengths.device)
        self.rows = torch.arange(len(lengths), device=self.lengths.device)
        self.lengths[: len(lengths)] = torch.tensor(lengths, device=self.lengths.device)

    def begin_decode(self) -> None:
        self.spans = None

    def begin_step(self, rows: Tensor) -> None:
        """Decode the next position of these rows, (active,) int64."""
        self.rows, self.active = rows, (self.lengths[rows].int(), rows.int())

    def end_step(self) -> None:
        self.lengths[self.rows] += 1


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | Chunks | Tensor | None,
    scaling: float | None = None,
    packed: Spans | None = None,
    cache: Cache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    flash: FlashAttention | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Causal attention, the function that models call. query (batch, heads, length, width), fewer heads in key and
    value where the model groups them. Returns (batch, length, heads, width). Packed rows have batch 1, a decode step
    has length 1. attention_mask: what `_layout` made for this layer. flash: computes all that it takes, see
    `compute_with`.
    """
    refused = sorted(name for name, given in unknown.items() if given is not None and name not in _HARMLESS)
    if refused:
        raise FastPPOError(
            f"{type(module).__name__} asks its attention for {', '.join(refused)}, which packed attention does not"
            " implement; leaving it out would compute another model. Use a model with plain causal attention,"
            " a sliding window or a soft cap."
        )
    if isinstance(attention_mask, Tensor):
        raise FastPPOError(
            f"{type(module).__name__} gives its attention a mask of its own making, which packed attention would leave"
            " out; that would compute another model. Use a model with plain causal attention or a sliding window."
        )
    if isinstance(attention_mask, Chunks):
        _check_chunks(attention_mask.size, packed, cache)
    window = attention_mask.size if isinstance(attention_mask, Window) else sliding_window or 0  # as its own has it
    _check_shapes(type(module).__name__, query, key, value, cache)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap or 0.0}
    flash = flash if flash is not None and flash.takes(module, query) else None
    layer = getattr(module, "layer_idx", None)
    spans = packed if cache is None else cache.spans
    if spans is None:
        if cache is None:
            raise FastPPOError(
                f"{type(module).__name__} got neither packed=Spans nor cache=Cache: its model does not hand"
                " down what it is called with, so it cannot read packed rows. Use a model that does, as most do."
            )
        return _attend_cached(query, key, value, cache, layer, flash, options), None
    if cache is not None:
        _fill(cache, layer, key, value)
    if flash is not None:
        return flash.packed(query, key, value, spans.cu_seqlens, spans.longest, **options), None
    return _attend_packed(query, key, value, spans, **options), None


def _attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache,
    layer: int | None,
    flash: FlashAttention | None,
    options: dict[str, Any],
) -> Tensor:
    """(R, heads, 1, width) -> (R, 1, heads, width); the new position goes into the cache."""
    keys, values = cache.keys[layer], cache.values[layer]
    if flash is not None:
        assert cache.active is not None  # begin_step has been called
        return flash.cached(query, key, value, keys, values, *cache.active, **options)
    q, k, v = (x[:, :, 0] for x in (query, key, value))
    return ops.attend_cached(q, k, v, keys, values, cache.lengths, cache.rows, **options).unsqueeze(1)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, window: int, softcap: float
) -> Tensor:
    outputs = []
    for start, count, length in spans.runs:
        q, k, v = (_sequences(x, start, count, length) for x in (query, key, value))
        if softcap or (window and length > window) or (q.device.type == "cpu" and length <= SHORT):
            out: Tensor = _attend_plainly(q, k, v, scale, window, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out.transpose(1, 2).reshape(1, count * length, *out.shape[1::2]))
    # Contiguous, since some models view it in another shape: reshape copies nothing where there is one sequence.
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sequences(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """(1, heads, N, width) -> (count, heads, length, width)"""
    rows: Tensor = x[0, :, start : start + count * length].unflatten(1, (count, length))
    return rows.transpose(0, 1)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Softmax attention as three products; (B, heads, L, width), fewer heads in k and v where the model groups them.

    The queries of a group stand under one another, so that keys and values are read once and never repeated.
    """
    heads, length = k.shape[1], k.shape[2]
    grouped = q.unflatten(1, (heads, -1)).flatten(2, 3)  # (B, kv heads, group * L, width)
    scores = (grouped * scale) @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = (distance < 0) | (distance >= (window or length))
    weights = scores.unflatten(2, (-1, length)).masked_fill_(hidden, float("-inf")).softmax(-1)
    out: Tensor = (weights.flatten(2, 3) @ v).reshape(q.shape)
    return out


def _fill(cache: Cache, layer: int | None, key: Tensor, value: Tensor) -> None:
    row = 0
    assert cache.spans is not None
    for start, count, length in cache.spans.runs:
        for buffer, new in ((cache.keys, key), (cache.values, value)):
            buffer[layer, row : row + count, :, :length] = _sequences(new, start, count, length)
        row += count


def _check_chunks(size: int, packed: Spans | None, cache: Cache | None) -> None:
    """Within one chunk, attention by chunks is causal attention; what would reach beyond it is refused."""
    longest = packed.longest if packed is not None else 0 if cache is None else cache.keys.shape[3]
    if longest > size:
        raise FastPPOError(
            f"sequences of up to {longest} tokens, but this model attends within chunks of attention_chunk_size ="
            f" {size} tokens, which is computed for sequences of one chunk only. Make prompts and responses shorter."
        )


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None) -> None:
    """Whether queries, keys and values (batch, heads, length, width) have one width, and in all layers the cache's."""
    if value.shape[-1] != query.shape[-1]:
        raise FastPPOError(
            f"{name} has values of width {value.shape[-1]} and queries of width {query.shape[-1]}, as multi-head latent"
            " attention does; packed attention knows one width. Use a model with one."
        )
    made = [(x.shape[1], x.shape[3]) for x in (key, value)]
    held = made[0] if cache is None else (cache.keys.shape[2], cache.keys.shape[4])
    if made != [held, held]:
        cached = "" if cache is None else f", and the cache to sample with holds {held}, as the config says"
        raise FastPPOError(
            f"{name} makes keys of {made[0]} and values of {made[1]} (heads, width){cached}. Use a model whose keys and"
            " values have one shape in all layers."
        )


def _layout(*args: Any, config: Any = None, local_size: int | None = None, **kwargs: Any) -> Window | Chunks | None:
    """In the place of a mask, what of it the layout of rows does not tell: building an (N, N) one would cost more than
    the attention. transformers calls it for each type of layer, and the model hands the result to those layers.

    local_size: of a sliding window or of chunks; None for plain causal attention.
    """
    if local_size is None:
        return None
    return Window(local_size) if getattr(config, "sliding_window", None) == local_size else Chunks(local_size)


def choose_attention(setting: Literal["auto", "flash", "sdpa"], dtype: torch.dtype, device: torch.device) -> None:
    """What computes the attention of all models of this process from here on (the setting `attention`)."""
    compute_with(choose_flash(setting, dtype, device))


def compute_with(flash: FlashAttention | None) -> None:
    """Let flash-attn compute what it can, or, with None, PyTorch all of it."""
    global _flash
    _flash = flash
    AttentionInterface.register(ATTENTION, partial(attend, flash=flash))


def uses_flash() -> bool:
    """Whether flash-attn computes what it can."""
    return _flash is not None


@contextmanager
def without_flash() -> Iterator[None]:
    """Within this context PyTorch computes all attention, as in fp32, which flash-attn does not know."""
    chosen = _flash
    compute_with(None)
    try:
        yield
    finally:
        compute_with(chosen)


def attend_packed(model: PreTrainedModel) -> None:
    """Let `attend` compute the attention of all layers of a model.

    Each module reads its own config, and a model that was put together from two has two: transformers' method looks at
    the outermost alone, and the layers of the other would go on with an attention that knows no `packed`.
    """
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation != ATTENTION:
            config._attn_implementation = ATTENTION


def asks_nothing(model: PreTrainedModel) -> bool:
    """Whether a decode step of the model never waits for the GPU to tell the host something, so that a CUDA graph can
    hold it. flash-attn asks nothing; PyTorch's side of `ops.attend_cached` does.
    """
    width = Cache.shape(model.config.get_text_config())[-1]
    return _flash is not None and model.device.type == "cuda" and _flash.can(width, model.dtype)


compute_with(None)
AttentionMaskInterface.register(ATTENTION, _layout)
