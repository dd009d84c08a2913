"""The sampling kernel in Triton: on the GPU where there is one, else under Triton's interpreter (see conftest)."""

import math

import pytest
import torch
import triton
import triton.language as tl
from test_ops import names
from test_triton import DEVICE, DTYPES, INTERPRETED
from torch import Tensor

from fastppo.kernels.sample_tokens import sample_tokens, uniform
from fastppo.ops import philox

# NaN and infinities are among what is tested, and NumPy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@triton.jit(do_not_specialize=["seed"])
def uniform_kernel(stream, offset, out, seed):
    i = tl.program_id(0)
    tl.store(out + i, uniform(seed, tl.load(stream + i), tl.load(offset + i)))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**31) - 5, 2**62 + 12345])
def test_the_random_numbers_are_philox_s_bit_for_bit(seed):
    stream = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1], device=DEVICE)
    offset = torch.tensor([0, -7, 3, 2**40 + 9, 2**31, 2**63 - 1], device=DEVICE)
    out = torch.empty(6, device=DEVICE)
    uniform_kernel[(6,)](stream, offset, out, seed)
    assert torch.equal(out.double(), philox.uniform(seed, stream, offset))


def positions(rows: int) -> tuple[Tensor, Tensor]:
    rows_ = torch.arange(rows, device=DEVICE)
    return rows_ * 2**33 + 7, rows_ * 5 - 3  # both words of the counter, and the sign


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1000, 50257, 151936])
def test_the_token_is_the_oracle_s(vocabulary, dtype):
    rows = 2 if INTERPRETED else 64
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits, (stream, offset) = logits.to(DEVICE, dtype), positions(rows)
    for seed in (0, -1, 2**63 + 12345):
        tokens, logprobs = sample_tokens(logits, stream, offset, 0.9, seed)
        p = (logits.double() / 0.9).softmax(-1)
        chosen = p.gather(1, tokens[:, None])[:, 0]
        upper = p.cumsum(-1).gather(1, tokens[:, None])[:, 0]
        u = philox.uniform(seed, stream, offset)
        assert (upper - chosen <= u + 1e-6).all() and (u <= upper + 1e-6).all()
        torch.testing.assert_close(logprobs.double(), chosen.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_draws_follow_the_softmax():
    draws = 300 if INTERPRETED else 200_000
    logits = torch.tensor([0.5, -math.inf, 1.0, -1.0, 0.0, 2.0, -math.inf], device=DEVICE)
    tokens, _ = sample_tokens(logits.expand(draws, -1), *positions(draws), 1.0, 3)
    expected, counts = logits.softmax(-1) * draws, tokens.bincount(minlength=7)
    possible = expected > 0
    chi2 = float(((counts - expected)[possible].square() / expected[possible]).sum())
    assert abs(chi2 - 4) < 5 * math.sqrt(8) and not counts[~possible].any()


def test_a_token_of_probability_zero_is_never_drawn():
    stream = torch.arange(2_000_000)
    u = philox.uniform(5, stream, torch.zeros_like(stream))
    extreme = torch.stack((u.argmin(), u.argmax(), (u - 0.5).abs().argmin())).to(DEVICE)
    for vocabulary in (1, 300, 1024, 5000):
        random = torch.Generator().manual_seed(vocabulary)
        logits = torch.randn(3, vocabulary, generator=random)
        keep = torch.rand(3, vocabulary, generator=random) < 0.01
        keep[:, vocabulary // 2] = True
        for impossible in (-math.inf, -500.0):
            given = logits.masked_fill(~keep, impossible).to(DEVICE)
            tokens, logprobs = sample_tokens(given, extreme, torch.zeros_like(extreme), 1.0, 5)
            assert keep.gather(1, tokens.cpu()[:, None]).all() and logprobs.isfinite().all()


def test_a_row_that_cannot_be_drawn_from_has_logprob_nan():
    logits = torch.zeros(5, 3000, device=DEVICE)
    logits[0, 2999], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    tokens, logprobs = sample_tokens(logits, *positions(5), 1.0, 0)
    assert logprobs.isnan().tolist() == [True, True, True, False, False]
    assert ((tokens >= 0) & (tokens < 3000)).all()
    assert sample_tokens(logits[:0], *positions(0), 1.0, 0)[0].shape == (0,)


def test_a_draw_does_not_depend_on_other_rows():
    logits = 3 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    stream, offset = positions(4)
    tokens, logprobs = sample_tokens(logits, stream, offset, 0.9, 1)
    for rows in (torch.tensor([3, 1]), torch.tensor([2])):
        again = sample_tokens(logits[rows], stream[rows], offset[rows], 0.9, 1)
        assert torch.equal(again[0], tokens[rows]) and torch.equal(again[1], logprobs[rows])


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("vocabulary", [5000, 4096])
def test_a_draw_does_not_depend_on_the_number_of_programs(vocabulary, truncated, monkeypatch):
    rows = 3
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    kept = (logits[:, 7].float(), torch.full((rows,), 7, device=DEVICE)) if truncated else ()
    drawn = []
    for programs in (1, 6, 1024):  # all tiles of a row, two and one
        monkeypatch.setattr("fastppo.kernels.sample_tokens.PROGRAMS", programs)
        drawn.append(sample_tokens(logits, *positions(rows), 0.9, 1, *kept))
    for tokens, logprobs in drawn[1:]:
        assert torch.equal(tokens, drawn[0][0]) and torch.equal(logprobs, drawn[0][1])
