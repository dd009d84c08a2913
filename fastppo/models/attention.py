"""Attention over packed rows and over the sampler's cache, as one function in transformers' attention registry.

A model whose attention is set to `ATTENTION` is called with one of two keywords, which transformers passes on to
every layer unchanged:

- `packed=SequenceLayout`: the row holds whole sequences end to end, and each sequence attends only to itself. If the
  row is split over ranks, tokens are exchanged for heads and back;
- `cache=Cache`: the same in prefill; in decode one new position for each row, at the length of that row; in an
  extension several new positions of a row.

No model code is patched. A model may ask its attention for more than causality. A sliding window (given as
`sliding_window` or only by the mask) and `softcap` are computed; everything else raises an error, because ignoring it
would train another model than the one that was loaded.

On CUDA another library's kernels compute the attention where they can (`fastppo.models.backends`); elsewhere PyTorch
computes it, and decode is an op with a kernel of its own (`ops.attend_cached`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils

from fastppo import ops
from fastppo.config import AttentionSetting
from fastppo.errors import FastPPOError
from fastppo.models.backends.backend import AttentionBackend, supports
from fastppo.models.backends.choice import choose_backend
from fastppo.models.cache import Cache, SequenceLayout
from fastppo.models.parallel.heads import pieces, to_heads, to_tokens
from fastppo.models.plain_attention import attend_extended, attend_plainly

ATTENTION = "fastppo_packed"

_backend: AttentionBackend | None = None  # set by `compute_with`

# On the CPU, PyTorch's fused attention is slower than the plain matrix products up to about this many tokens: forward
# and backward in bf16 with 9 heads take 60 ms (fused) and 20 ms (plain) over 16 sequences of 128 tokens, and 166 ms
# and 230 ms over 8 sequences of 512 tokens.
PLAIN_ATTENTION_MAX = 128

# Keywords that models pass to every attention function and that packed attention may ignore.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal", "dropout"}


@dataclass(frozen=True)
class Window:
    """Replaces the mask of sliding-window attention: a token attends to the newest `size` positions."""

    size: int


@dataclass(frozen=True)
class Chunks:
    """Replaces the mask of chunked attention (Llama-4): a token attends within its own chunk of `size` positions."""

    size: int


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | Chunks | Tensor | None,
    scaling: float | None = None,
    packed: SequenceLayout | None = None,
    cache: Cache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: AttentionBackend | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Causal attention, the function that models call.

    query (batch, heads, length, width); key and value have fewer heads with grouped-query attention. Returns (batch,
    length, heads, width). Packed rows have batch 1, a decode step has length 1. attention_mask: the result of
    `_mask_type` for this layer. backend: computes the attention where it can, see `compute_with`.
    """
    unsupported = sorted(name for name, value in unknown.items() if value is not None and name not in _HARMLESS)
    if unsupported:
        raise FastPPOError(
            f"{type(module).__name__} asks its attention for {', '.join(unsupported)}, which packed attention does not"
            " implement; ignoring it would compute another model. Use a model with plain causal attention,"
            " a sliding window or a soft cap."
        )
    if isinstance(attention_mask, Tensor):
        raise FastPPOError(
            f"{type(module).__name__} gives its attention a mask that it computed itself, and packed attention would"
            " ignore it; that would compute another model. Use a model with plain causal attention or a sliding window."
        )
    if isinstance(attention_mask, Chunks):
        _check_chunks(attention_mask.size, packed, cache)
    window = attention_mask.size if isinstance(attention_mask, Window) else sliding_window or 0
    _check_shapes(type(module).__name__, query, key, value, cache)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap or 0.0}
    if backend is not None and not supports(backend, module, query, options["softcap"]):
        backend = None
    layer = getattr(module, "layer_idx", None)
    layout = packed if cache is None else cache.layout
    if cache is not None and cache.extensions:
        assert layer is not None
        cache.fill(layer, key, value)
        return attend_extended(query, cache.keys[layer], cache.values[layer], cache.extensions, **options), None
    if layout is None:
        if cache is None:
            raise FastPPOError(
                f"{type(module).__name__} got neither packed=SequenceLayout nor cache=Cache: its model does not pass"
                " its keyword arguments on to its layers, so it cannot read packed rows. Use a model that does, as"
                " most do."
            )
        return _attend_cached(query, key, value, cache, layer, backend, options), None
    if cache is not None:
        cache.fill(layer, key, value)
    return _attend_layout(query, key, value, layout, backend, options), None


