"""The C++ kernels of the vocabulary ops, called directly, against fp64 truth at every SIMD level."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import LINEAR_CASES, VOCABULARY_CASES, LinearCase, VocabularyCase, assert_as_good, gradients, in_fp64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo import _C, philox, reference

LEVELS = _C.built()["simd"]
BEST = _C.built()["simd_used"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATS = (
    "logprobs",
    "entropy",
    "lse",
    "peak",
    "log_total",
    "ref_logprobs",
    "kl",
    "ref_lse",
    "ref_peak",
    "ref_log_total",
)
UPSTREAM = ("logprobs", "entropy", "lse", "kl")  # rows of vocabulary_backward's grad
kernels = torch.ops.fastppo


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        _C.set_simd(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.set_simd(BEST)


# Forward and backward


def forward(case: dict[str, Any]) -> Tensor:
    return kernels.vocabulary_forward(
        case["logits"], case["targets"], case["temperature"], case["softcap"], case.get("ref_logits")
    )


def backward(case: dict[str, Any], stats: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(case["logits"]) if out is None else out
    scale = (case["temperature"], case["softcap"], case.get("ref_logits"))
    kernels.vocabulary_backward(case["logits"], case["targets"], stats, grad, *scale, out)
    return out


def grad_table(upstream: dict[str, Tensor], rows: int) -> Tensor:
    """(4, M) fp32; a row that is not asked for is 0."""
    return torch.stack([upstream.get(name, torch.zeros(rows)).float() for name in UPSTREAM])


def oracle(case: dict[str, Any], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = case["logits"].detach().requires_grad_()
    stats = reference.token_logprobs(**(case | {"logits": leaf}))
    outputs = {name: x for name, x in stats._asdict().items() if x is not None}
    upstream = {name: g for name, g in upstream.items() if name in outputs}
    return {name: x.detach() for name, x in outputs.items()} | gradients(outputs, upstream, {"logits": leaf})


def outcome(case: dict[str, Any], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    stats = forward(case)
    made = {name: x for name, x in zip(STATS, stats, strict=False) if not name.endswith(("peak", "log_total"))}
    return made | {"d_logits": backward(case, stats, grad_table(upstream, len(case["logits"])))}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", VOCABULARY_CASES, ids=str)
def test_statistics_and_gradients_are_as_good_as_the_reference_s(
    case: VocabularyCase, dtype: torch.dtype, level: str
) -> None:
    arguments, upstream = case.build(dtype), case.upstream(UPSTREAM)
    truth = oracle(in_fp64(arguments), upstream)
    assert_as_good(outcome(arguments, upstream), oracle(arguments, upstream), truth, dtype)


def test_peak_and_log_total_are_those_of_the_row() -> None:
    case = VocabularyCase("two tiles", 3, 5000, temperature=0.7, reference=True).build(torch.float32)
    stats = dict(zip(STATS, forward(case), strict=True))
    for prefix, logits in (("", case["logits"]), ("ref_", case["ref_logits"])):
        z = logits.double() / 0.7
        torch.testing.assert_close(stats[prefix + "peak"].double(), z.amax(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close((stats[prefix + "peak"] + stats[prefix + "log_total"]).double(), z.logsumexp(-1))


@pytest.mark.parametrize("wanted", [[name] for name in UPSTREAM] + [["entropy", "kl"]], ids="+".join)
@pytest.mark.parametrize("stride0", [False, True], ids=["dense", "stride 0"])
def test_each_upstream_gradient_alone(wanted: list[str], stride0: bool) -> None:
    case = VocabularyCase("upstream", 7, 127, reference=True, temperature=0.6, softcap=20.0)
    arguments, upstream = case.build(torch.float32), case.upstream(UPSTREAM, stride0)
    weights = torch.tensor([[float(name in wanted)] for name in UPSTREAM])
    # With stride0 one column, expanded over the rows.
    grad = weights * grad_table(upstream, 7)
    grad = grad[:, :1].expand(4, 7) if stride0 else grad
    truth = oracle(in_fp64(arguments), {name: upstream[name] for name in wanted})["d_logits"]
    d_logits = backward(arguments, forward(arguments), grad)
    torch.testing.assert_close(d_logits.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("vocabulary", [127, 9000])
def test_strided_and_in_place_rows_give_the_same_bits(vocabulary: int, dtype: torch.dtype, level: str) -> None:
    arguments = VocabularyCase("strides", 5, vocabulary, reference=True).build(dtype)
    stats, grad = forward(arguments), torch.randn(4, 5)
    d_logits = backward(arguments, stats, grad)
    for make in (
        lambda x: torch.cat([x, x], 1)[:, :vocabulary],  # rows apart
        lambda x: x.t().contiguous().t(),  # columns apart
        lambda x: torch.cat([x.new_zeros(5, 1), x], 1)[:, 1:],  # not aligned
    ):
        strided = arguments | {name: make(arguments[name]) for name in ("logits", "ref_logits")}
        assert torch.equal(forward(strided), stats)
        out = torch.zeros(5, vocabulary + 3, dtype=dtype)
        assert torch.equal(backward(strided, stats, grad, out[:, 1:-2]), d_logits)
        assert not out[:, 0].any() and not out[:, -2:].any()
    logits = arguments["logits"].clone()
    backward(arguments | {"logits": logits}, stats, grad, logits)
    assert torch.equal(logits, d_logits)


def test_the_reference_may_have_a_dtype_of_its_own(level: str) -> None:
    case = VocabularyCase("dtypes", 7, 127, reference=True)
    for dtype in DTYPES:
        for ref_dtype in DTYPES:
            arguments = case.build(dtype) | {"ref_logits": case.build(ref_dtype)["ref_logits"]}
            truth = reference.token_logprobs(**in_fp64(arguments))
            torch.testing.assert_close(forward(arguments)[6].double(), truth.kl, rtol=1e-5, atol=1e-5)


def test_a_row_compared_with_itself_has_kl_zero() -> None:
    for dtype in DTYPES:
        case = VocabularyCase("same", 7, 5000, temperature=0.7).build(dtype)
        stats = forward(case | {"ref_logits": case["logits"]})
        assert (stats[6].abs() < 1e-12).all() and torch.equal(stats[0], stats[5]) and torch.equal(stats[2], stats[7])


@pytest.mark.parametrize("tile", [0, 1])
def test_an_infinite_kl_passes_no_gradient(tile: int, level: str) -> None:
    case = VocabularyCase("infinite", 3, 5000, reference=True).build(torch.float32)
    case["ref_logits"][1, 4096 * tile + 5] = -torch.inf
    upstream = VocabularyCase("upstream", 3, 1).upstream(UPSTREAM)
    truth = oracle(in_fp64(case), upstream)
    made = outcome(case, upstream)
    assert made["kl"].isinf().tolist() == [False, True, False]
    torch.testing.assert_close(made["d_logits"].double(), truth["d_logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_an_infinity_spoils_its_row_and_no_other(bad: float, level: str) -> None:
    case = VocabularyCase("bad", 3, 5000, reference=True).build(torch.float32)
    good = forward(case)
    case["logits"][1, 4100] = bad
    stats = forward(case)
    assert stats[[0, 1, 6], 1].isnan().all()
    assert torch.equal(stats[:, [0, 2]], good[:, [0, 2]])


def test_tokens_of_probability_zero_get_no_gradient(level: str) -> None:
    case = VocabularyCase("holes of -inf", 7, 127, values="holes", reference=True).build(torch.float32)
    d_logits = backward(case, forward(case), torch.randn(4, 7))
    assert not d_logits[case["logits"].isneginf()].any() and d_logits.isfinite().all()


# The loss in the chunk, and the losses of tokens


def chunk_arguments(case: LinearCase, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `policy_loss_in_chunk`, except the logits and what is made from them, by name."""
    logprobs = reference.linear_logprobs(**in_fp64(case.build(dtype))).logprobs
    made = case.build_loss(dtype, logprobs)
    made["logits"] = torch.nn.functional.linear(made["hidden"], made["weight"], made["bias"])
    if case.reference:
        made["ref_logits"] = torch.nn.functional.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    defaults = {"dual_clip": None, "entropy_coef": 0.0, "kl_coef": 0.0, "kl_kind": "exact", "mask": None}
    return defaults | {"ref_logits": None} | made


