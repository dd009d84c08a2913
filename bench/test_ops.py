"""Microbenchmarks of the ops: `pytest bench --benchmark-only`. Groups compare fastppo with the oracle in plain PyTorch.

The sizes are those of the quickstart's learner and sampler: 320 response tokens, hidden 576, vocabulary 49,152.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import gae_baselines
import pytest
import torch

from fastppo import ops, reference

M, H, V, ROWS = 320, 576, 49_152, 32
IMPLEMENTATIONS = {"fastppo": ops, "reference": reference}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    hidden = torch.randn(M, H, dtype=torch.bfloat16)
    weight = torch.randn(V, H, dtype=torch.bfloat16) / H**0.5
    return hidden, weight, torch.randint(V, (M,))


@pytest.mark.benchmark(group="linear_logprobs forward, bf16")
def test_linear_logprobs(benchmark, implementation, head):
    with torch.no_grad():
        benchmark.pedantic(implementation.linear_logprobs, args=head, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="linear_policy_loss forward and backward, bf16")
def test_linear_policy_loss(benchmark, implementation, head):
    hidden, weight, targets = head
    hidden, old, advantages = hidden.clone().requires_grad_(), torch.full((M,), -11.0), torch.randn(M)

    def step():
        loss, _ = implementation.linear_policy_loss(
            hidden,
            weight,
            targets,
            old,
            advantages,
            temperature=1.0,
            clip_low=0.2,
            clip_high=0.2,
            normalizer=torch.tensor(float(M)),
        )
        loss.backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="sample_tokens, 32 rows, bf16")
def test_sample_tokens(benchmark, implementation):
    logits, stream = torch.randn(ROWS, V, dtype=torch.bfloat16), torch.arange(ROWS)
    options = {"temperature": 1.0, "seed": 1, "stream": stream, "offset": torch.zeros_like(stream)}
    benchmark(implementation.sample_tokens, logits, **options)


@pytest.mark.benchmark(group="attend_cached, 32 rows x 9 heads x 64 positions, bf16")
def test_attend_cached(benchmark, implementation):
    query, key, value = (torch.randn(ROWS, heads, 64, dtype=torch.bfloat16) for heads in (9, 3, 3))
    caches = [torch.randn(ROWS, 3, 80, 64, dtype=torch.bfloat16) for _ in range(2)]
    lengths, rows = torch.full((ROWS,), 64), torch.arange(ROWS)
    benchmark(implementation.attend_cached, query, key, value, *caches, lengths, rows, scale=0.125)


GAE = {
    "fastppo": lambda packed, wide, tall: ops.gae(*packed, gamma=0.99, lam=0.95),
    "padded loop": lambda packed, wide, tall: gae_baselines.padded_loop(*wide, 0.99, 0.95),
    "compiled loop": lambda packed, wide, tall: gae_baselines.compiled_loop(*tall, 0.99, 0.95),
    "associative scan": lambda packed, wide, tall: gae_baselines.associative_scan(*packed, 0.99, 0.95),
    "reference": lambda packed, wide, tall: reference.gae(*packed, gamma=0.99, lam=0.95),
}


@pytest.mark.benchmark(group="gae, 512 sequences of 1 to 2,000 tokens, fp32")
@pytest.mark.parametrize("way", GAE)
def test_gae(benchmark, way):
    torch.manual_seed(0)
    packed = gae_baselines.packed(torch.randint(1, 2001, (512,)).tolist())
    wide = [gae_baselines.padded(rows, packed[2]) for rows in packed[:2]]
    tall = [rows.t().contiguous() for rows in wide]
    benchmark.pedantic(GAE[way], args=(packed, wide, tall), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="gae, 4,000,000 tokens, fp32")
@pytest.mark.parametrize("sequences", [1, 4000])
def test_gae_of_many_tokens(benchmark, sequences):
    packed = gae_baselines.packed([4_000_000 // sequences] * sequences)
    benchmark.pedantic(ops.gae, args=packed, kwargs={"gamma": 0.99, "lam": 0.95}, rounds=5, warmup_rounds=1)
