"""Compare the ops over the vocabulary with eager PyTorch, with torch.compile and, if installed, with Liger-Kernel.

    pytest bench/test_vocabulary.py --benchmark-only
    python bench/test_vocabulary.py            # a table of paired ratios, and one line of JSON

For the table, candidates run alternately in one process, so that other programs slow all of them equally. The ceiling
of a forward pass is one read of the logits; of a backward pass one more read and a write; of a policy loss its three
matrix products. Runs on the GPU if there is one, with the sizes of an 8B Llama.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import sys
from typing import Any

import pytest
from ceilings import seconds
from op_case import DTYPES, OpCase, print_all
from vocabulary_ops import DEVICE, op_cases

CASES = [(case, dtype, candidate) for case in op_cases() for dtype in DTYPES for candidate in case.candidates]


@pytest.mark.parametrize(("case", "dtype", "candidate"), CASES, ids=lambda x: x.title if isinstance(x, OpCase) else x)
def test_vocabulary(benchmark: Any, case: OpCase, dtype: str, candidate: str) -> None:
    benchmark.group = f"{case.title}, {dtype}"
    call = case.calls(DTYPES[dtype])[candidate]
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    print_all(op_cases(), *map(int, sys.argv[1:]), device=DEVICE)