def update_in_chunk(a: dict[str, Any], gradient: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Loss, sums, largest ratio and d_logits; and token_stats, columns of a larger buffer."""
    logits, token_stats = a["logits"].clone(), torch.full((8, len(a["logits"]) + 2), 9.0)
    kernels.policy_loss_in_chunk(
        logits,
        a["targets"],
        a["old_logprobs"],
        a["advantages"],
        a["normalizer"],
        a["temperature"],
        a["softcap"],
        a["clip_low"],
        a["clip_high"],
        a["dual_clip"],
        a["entropy_coef"],
        a["kl_coef"],
        a["kl_kind"],
        a["ref_logprobs"],
        a["ref_logits"],
        a["mask"],
        gradient,
        token_stats[:, 1:-1],
    )
    assert (token_stats[:, [0, -1]] == 9.0).all()
    token_stats = token_stats[:, 1:-1]
    loss, sums, ratio_max = kernels.sum_tokens(token_stats, a["entropy_coef"], a["kl_coef"], a["normalizer"])
    return {"loss": loss, "sums": sums, "ratio_max": ratio_max, "d_logits": logits}, token_stats


def update_by_the_reference(a: dict[str, Any]) -> dict[str, Tensor]:
    logits = a["logits"].detach().requires_grad_()
    stats = reference.token_logprobs(
        logits, a["targets"], temperature=a["temperature"], softcap=a["softcap"], ref_logits=a["ref_logits"]
    )
    kl = stats.kl
    if a["kl_kind"] != "exact":
        kl = reference.kl_estimate(stats.logprobs, a["ref_logprobs"], a["kl_kind"])
    options = {name: a[name] for name in ("clip_low", "clip_high", "dual_clip", "entropy_coef", "kl_coef", "mask")}
    options |= {"entropy": stats.entropy, "kl": kl, "normalizer": a["normalizer"]}
    loss, policy_stats = reference.policy_loss(stats.logprobs, a["old_logprobs"], a["advantages"], **options)
    (d_logits,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.detach(), **policy_stats._asdict(), "d_logits": d_logits}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_the_loss_in_the_chunk_is_as_good_as_the_reference_s(case: LinearCase, dtype: torch.dtype, level: str) -> None:
    arguments = chunk_arguments(case, dtype)
    truth = update_by_the_reference(in_fp64(arguments))
    assert_as_good(update_in_chunk(arguments)[0], update_by_the_reference(arguments), truth, dtype)


def test_without_a_gradient_the_logits_stay_and_the_statistics_are_the_same() -> None:
    arguments = chunk_arguments(LinearCase("kept", 63, 127, 16, mask="some", reference="own"), torch.bfloat16)
    with_gradient, stats = update_in_chunk(arguments)
    without, same_stats = update_in_chunk(arguments, gradient=False)
    assert torch.equal(without["d_logits"], arguments["logits"]) and torch.equal(stats, same_stats)
    dropped = ~arguments["mask"]
    assert not with_gradient["d_logits"][dropped].any() and not stats[:, dropped].any()
    assert (stats[7] == arguments["mask"]).all()


def test_the_chunk_s_logprobs_are_those_of_forward_bit_for_bit(level: str) -> None:
    arguments = chunk_arguments(LinearCase("first update", 63, 5000, 16, temperature=0.7), torch.bfloat16)
    arguments["old_logprobs"] = forward(arguments)[0]
    _, token_stats = update_in_chunk(arguments)
    assert (token_stats[6] == 1).all() and not token_stats[3].any()


def token_arguments(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    random = torch.Generator().manual_seed(3)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=random, dtype=torch.float64).to(dtype)

    made = {name: normal() for name in ("logprobs", "advantages", "entropy", "kl")}
    made["old_logprobs"] = made["logprobs"] + torch.tensor([-30.0, -0.5, 0.0, 0.5, 30.0])[torch.arange(tokens) % 5]
    return made | {"mask": torch.rand(tokens, generator=random) < 0.8, "normalizer": torch.tensor(7.0)}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("tokens", [0, 1, 5000])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_policy_loss(tokens: int, masked: bool, dtype: torch.dtype) -> None:
    a = token_arguments(tokens, dtype)
    if not masked:
        a["mask"] = None
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5, "entropy_coef": 0.1, "kl_coef": 0.2}
    tensors = (a["logprobs"], a["old_logprobs"], a["advantages"], a["entropy"], a["kl"], a["mask"], a["normalizer"])
    result = dict(
        zip(("loss", "sums", "ratio_max", "d_x"), kernels.policy_loss(*tensors, *options.values()), strict=True)
    )

    def expected(a: dict[str, Any]) -> dict[str, Tensor]:
        leaf = a["logprobs"].clone().requires_grad_()
        loss, stats = reference.policy_loss(**(a | options | {"logprobs": leaf}))
        return {"loss": loss.detach(), **stats._asdict(), "d_x": torch.autograd.grad(loss, leaf)[0]}

    assert_as_good(result, expected(a), expected(in_fp64(a)), dtype)
    assert all(x.dtype == torch.float32 for x in result.values())


def test_the_dual_clip_s_known_answer() -> None:
    ratio, advantages = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([2.0, -2.0, 2.0])
    arguments = (ratio.log(), torch.zeros(3), advantages, None, None, None, torch.tensor(1.0))
    loss, sums, ratio_max, d_logprobs = kernels.policy_loss(*arguments, 0.2, 0.2, 1.5, 0.0, 0.0)
    assert loss.item() == pytest.approx(-2.4 + 3 - 1) and ratio_max.item() == pytest.approx(2.0)
    assert sums[[4, 5, 7]].tolist() == [1, 1, 3]
    assert d_logprobs.tolist() == pytest.approx([0.0, 0.0, -1.0])


def test_a_coefficient_of_zero_leaves_an_infinite_kl_out() -> None:
    token_stats = torch.zeros(8, 3)
    token_stats[2] = math.inf
    token_stats[0] = 1.0
    assert kernels.sum_tokens(token_stats, 0.0, 0.0, torch.tensor(3.0))[0] == 1.0
    assert kernels.sum_tokens(token_stats, 0.0, 0.1, torch.tensor(3.0))[0] == math.inf
    assert kernels.sum_tokens(token_stats[:, :0], 0.0, 0.0, torch.tensor(3.0))[2] == 0.0


def test_sums_over_many_tokens_lose_nothing() -> None:
    token_stats = torch.full((100_000, 8), 0.1).t()  # a plain fp32 sum is 10000.2
    _, sums, _ = kernels.sum_tokens(token_stats, 0.0, 0.0, torch.tensor(1.0))
    torch.testing.assert_close(sums, torch.full((8,), 1e4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("tokens", [0, 1, 5000])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss(tokens: int, clip: float | None, dtype: torch.dtype) -> None:
    # Steps of 1/8 are exact in every dtype: no rounding moves a token over the clip.
    random = torch.Generator().manual_seed(5)
    values, old, returns = (torch.randint(-9, 9, (3, tokens), generator=random) / 8).to(dtype)
    mask = torch.rand(tokens, generator=random) < 0.8
    made = kernels.value_loss(values, old, returns, mask, torch.tensor(7.0), clip)

    def expected(*tensors: Tensor) -> dict[str, Tensor]:
        leaf = tensors[0].clone().requires_grad_()
        loss, stats = reference.value_loss(leaf, *tensors[1:], mask=mask, normalizer=torch.tensor(7.0), clip=clip)
        return {"loss": loss.detach(), "sums": stats.sums, "d_x": torch.autograd.grad(loss, leaf)[0]}

    result = dict(zip(("loss", "sums", "d_x"), made, strict=True))
    assert_as_good(
        result, expected(values, old, returns), expected(*(x.double() for x in (values, old, returns))), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (7, 127), (3, 5000)])
def test_accumulate(shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    part, total = torch.randn(shape).to(dtype), torch.randn(shape[0], shape[1] + 1)
    expected = total.clone()
    expected[:, :-1] += part
    kernels.accumulate(total[:, :-1], part)
    assert torch.equal(total, expected)
    kernels.accumulate(total[:, :-1], part.t().contiguous().t())
    expected[:, :-1] += part
    assert torch.equal(total, expected)


# Sampling


def draw(
    logits: Tensor, stream: Tensor | None = None, temperature: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    stream = torch.arange(len(logits)) if stream is None else stream
    return kernels.sample_tokens(logits, stream, torch.full_like(stream, 3), temperature, seed)


@settings(max_examples=20)
@given(st.integers(1, 9000), st.integers(-(2**63), 2**63 - 1), st.sampled_from(DTYPES), st.floats(0.3, 2))
def test_the_token_is_the_oracle_s_away_from_rounding(
    vocabulary: int, seed: int, dtype: torch.dtype, temperature: float
) -> None:
    logits = (3 * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)
    stream = torch.arange(8) * 2**59 - 2**62
    tokens, logprobs = draw(logits, stream, temperature, seed)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    p = (logits.double() / temperature).softmax(-1)
    above = p.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    u = philox.uniform(seed, stream, torch.full_like(stream, 3))
    assert (above - p.gather(1, tokens[:, None])[:, 0] <= u + 1e-6).all() and (u <= above + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), p.log().gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)


def test_the_uniform_numbers_are_those_of_philox_bit_for_bit() -> None:
    # Equal logits: the token is floor(u * vocabulary), so a vocabulary of 2^23 shows every bit of u.
    logits = torch.zeros(1, 2**23, dtype=torch.bfloat16)
    for seed, stream, offset in [(0, 0, 0), (-1, 2**62, -5), (2**40 + 7, -1, 2**33)]:
        token, _ = kernels.sample_tokens(logits, torch.tensor([stream]), torch.tensor([offset]), 1.0, seed)
        u = philox.uniform(seed, torch.tensor([stream]), torch.tensor([offset]))
        assert token == (u * 2**23).long()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_draws_follow_the_softmax(dtype: torch.dtype, level: str) -> None:
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
def test_a_token_of_probability_zero_is_never_drawn(zero: float, level: str) -> None:
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
def test_a_row_that_cannot_be_drawn_from_gives_nan(bad: Any, level: str) -> None:
    logits = torch.randn(3, 5000)
    if bad == "no finite logit":
        logits[1] = -math.inf
    else:
        logits[1, 4500] = bad
    tokens, logprobs = draw(logits)
    assert logprobs.isnan().tolist() == [False, True, False] and 0 <= int(tokens[1]) < 5000


# What holds for all


@pytest.fixture(scope="module")
def case_of_tiles() -> dict[str, Any]:
    """Enough work to be shared out, tiles that end where they like, and a loss."""
    case = LinearCase("tiles", 6, 30_011, 16, reference="own", mask="some", loss=(("kl_coef", 0.2),))
    return chunk_arguments(case, torch.bfloat16)


def everything(a: dict[str, Any], rows: slice = slice(None)) -> list[Tensor]:
    """Results of all vocabulary ops for some of the rows, the rows along the last dimension."""
    a = {name: x[rows] if isinstance(x, Tensor) and x.shape[:1] == (6,) else x for name, x in a.items()}
    stats = forward(a)
    made, token_stats = update_in_chunk(a)
    d_logits = backward(a, stats, torch.linspace(-1, 1, 24).view(4, 6)[:, rows])
    return [stats, d_logits.t(), made["d_logits"].t(), token_stats, *draw(a["logits"], torch.arange(6)[rows])]


def test_results_repeat_for_any_number_of_threads_bit_for_bit(case_of_tiles: dict[str, Any], level: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(everything(case_of_tiles))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit(case_of_tiles: dict[str, Any], level: str) -> None:
    together = everything(case_of_tiles)
    for row in range(6):
        alone = everything(case_of_tiles, slice(row, row + 1))
        assert all(torch.equal(x, y[..., row : row + 1]) for x, y in zip(alone, together, strict=True))


def test_no_rows_is_no_work() -> None:
    a = {"logits": torch.empty(0, 5), "targets": torch.empty(0, dtype=torch.int64), "temperature": 1.0, "softcap": None}
    assert forward(a).shape == (5, 0)
    assert backward(a, torch.empty(5, 0), torch.empty(4, 0)).shape == (0, 5)
    assert [x.shape for x in draw(a["logits"])] == [(0,), (0,)]


def test_rows_past_2_31_elements() -> None:
    stride, vocabulary = 2**30 + 11, 5000  # only the pages of the rows are ever touched
    logits = torch.empty_strided((4, vocabulary), (stride, 1), dtype=torch.bfloat16)
    small = torch.randn(4, vocabulary).bfloat16()
    logits.copy_(small)
    arguments = {"targets": torch.tensor([1, 4999, 0, 4096]), "temperature": 1.0, "softcap": None}
    stats, grad = forward(arguments | {"logits": small}), torch.randn(4, 4)
    assert torch.equal(forward(arguments | {"logits": logits}), stats)
    assert all(torch.equal(x, y) for x, y in zip(draw(logits), draw(small), strict=True))
    expected = backward(arguments | {"logits": small}, stats, grad)
    assert torch.equal(backward(arguments | {"logits": logits}, stats, grad, logits), expected)


# Arguments

TARGETS = torch.tensor([0, 1, 2, 3])
ONE = torch.tensor(1.0)


def call_forward(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "targets": TARGETS, "temperature": 1.0, "softcap": None, "ref_logits": None}
    kernels.vocabulary_forward(**(a | change))


def call_backward(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "targets": TARGETS, "stats": torch.zeros(5, 4), "grad": torch.zeros(4, 4)}
    a |= {"temperature": 1.0, "softcap": None, "ref_logits": None, "out": torch.zeros(4, 50)}
    kernels.vocabulary_backward(**(a | change))


def call_chunk(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "targets": TARGETS, "old_logprobs": torch.zeros(4), "advantages": torch.zeros(4)}
    a |= {"normalizer": ONE, "temperature": 1.0, "softcap": None, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    a |= {"entropy_coef": 0.0, "kl_coef": 0.0, "kl_kind": "exact", "ref_logprobs": None, "ref_logits": None}
    a |= {"mask": None, "gradient": True, "token_stats": torch.zeros(8, 4)}
    kernels.policy_loss_in_chunk(**(a | change))


def call_policy_loss(**change: Any) -> None:
    a = {"logprobs": torch.zeros(4), "old_logprobs": torch.zeros(4), "advantages": torch.zeros(4), "entropy": None}
    a |= {"kl": None, "mask": None, "normalizer": ONE, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    kernels.policy_loss(**(a | {"entropy_coef": 0.0, "kl_coef": 0.0} | change))


def call_value_loss(**change: Any) -> None:
    a = {"values": torch.zeros(4), "old_values": torch.zeros(4), "returns": torch.zeros(4), "mask": None}
    kernels.value_loss(**(a | {"normalizer": ONE, "clip": None} | change))


def call_sample(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "stream": TARGETS, "offset": TARGETS, "temperature": 1.0, "seed": 1}
    kernels.sample_tokens(**(a | change))


def call_accumulate(**change: Any) -> None:
    kernels.accumulate(**({"total": torch.zeros(4, 5), "part": torch.zeros(4, 5)} | change))


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (call_forward, {"logits": torch.zeros(4, 50).double()}, "logits has dtype float64, expected float32, bfloat16"),
        (call_forward, {"logits": torch.zeros(50)}, r"logits has shape \(50,\), expected \(rows, vocabulary\)"),
        (call_forward, {"logits": torch.zeros(4, 0)}, r"logits has shape \(4, 0\)"),
        (call_forward, {"targets": TARGETS.int()}, "targets has dtype int32, expected int64"),
        (call_forward, {"targets": TARGETS[1:]}, r"targets has shape \(3,\), expected \(4,\)"),
        (call_forward, {"targets": TARGETS * 33}, r"targets\[2\] is 66; a vocabulary of 50 allows 0 to 49"),
        (call_forward, {"targets": TARGETS - 1}, r"targets\[0\] is -1"),
        (call_forward, {"temperature": 0.0}, "temperature is 0"),
        (call_forward, {"softcap": -1.0}, "softcap is -1"),
        (call_forward, {"ref_logits": torch.zeros(4, 51)}, r"ref_logits has shape \(4, 51\), expected \(4, 50\)"),
        (call_forward, {"ref_logits": torch.zeros(4, 50).long()}, "ref_logits has dtype int64"),
        (call_backward, {"stats": torch.zeros(10, 4)}, r"stats has shape \(10, 4\), expected \(5, 4\)"),
        (call_backward, {"grad": torch.zeros(4, 3)}, r"grad has shape \(4, 3\), expected \(4, 4\)"),
        (call_backward, {"grad": torch.zeros(4, 4).double()}, "grad has dtype float64, expected float32"),
        (call_backward, {"out": torch.zeros(4, 50).half()}, "out has dtype float16, expected float32"),
        (call_backward, {"out": torch.zeros(4, 49)}, r"out has shape \(4, 49\)"),
        (call_backward, {"out": torch.zeros(50, 4).t()}, "out must be dense in its last dimension"),
        (call_backward, {"out": torch.zeros(50).expand(4, 50)}, "out has rows of 50 entries, and only 0 between"),
        (call_chunk, {"logits": torch.zeros(50, 4).t()}, "logits must be dense"),
        (call_chunk, {"targets": TARGETS + 47}, r"targets\[3\] is 50"),
        (call_chunk, {"token_stats": torch.zeros(8, 5)}, r"token_stats has shape \(8, 5\), expected \(8, 4\)"),
        (call_chunk, {"kl_kind": "k1"}, "kl_kind is 'k1', expected 'exact', 'k2' or 'k3'"),
        (call_chunk, {"mask": torch.zeros(4)}, "mask has dtype float32, expected bool"),
        (call_chunk, {"normalizer": torch.ones(1)}, r"normalizer has shape \(1,\), expected \(\)"),
        (call_chunk, {"clip_low": 1.5}, "clip_low is 1.5"),
        (call_policy_loss, {"logprobs": torch.zeros(4).double()}, "logprobs has dtype float64"),
        (call_policy_loss, {"logprobs": torch.zeros(4, 1)}, r"logprobs has shape \(4, 1\)"),
        (call_policy_loss, {"advantages": torch.zeros(4).long()}, "advantages has dtype int64"),
        (call_policy_loss, {"kl": torch.zeros(3)}, r"kl has shape \(3,\), expected \(4,\)"),
        (call_policy_loss, {"dual_clip": 1.0}, "dual_clip is 1"),
        (call_value_loss, {"values": torch.zeros(4).double()}, "values has dtype float64"),
        (call_value_loss, {"returns": torch.zeros(3)}, r"returns has shape \(3,\)"),
        (call_value_loss, {"clip": 0.0}, "clip is 0"),
        (call_sample, {"logits": torch.zeros(4, 50).double()}, "logits has dtype float64"),
        (call_sample, {"stream": TARGETS.int()}, "stream has dtype int32"),
        (call_sample, {"offset": TARGETS[1:]}, r"offset has shape \(3,\), expected \(4,\)"),
        (call_sample, {"temperature": math.inf}, "temperature is inf"),
        (call_accumulate, {"total": torch.zeros(4, 5).half()}, "total has dtype float16"),
        (call_accumulate, {"part": torch.zeros(4, 6)}, r"part has shape \(4, 6\), expected \(4, 5\)"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(
    call: Callable[..., None], change: dict[str, Any], message: str
) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_nothing_is_written_when_an_argument_is_bad() -> None:
    logits = torch.ones(4, 50)
    with pytest.raises(ValueError, match="targets"):
        call_chunk(logits=logits, targets=TARGETS + 50)
    assert (logits == 1).all()
