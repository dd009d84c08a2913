"""Decode attention over the cache, compared with the reference and, if it is installed, with flash-attn's kernel.

    pytest bench/test_attend_cached.py --benchmark-only
    python bench/test_attend_cached.py         # a table of paired ratios, and one line of JSON

`bench/attention_ops.py` has the cases and their ceiling.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import sys
from typing import Any

import pytest
from attention_ops import DEVICE, op_cases
from ceilings import seconds
from op_case import DTYPES, OpCase, print_all

CASES = [(case, dtype, name) for case in op_cases() for dtype in DTYPES for name in ("fastppo", "eager")]


@pytest.mark.parametrize(("case", "dtype", "name"), CASES, ids=lambda x: x.title if isinstance(x, OpCase) else x)
def test_attend_cached(benchmark: Any, case: OpCase, dtype: str, name: str) -> None:
    benchmark.group = f"{case.title}, {dtype}"
    benchmark.pedantic(seconds, args=(case.calls(DTYPES[dtype])[name], DEVICE), rounds=30, warmup_rounds=3)


if __name__ == "__main__":
    print_all(op_cases(), *map(int, sys.argv[1:]), device=DEVICE)