def _attend_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    backend: AttentionBackend | None,
    options: dict[str, Any],
) -> Tensor:
    """(1, heads, n, width) -> (1, n, heads, width), n tokens of the packed row: all, or this rank's of a split row."""
    if layout.split is not None:
        heads, key_heads, group, whole = query.shape[1], key.shape[1], layout.split.group, replace(layout, split=None)
        q, k, v = to_heads(query, key, value, layout.split)
        outputs = [
            _attend_layout(q[:, queries], k[:, keys], v[:, keys], whole, backend, options)
            for queries, keys in pieces(heads, key_heads, group.size, group.index)
        ]
        return to_tokens(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), layout.split, heads)
    if backend is None:
        return _attend_packed(query, key, value, layout, **options)
    # Contiguous, because some models view the result in another shape, and a backend may return it as the query lies.
    return backend.packed(query, key, value, layout.cu_seqlens, layout.longest, **options).contiguous()


def _attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache,
    layer: int | None,
    backend: AttentionBackend | None,
    options: dict[str, Any],
) -> Tensor:
    """(R, heads, 1, width) -> (R, 1, heads, width); writes the new position into the cache."""
    assert cache.active is not None  # begin_step has been called
    keys, values = cache.keys[layer], cache.values[layer]
    if backend is not None:
        return backend.cached(query, key, value, keys, values, cache.active, **options).contiguous()
    q, k, v = (x[:, :, 0] for x in (query, key, value))
    return ops.attend_cached(q, k, v, keys, values, cache.lengths, cache.active.rows, **options).unsqueeze(1)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, scale: float, window: int, softcap: float
) -> Tensor:
    on_cpu = query.device.type == "cpu"
    plain = [(on_cpu and length <= PLAIN_ATTENTION_MAX) or 0 < window < length for _, _, length in layout.runs]
    if all(plain) and not softcap:
        return attend_plainly(query, key, value, layout.runs, scale, window)
    outputs = []
    for (start, count, length), is_plain in zip(layout.runs, plain, strict=True):
        rows = slice(start, start + count * length)
        parts = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        if is_plain and not softcap:
            outputs.append(attend_plainly(*parts, ((0, count, length),), scale, window))
            continue
        q, k, v = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        if softcap:
            out = _attend_with_softcap(q, k, v, scale, window, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out.transpose(1, 2).reshape(1, count * length, *out.shape[1::2]))
    # Contiguous, because some models view the result in another shape: with one sequence reshape copies nothing.
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_with_softcap(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """As `attend_plainly`, with scores s bounded as softcap tanh(s / softcap) (Gemma-2); q, k, v (B, heads, L, width),
    fewer heads in k and v with grouped queries.

    The queries of a group are stacked along the length, so that keys and values are read once and not repeated.
    """
    heads, length = k.shape[1], k.shape[2]
    grouped = q.unflatten(1, (heads, -1)).flatten(2, 3)  # (B, kv heads, group * L, width)
    scores = softcap * torch.tanh((grouped * scale) @ k.transpose(-1, -2) / softcap)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    hidden = (distance < 0) | (distance >= (window or length))
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    weights = scores.unflatten(2, (-1, length)).add_(mask).softmax(-1)  # added, it costs nothing in the backward pass
    out: Tensor = (weights.flatten(2, 3) @ v).reshape(q.shape)
    return out


def _check_chunks(size: int, packed: SequenceLayout | None, cache: Cache | None) -> None:
    """Raise FastPPOError for sequences longer than one chunk. Within one chunk the attention is plainly causal."""
    longest = packed.longest if packed is not None else 0 if cache is None else cache.longest
    if longest > size:
        raise FastPPOError(
            f"sequences have up to {longest} tokens, but this model attends within chunks of attention_chunk_size ="
            f" {size} tokens, and only sequences of one chunk are supported. Make prompts and responses shorter."
        )


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None) -> None:
    """Check that queries, keys and values (batch, heads, length, width) have one width, the same in all layers."""
    if value.shape[-1] != query.shape[-1]:
        raise FastPPOError(
            f"{name} has values of width {value.shape[-1]} and queries of width {query.shape[-1]}, as multi-head latent"
            " attention does; packed attention supports one width only. Use a model whose queries and values have the"
            " same width."
        )
    key_shape, value_shape = ((x.shape[1], x.shape[3]) for x in (key, value))
    expected_shape = key_shape if cache is None else (cache.keys.shape[2], cache.keys.shape[4])
    if (key_shape, value_shape) != (expected_shape, expected_shape):
        cached = "" if cache is None else f", and the sampling cache has {expected_shape}, as the config says"
        raise FastPPOError(
            f"{name} computes keys of {key_shape} and values of {value_shape} (heads, width){cached}. Use a model whose"
            " keys and values have one shape in all layers."
        )


