"""Decode attention over the cache: `pytest bench --benchmark-only`. The sizes are those of the quickstart."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from fastppo import ops
from fastppo.ops import eager

ROWS, POSITIONS = 32, 64
IMPLEMENTATIONS = {"fastppo": ops, "reference": eager}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.benchmark(group=f"attend_cached, {ROWS} rows x 9 heads x {POSITIONS} positions, bf16")
def test_attend_cached(benchmark, implementation):
    query, key, value = (torch.randn(ROWS, heads, 64, dtype=torch.bfloat16) for heads in (9, 3, 3))
    caches = [torch.randn(ROWS, 3, POSITIONS + 16, 64, dtype=torch.bfloat16) for _ in range(2)]
    lengths, rows = torch.full((ROWS,), POSITIONS), torch.arange(ROWS)
    attend = IMPLEMENTATIONS[implementation].attend_cached
    benchmark(attend, query, key, value, *caches, lengths, rows, scale=0.125)
