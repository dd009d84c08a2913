"""vocabulary_forward and vocabulary_backward in C++, against fp64 truth at every SIMD level."""

import math
from typing import Any

import pytest
import torch
from cases import CERTAIN_CASES, VOCABULARY_CASES, VocabularyCase, assert_as_good, certain, gradients, in_fp64
from csrc_calls import (
    DTYPES,
    assert_repeats,
    assert_rows_stand_alone,
    backward,
    draw,
    forward,
    kernels,
    names,
    some_rows,
)
from torch import Tensor

from fastppo.ops import eager

STATS = ("logprobs", "entropy", "lse", "peak", "log_total")
STATS += ("ref_logprobs", "kl", "ref_lse", "ref_peak", "ref_log_total")
UPSTREAM = ("logprobs", "entropy", "lse", "kl")  # rows of vocabulary_backward's grad


def grad_table(upstream: dict[str, Tensor], rows: int) -> Tensor:
    """(4, M) fp32; a row that is not asked for is 0."""
    return torch.stack([upstream.get(name, torch.zeros(rows)).float() for name in UPSTREAM])


def oracle(case: dict[str, Any], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = case["logits"].detach().requires_grad_()
    stats = eager.token_logprobs(**(case | {"logits": leaf}))
    outputs = {name: x for name, x in stats._asdict().items() if x is not None}
    upstream = {name: g for name, g in upstream.items() if name in outputs}
    return {name: x.detach() for name, x in outputs.items()} | gradients(outputs, upstream, {"logits": leaf})


def outcome(case: dict[str, Any], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    stats = forward(case)
    made = {name: x for name, x in zip(STATS, stats, strict=False) if not name.endswith(("peak", "log_total"))}
    return made | {"d_logits": backward(case, stats, grad_table(upstream, len(case["logits"])))}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", VOCABULARY_CASES, ids=str)
def test_statistics_and_gradients_are_as_good_as_the_reference_s(case, dtype, level):
    arguments, upstream = case.build(dtype), case.upstream(UPSTREAM)
    truth = oracle(in_fp64(arguments), upstream)
    assert_as_good(outcome(arguments, upstream), oracle(arguments, upstream), truth, dtype)


def test_peak_and_log_total_are_those_of_the_row():
    case = VocabularyCase("two tiles", 3, 5000, temperature=0.7, reference=True).build(torch.float32)
    stats = dict(zip(STATS, forward(case), strict=True))
    for prefix, logits in (("", case["logits"]), ("ref_", case["ref_logits"])):
        z = logits.double() / 0.7
        assert torch.equal(stats[prefix + "peak"], logits.amax(-1))  # of z it would be rounded
        total = stats[prefix + "peak"].double() / 0.7 + stats[prefix + "log_total"]
        torch.testing.assert_close(total, z.logsumexp(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wanted", [[name] for name in UPSTREAM] + [["entropy", "kl"]], ids="+".join)
@pytest.mark.parametrize("stride0", [False, True], ids=["dense", "stride 0"])
def test_each_upstream_gradient_alone(wanted, stride0):
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
def test_strided_and_in_place_rows_give_the_same_bits(vocabulary, dtype, level):
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


def test_the_reference_may_have_a_dtype_of_its_own(level):
    case = VocabularyCase("dtypes", 7, 127, reference=True)
    for dtype in DTYPES:
        for ref_dtype in DTYPES:
            arguments = case.build(dtype) | {"ref_logits": case.build(ref_dtype)["ref_logits"]}
            truth = eager.token_logprobs(**in_fp64(arguments))
            torch.testing.assert_close(forward(arguments)[6].double(), truth.kl, rtol=1e-5, atol=1e-5)


def test_a_row_compared_with_itself_has_kl_zero(level):
    for dtype in DTYPES:
        case = VocabularyCase("same", 7, 5000, temperature=0.7).build(dtype)
        stats = forward(case | {"ref_logits": case["logits"]})
        assert (stats[6].abs() < 1e-12).all() and torch.equal(stats[0], stats[5]) and torch.equal(stats[2], stats[7])


@pytest.mark.parametrize("tile", [0, 1])
def test_an_infinite_kl_passes_no_gradient(tile, level):
    case = VocabularyCase("infinite", 3, 5000, reference=True).build(torch.float32)
    case["ref_logits"][1, 4096 * tile + 5] = -torch.inf
    upstream = VocabularyCase("upstream", 3, 1).upstream(UPSTREAM)
    truth = oracle(in_fp64(case), upstream)
    made = outcome(case, upstream)
    assert made["kl"].isinf().tolist() == [False, True, False]
    torch.testing.assert_close(made["d_logits"].double(), truth["d_logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_an_infinity_spoils_its_row_and_no_other(bad, level):
    case = VocabularyCase("bad", 3, 5000, reference=True).build(torch.float32)
    good = forward(case)
    case["logits"][1, 4100] = bad
    stats = forward(case)
    assert stats[[0, 1, 6], 1].isnan().all()
    assert torch.equal(stats[:, [0, 2]], good[:, [0, 2]])


def test_tokens_of_probability_zero_get_no_gradient(level):
    case = VocabularyCase("holes of -inf", 7, 127, values="holes", reference=True).build(torch.float32)
    d_logits = backward(case, forward(case), torch.randn(4, 7))
    assert not d_logits[case["logits"].isneginf()].any() and d_logits.isfinite().all()


@pytest.mark.parametrize("case", CERTAIN_CASES, ids=str)
def test_a_token_that_is_certain_gets_no_gradient(case, level):
    arguments = certain(case)
    stats = forward(arguments)
    d_logits = backward(arguments, stats, torch.ones(4, case.rows))
    d_lse = torch.zeros_like(d_logits).scatter_(1, arguments["targets"][:, None], 1 / case.temperature)
    slope = 1.0 if case.softcap is None else 1 - (arguments["logits"] / case.softcap).tanh().square()
    torch.testing.assert_close(d_logits, slope * d_lse, rtol=1e-5, atol=1e-8)
    assert (stats[:2].abs() < 1e-20).all()


def passes(a: dict[str, Any], rows: slice = slice(None)) -> list[Tensor]:
    a, grad = some_rows(a, rows), torch.linspace(-1, 1, 4 * len(a["logits"])).view(4, -1)[:, rows]
    stats = forward(a)
    return [stats, backward(a, stats, grad).t()]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_results_are_those_of_a_row_alone_for_any_number_of_threads(dtype, level):
    case = VocabularyCase("tiles", 6, 30_011, reference=True).build(dtype)  # enough work to be shared out
    assert_repeats(lambda: passes(case))
    assert_rows_stand_alone(lambda rows: passes(case, rows), 6)


def test_no_rows_is_no_work():
    a = {"logits": torch.empty(0, 5), "targets": torch.empty(0, dtype=torch.int64), "temperature": 1.0, "softcap": None}
    assert forward(a).shape == (5, 0)
    assert backward(a, torch.empty(5, 0), torch.empty(4, 0)).shape == (0, 5)


def test_rows_past_2_31_elements():
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


TARGETS = torch.tensor([0, 1, 2, 3])


def call_forward(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "targets": TARGETS, "temperature": 1.0, "softcap": None, "ref_logits": None}
    kernels.vocabulary_forward(**(a | change))


def call_backward(**change: Any) -> None:
    a = {"logits": torch.zeros(4, 50), "targets": TARGETS, "stats": torch.zeros(5, 4), "grad": torch.zeros(4, 4)}
    a |= {"temperature": 1.0, "softcap": None, "ref_logits": None, "out": torch.zeros(4, 50)}
    kernels.vocabulary_backward(**(a | change))


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
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(call, change, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)
