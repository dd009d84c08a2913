"""Decode attention over the cache, compared with the reference and, if it is installed, with flash-attn's kernel.

    pytest bench/test_attend_cached.py --benchmark-only
    python bench/test_attend_cached.py         # a table of paired ratios, and one line of JSON

The ceiling is one read of the keys and values. On the CPU the sizes are those of the quickstart, whose keys and values
fit into a cache that is faster than memory; on a GPU, if there is one, those of an 8B Llama: 64 rows of 4,096
positions, and 4 rows, those of a batch whose other responses have ended.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import functools
import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from ceilings import Ceilings, ceilings, seconds
from torch import Tensor

from fastppo import ops
from fastppo.ops import eager, registration

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rows of a step, positions of each, heads, kv heads, width.
SIZES = [(32, 64, 9, 3, 64)] if DEVICE.type == "cpu" else [(64, 4096, 32, 8, 128), (4, 4096, 32, 8, 128)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def candidates(size: tuple[int, ...], dtype: torch.dtype, softcap: float) -> dict[str, Callable[[], object]]:
    """Calls that compute the same step of attention."""
    rows, positions, heads, kv_heads, width = size
    query, key, value = (torch.randn(rows, n, width, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads))
    caches = [torch.randn(rows, kv_heads, positions + 16, width, device=DEVICE).to(dtype) for _ in range(2)]
    lengths, active = torch.full((rows,), positions, device=DEVICE), torch.arange(rows, device=DEVICE)
    arguments = (query, key, value, *caches, lengths, active)
    options = {"scale": width**-0.5, "softcap": softcap}
    calls: dict[str, Callable[[], object]] = {
        "reference": functools.partial(eager.attend_cached, *arguments, **options),
        "fastppo": functools.partial(ops.attend_cached, *arguments, **options),
    }
    if DEVICE.type == "cuda" and dtype != torch.float32 and find_spec("flash_attn") is not None:
        calls["flash-attn"] = functools.partial(by_flash, *arguments, **options)
    return calls


def by_flash(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rows: Tensor, **given: Any
) -> object:
    from flash_attn import flash_attn_with_kvcache

    places = {"cache_seqlens": lengths.int(), "cache_batch_idx": rows.int()}
    q, k, v = (x[:, None] for x in (query, key, value))
    caches = (keys.transpose(1, 2), values.transpose(1, 2))
    return flash_attn_with_kvcache(q, *caches, k, v, **places, softmax_scale=given["scale"], softcap=given["softcap"])


CASES = [
    (size, dtype, softcap, name)
    for size in SIZES
    for dtype in DTYPES
    for softcap in (0.0, 50.0)
    for name in ("fastppo", "reference")
]


@pytest.mark.parametrize(("size", "dtype", "softcap", "name"), CASES)
def test_attend_cached(benchmark: Any, size: tuple[int, ...], dtype: str, softcap: float, name: str) -> None:
    benchmark.group = title(size, dtype, softcap)
    call = candidates(size, DTYPES[dtype], softcap)[name]
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=30, warmup_rounds=3)


def title(size: tuple[int, ...], dtype: str, softcap: float) -> str:
    rows, positions, heads, kv_heads, width = size
    capped = ", softcap" if softcap else ""
    return f"{rows} rows of {positions:,} positions, {heads}/{kv_heads} heads x {width}, {dtype}{capped}"


def compare(size: tuple[int, ...], dtype: str, softcap: float, rounds: int, most: Ceilings) -> dict[str, Any]:
    """Run the candidates alternately. Returns medians, and the median ratio of each to fastppo."""
    calls = candidates(size, DTYPES[dtype], softcap)
    times = [{name: seconds(call, DEVICE) for name, call in calls.items()} for _ in range(rounds + 2)][2:]
    median = {name: statistics.median(t[name] for t in times) for name in calls}
    rows, positions, _, kv_heads, width = size
    moved = 2 * rows * positions * kv_heads * width * DTYPES[dtype].itemsize
    return {
        "case": title(size, dtype, softcap),
        "ms": {name: 1e3 * t for name, t in median.items()},
        "times_faster": {n: statistics.median(t[n] / t["fastppo"] for t in times) for n in calls if n != "fastppo"},
        "gb_per_s": moved / median["fastppo"] / 1e9,
        "of_peak": most.share(median["fastppo"], moved=moved),
    }


def main(rounds: int = 30) -> None:
    most = ceilings(DEVICE)
    print(f"{most.device}, {registration.backend(DEVICE)}; medians of {rounds} rounds.", end=" ")
    print(f"Ceiling ({most.source}): {most.bandwidth / 1e9:,.0f} GB/s\n")
    print("| | reference, ms | flash-attn, ms | fastppo, ms | times faster than the reference | GB/s | of ceiling |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for size, dtype, softcap in dict.fromkeys(case[:3] for case in CASES):
        found = compare(size, dtype, softcap, rounds, most)
        results.append(found)
        ms = found["ms"]
        flash = f"{ms['flash-attn']:.3f}" if "flash-attn" in ms else ""
        print(
            f"| {found['case']} | {ms['reference']:.3f} | {flash} | {ms['fastppo']:.3f}"
            f" | {found['times_faster']['reference']:.1f} | {found['gb_per_s']:.1f} | {found['of_peak']:.0%} |",
            flush=True,
        )
    print(json.dumps({"device": most.device, "results": results}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
