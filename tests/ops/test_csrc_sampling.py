"""sample_tokens in C++: the oracle's tokens, and what may never be drawn."""

import math
from typing import Any

import pytest
import torch
from csrc_calls import DTYPES, assert_repeats, assert_rows_stand_alone, draw, kernels, names
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.ops import philox


@settings(max_examples=20)
@given(st.integers(1, 9000), st.integers(-(2**63), 2**63 - 1), st.sampled_from(DTYPES), st.floats(0.3, 2))
def test_the_token_is_the_oracle_s_away_from_rounding(vocabulary, seed, dtype, temperature):
    logits = (3 * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)
    stream = torch.arange(8) * 2**59 - 2**62
    tokens, logprobs = draw(logits, stream, temperature, seed)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    p = (logits.double() / temperature).softmax(-1)
    above = p.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    u = philox.uniform(seed, stream, torch.full_like(stream, 3))
    assert (above - p.gather(1, tokens[:, None])[:, 0] <= u + 1e-6).all() and (u <= above + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), p.log().gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)


def test_the_uniform_numbers_are_those_of_philox_bit_for_bit():
    # Equal logits: the token is floor(u * vocabulary), so a vocabulary of 2^23 shows every bit of u.
    logits = torch.zeros(1, 2**23, dtype=torch.bfloat16)
    for seed, stream, offset in [(0, 0, 0), (-1, 2**62, -5), (2**40 + 7, -1, 2**33)]:
        token, _ = kernels.sample_tokens(logits, torch.tensor([stream]), torch.tensor([offset]), 1.0, seed)
        u = philox.uniform(seed, torch.tensor([stream]), torch.tensor([offset]))
        assert token == (u * 2**23).long()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_draws_follow_the_softmax(dtype, level):
    draws, vocabulary = 50_000, 700  # three blocks
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    logits = torch.linspace(-3, 3, vocabulary)[order].to(dtype)
    logits[[0, 255, 256, 699]] = -math.inf
    tokens, _ = draw(logits.expand(draws, -1), temperature=0.8)
    expected = (logits.double() / 0.8).softmax(-1) * draws
    counts, possible = tokens.bincount(minlength=vocabulary), expected > 0
    chi2 = float(((counts - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    assert not counts[~possible].any()


def extreme_streams(offset: int = 3) -> Tensor:
    """Streams of a million whose u under seed 0 are nearest to 0 and to 1."""
    u = philox.uniform(0, torch.arange(1_000_000), torch.full((1_000_000,), offset))
    order = u.argsort()
    assert u[order[0]] < 5e-6 and u[order[-1]] > 1 - 5e-6
    return torch.cat([order[:8], order[-8:]])


@pytest.mark.parametrize("zero", [-math.inf, -95.0, -1e4], ids=str)
def test_a_token_of_probability_zero_is_never_drawn(zero, level):
    streams = extreme_streams()
    for vocabulary in (2, 255, 257, 512, 4096, 4097, 8200):
        for possible in ([0], [vocabulary - 1], [vocabulary // 2], [1, vocabulary - 2], [255, 256], [4095, 4096]):
            possible = [v for v in possible if 0 <= v < vocabulary] or [0]
            logits = torch.full((vocabulary,), zero)
            logits[possible] = 0.0
            tokens, logprobs = draw(logits.expand(16, -1), streams)
            assert torch.isin(tokens, torch.tensor(possible)).all()
            torch.testing.assert_close(logprobs, torch.full((16,), -math.log(len(set(possible)))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "no finite logit"])
def test_a_row_that_cannot_be_drawn_from_gives_nan(bad, level):
    logits = torch.randn(3, 5000)
    if bad == "no finite logit":
        logits[1] = -math.inf
    else:
        logits[1, 4500] = bad
    tokens, logprobs = draw(logits)
    assert logprobs.isnan().tolist() == [False, True, False] and 0 <= int(tokens[1]) < 5000


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_draw_is_that_of_a_row_alone_for_any_number_of_threads(dtype, level):
    logits = 3 * torch.randn(6, 30_011, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_repeats(lambda: list(draw(logits)))
    assert_rows_stand_alone(lambda rows: list(draw(logits[rows], torch.arange(6)[rows])), 6)


def test_no_rows_is_no_work():
    assert [x.shape for x in draw(torch.empty(0, 5))] == [(0,), (0,)]


def test_strided_arguments_give_the_same_draws():
    logits, stream = torch.randn(6, 700), torch.arange(6)
    expected = kernels.sample_tokens(logits, stream, stream, 1.0, 1)
    columns_apart, every_second = logits.t().contiguous().t(), stream.repeat_interleave(2)[::2]
    made = kernels.sample_tokens(columns_apart, every_second, every_second, 1.0, 1)
    assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))


ROWS = torch.tensor([0, 1, 2, 3])


def call_sample(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "stream": ROWS, "offset": ROWS, "temperature": 1.0, "seed": 1}
    kernels.sample_tokens(**(a | change))


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (call_sample, {"logits": torch.zeros(4, 50).double()}, "logits has dtype float64"),
        (call_sample, {"stream": ROWS.int()}, "stream has dtype int32"),
        (call_sample, {"offset": ROWS[1:]}, r"offset has shape \(3,\), expected \(4,\)"),
        (call_sample, {"temperature": math.inf}, "temperature is inf"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(call, change, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)
