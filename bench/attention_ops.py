"""Decode attention over the cache, beside the reference, torch.compile and, if it is installed, flash-attn's kernel.

The ceiling is one read of the keys and values. On the CPU the sizes are those of the quickstart, whose keys and values
fit into a cache that is faster than memory; on a GPU those of an 8B Llama: 64 rows of 4,096 positions, and 4 rows,
those of a batch whose other responses have ended.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from op_case import OpCase
from torch import Tensor

from fastppo import ops
from fastppo.ops import eager


class Sizes(NamedTuple):
    rows: int  # of a step
    positions: int  # of each
    heads: int
    kv_heads: int
    width: int


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [Sizes(32, 64, 9, 3, 64)]
if DEVICE.type == "cuda":
    SIZES = [Sizes(64, 4096, 32, 8, 128), Sizes(4, 4096, 32, 8, 128)]
SMALL = [Sizes(4, 8, 4, 2, 16)]


def by_flash(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rows: Tensor, **given: Any
) -> object:
    from flash_attn import flash_attn_with_kvcache

    if query.dtype == torch.float32:
        raise TypeError("flash-attn computes no fp32")
    places = {"cache_seqlens": lengths.int(), "cache_batch_idx": rows.int()}
    q, k, v = (x[:, None] for x in (query, key, value))
    caches = (keys.transpose(1, 2), values.transpose(1, 2))
    return flash_attn_with_kvcache(q, *caches, k, v, **places, softmax_scale=given["scale"], softcap=given["softcap"])


WAYS: dict[str, Callable[..., Any]] = {
    "eager": eager.attend_cached,
    "compiled": torch.compile(eager.attend_cached, dynamic=False),
    "fastppo": ops.attend_cached,
}
if DEVICE.type == "cuda" and find_spec("flash_attn"):
    WAYS["flash-attn"] = by_flash


def step(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, positions, heads, kv_heads, width = sizes
    query, key, value = (torch.randn(rows, n, width, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads))
    caches = [torch.randn(rows, kv_heads, positions + 16, width, device=DEVICE).to(dtype) for _ in range(2)]
    return query, key, value, *caches, torch.full((rows,), positions, device=DEVICE), torch.arange(rows, device=DEVICE)


def op_cases(*, small: bool = False) -> list[OpCase]:
    """small: only to see that they run."""
    cases = []
    for sizes in SMALL if small else SIZES:
        for softcap in (0.0, 50.0):
            options = {"scale": sizes.width**-0.5, "softcap": softcap}
            ways = {name: functools.partial(way, **options) for name, way in WAYS.items()}
            vectors = 2 * sizes.rows * sizes.positions * sizes.kv_heads * sizes.width
            made = functools.partial(step, sizes)
            cases.append(
                OpCase("attend_cached", title(sizes, softcap), ways, made, lambda size, n=vectors: n * size)  # type: ignore[misc]
            )
    return cases


def title(sizes: Sizes, softcap: float) -> str:
    rows, positions, heads, kv_heads, width = sizes
    capped = ", softcap" if softcap else ""
    return f"attend_cached, {rows} rows of {positions:,} positions, {heads}/{kv_heads} heads x {width}{capped}"
