"""Compare GAE over packed sequences with other implementations: `pytest bench/test_gae.py --benchmark-only`.

Runs on the GPU if there is one. `bench/gae.py` has the targets on the CPU.
"""

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gae_baselines
import pytest
import torch
from ceilings import seconds

from fastppo import ops
from fastppo.ops import eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

GAE = {
    "fastppo": lambda packed, wide, tall: ops.gae(*packed, gamma=0.99, lam=0.95),
    "padded loop": lambda packed, wide, tall: gae_baselines.padded_loop(*wide, 0.99, 0.95),
    "compiled loop": lambda packed, wide, tall: gae_baselines.compiled_loop(*tall, 0.99, 0.95),
    "associative scan": lambda packed, wide, tall: gae_baselines.associative_scan(*packed, 0.99, 0.95),
    "reference": lambda packed, wide, tall: eager.gae(*packed, gamma=0.99, lam=0.95),
}


@pytest.mark.benchmark(group="gae, 512 sequences of 1 to 2,000 tokens, fp32")
@pytest.mark.parametrize("way", GAE)
def test_gae(benchmark, way):
    torch.manual_seed(0)
    packed = [x.to(DEVICE) for x in gae_baselines.packed(torch.randint(1, 2001, (512,)).tolist())]
    wide = [gae_baselines.padded(rows, packed[2]) for rows in packed[:2]]
    tall = [rows.t().contiguous() for rows in wide]
    call = functools.partial(GAE[way], packed, wide, tall)
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="gae, 4,000,000 tokens, fp32")
@pytest.mark.parametrize("sequences", [1, 4000])
def test_gae_of_many_tokens(benchmark, sequences):
    packed = [x.to(DEVICE) for x in gae_baselines.packed([4_000_000 // sequences] * sequences)]
    call = functools.partial(ops.gae, *packed, gamma=0.99, lam=0.95)
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=5, warmup_rounds=1)