def _mask_type(*args: Any, config: Any = None, local_size: int | None = None, **kwargs: Any) -> Window | Chunks | None:
    """The kind of mask that a layer needs beside the sequence layout, in place of an (N, N) mask.

    Building such a mask would cost more than the attention. transformers calls this function for each type of layer,
    and the model passes the result to those layers. local_size: of a sliding window or of a chunk; None for plain
    causal attention.
    """
    if local_size is None:
        return None
    return Window(local_size) if getattr(config, "sliding_window", None) == local_size else Chunks(local_size)


@contextmanager
def without_mask_search() -> Iterator[None]:
    """Within this context transformers does not look in the positions for where sequences begin, to put that into a
    mask: there is none (`_mask_type`), and to read the positions the host would wait for the device."""
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _sequences_not_searched
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def _sequences_not_searched(position_ids: Tensor) -> None: ...


def choose_attention(setting: AttentionSetting, dtype: torch.dtype, device: torch.device) -> None:
    """Set the implementation of attention for all models of this process (the setting `attention`)."""
    compute_with(choose_backend(setting, dtype, device))


def compute_with(backend: AttentionBackend | None) -> None:
    """Use this backend where it can compute the attention; None: use PyTorch everywhere."""
    global _backend
    _backend = backend
    AttentionInterface.register(ATTENTION, partial(attend, backend=backend))


def backend_in_use() -> AttentionBackend | None:
    """The backend that computes attention where it can; None: PyTorch computes it everywhere."""
    return _backend


@contextmanager
def without_backend() -> Iterator[None]:
    """Within this context PyTorch computes all attention, for example in fp32, which no backend supports."""
    backend_before = _backend
    compute_with(None)
    try:
        yield
    finally:
        compute_with(backend_before)


def attend_packed(model: PreTrainedModel) -> None:
    """Use `attend` for the attention of all layers of a model.

    Each module reads its own config, and a model that was assembled from two models has two configs. transformers'
    method changes only the outermost config, so the other layers would keep an attention that ignores `packed`.
    """
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation != ATTENTION:
            config._attn_implementation = ATTENTION


def decodes_without_sync(model: PreTrainedModel) -> bool:
    """Whether a decode step of the model runs without a synchronisation of host and GPU, as a CUDA graph requires.

    This is so on CUDA with every implementation of attention, a backend's and that of `ops.attend_cached`.
    """
    return model.device.type == "cuda"


compute_with(None)
AttentionMaskInterface.register(ATTENTION, _mask_type)
