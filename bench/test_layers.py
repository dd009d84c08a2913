"""Compare the ops of a layer with the model's own code, torch.compile, torch.add and, if installed, Liger-Kernel.

    pytest bench/test_layers.py --benchmark-only
    python bench/test_layers.py [ROUNDS]            # a table of paired ratios, and one line of JSON

For the table, candidates run alternately in one process, so that other programs slow all of them equally.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import sys
from typing import Any

import pytest
from ceilings import seconds
from layer_ops import DEVICE, op_cases
from op_case import DTYPES, OpCase, print_all

CASES = [(case, dtype, candidate) for case in op_cases() for dtype in DTYPES for candidate in case.candidates]


@pytest.mark.parametrize(("case", "dtype", "candidate"), CASES, ids=lambda x: x.title if isinstance(x, OpCase) else x)
def test_layers(benchmark: Any, case: OpCase, dtype: str, candidate: str) -> None:
    benchmark.group = f"{case.title}, {dtype}"
    call = case.calls(DTYPES[dtype])[candidate]
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    print_all(op_cases(), *map(int, sys.argv[1:]), device=DEVICE)
