"""The losses in C++, of a chunk of logits and of tokens, against fp64 truth."""

import math
from typing import Any

import pytest
import torch
from cases import LINEAR_CASES, LinearCase, assert_as_good, in_fp64
from csrc_calls import (
    DTYPES,
    assert_repeats,
    assert_rows_stand_alone,
    chunk_arguments,
    forward,
    kernels,
    names,
    some_rows,
    update_in_chunk,
)
from torch import Tensor

from fastppo import ops
from fastppo.ops import eager


def update_by_the_reference(a: dict[str, Any]) -> dict[str, Tensor]:
    logits = a["logits"].detach().requires_grad_()
    stats = eager.token_logprobs(
        logits, a["targets"], temperature=a["temperature"], softcap=a["softcap"], ref_logits=a["ref_logits"]
    )
    kl = stats.kl
    if a["kl_kind"] != "exact":
        kl = eager.kl_estimate(stats.logprobs, a["ref_logprobs"], a["kl_kind"])
    options = {name: a[name] for name in ("clip_low", "clip_high", "dual_clip", "entropy_coef", "kl_coef", "mask")}
    options |= {"entropy": stats.entropy, "kl": kl, "normalizer": a["normalizer"]}
    loss, policy_stats = eager.policy_loss(stats.logprobs, a["old_logprobs"], a["advantages"], **options)
    (d_logits,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.detach(), **policy_stats._asdict(), "d_logits": d_logits}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_the_loss_in_the_chunk_is_as_good_as_the_reference_s(case, dtype, level):
    arguments = chunk_arguments(case, dtype)
    truth = update_by_the_reference(in_fp64(arguments))
    assert_as_good(update_in_chunk(arguments)[0], update_by_the_reference(arguments), truth, dtype)


def test_without_a_gradient_the_logits_stay_and_the_statistics_are_the_same():
    arguments = chunk_arguments(LinearCase("kept", 63, 127, 16, mask="some", reference="own"), torch.bfloat16)
    with_gradient, stats = update_in_chunk(arguments)
    without, same_stats = update_in_chunk(arguments, gradient=False)
    assert torch.equal(without["d_logits"], arguments["logits"]) and torch.equal(stats, same_stats)
    dropped = ~arguments["mask"]
    assert not with_gradient["d_logits"][dropped].any() and not stats[:, dropped].any()
    assert (stats[7] == arguments["mask"]).all()


def test_the_chunk_s_logprobs_are_those_of_forward_bit_for_bit(level):
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
def test_policy_loss(tokens, masked, dtype):
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
        loss, stats = eager.policy_loss(**(a | options | {"logprobs": leaf}))
        return {"loss": loss.detach(), **stats._asdict(), "d_x": torch.autograd.grad(loss, leaf)[0]}

    assert_as_good(result, expected(a), expected(in_fp64(a)), dtype)
    assert all(x.dtype == torch.float32 for x in result.values())


def test_the_dual_clip_s_known_answer():
    ratio, advantages = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([2.0, -2.0, 2.0])
    arguments = (ratio.log(), torch.zeros(3), advantages, None, None, None, torch.tensor(1.0))
    loss, sums, ratio_max, d_logprobs = kernels.policy_loss(*arguments, 0.2, 0.2, 1.5, 0.0, 0.0)
    assert loss.item() == pytest.approx(-2.4 + 3 - 1) and ratio_max.item() == pytest.approx(2.0)
    assert sums[[4, 5, 7]].tolist() == [1, 1, 3]
    assert d_logprobs.tolist() == pytest.approx([0.0, 0.0, -1.0])


def test_a_coefficient_of_zero_leaves_an_infinite_kl_out():
    token_stats = torch.zeros(8, 3)
    token_stats[2] = math.inf
    token_stats[0] = 1.0
    assert kernels.sum_tokens(token_stats, 0.0, 0.0, torch.tensor(3.0))[0] == 1.0
    assert kernels.sum_tokens(token_stats, 0.0, 0.1, torch.tensor(3.0))[0] == math.inf
    assert kernels.sum_tokens(token_stats[:, :0], 0.0, 0.0, torch.tensor(3.0))[2] == 0.0


def test_sums_over_many_tokens_lose_nothing():
    token_stats = torch.full((100_000, 8), 0.1).t()  # a plain fp32 sum is 10000.2
    _, sums, _ = kernels.sum_tokens(token_stats, 0.0, 0.0, torch.tensor(1.0))
    torch.testing.assert_close(sums, torch.full((8,), 1e4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("tokens", [0, 1, 5000])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss(tokens, clip, dtype):
    # Steps of 1/8 are exact in every dtype: no rounding moves a token over the clip.
    random = torch.Generator().manual_seed(5)
    values, old, returns = (torch.randint(-9, 9, (3, tokens), generator=random) / 8).to(dtype)
    mask = torch.rand(tokens, generator=random) < 0.8
    made = kernels.value_loss(values, old, returns, mask, torch.tensor(7.0), clip)

    def expected(*tensors: Tensor) -> dict[str, Tensor]:
        leaf = tensors[0].clone().requires_grad_()
        loss, stats = eager.value_loss(leaf, *tensors[1:], mask=mask, normalizer=torch.tensor(7.0), clip=clip)
        return {"loss": loss.detach(), "sums": stats.sums, "d_x": torch.autograd.grad(loss, leaf)[0]}

    result = dict(zip(("loss", "sums", "d_x"), made, strict=True))
    assert_as_good(
        result, expected(values, old, returns), expected(*(x.double() for x in (values, old, returns))), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (7, 127), (3, 5000)])
def test_accumulate(shape, dtype, level):
    part, total = torch.randn(shape).to(dtype), torch.randn(shape[0], shape[1] + 1)
    expected = total.clone()
    expected[:, :-1] += part
    kernels.accumulate(total[:, :-1], part)
    assert torch.equal(total, expected)
    kernels.accumulate(total[:, :-1], part.t().contiguous().t())
    expected[:, :-1] += part
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 3)])
def test_accumulate_takes_any_number_of_dimensions(shape, dtype):
    part, total = torch.randn(shape).to(dtype), torch.randn(shape)
    expected = total + part
    ops.accumulate(total, part)
    assert torch.equal(total, expected)
    with pytest.raises(ValueError, match="part has shape"):
        ops.accumulate(total, torch.zeros(7, 7, dtype=dtype))


def chunk(a: dict[str, Any], rows: slice = slice(None)) -> list[Tensor]:
    made, token_stats = update_in_chunk(some_rows(a, rows))
    return [token_stats, made["d_logits"].t()]


def test_a_chunk_s_results_are_those_of_a_row_alone_for_any_number_of_threads(level):
    case = LinearCase("tiles", 6, 30_011, 16, reference="own", mask="some", loss=(("kl_coef", 0.2),))
    arguments = chunk_arguments(case, torch.bfloat16)
    assert_repeats(lambda: chunk(arguments))
    assert_rows_stand_alone(lambda rows: chunk(arguments, rows), 6)


def test_sums_over_tokens_repeat_for_any_number_of_threads():
    random = torch.randn(8, 30_000)
    assert_repeats(lambda: list(kernels.sum_tokens(random, 0.1, 0.2, ONE)))
    x, y, z = random[:3]
    assert_repeats(lambda: list(kernels.policy_loss(x, y, z, None, None, None, ONE, 0.2, 0.2, None, 0.0, 0.0)))
    assert_repeats(lambda: list(kernels.value_loss(x, y, z, None, ONE, 0.2)))


TARGETS = torch.tensor([0, 1, 2, 3])
ONE = torch.tensor(1.0)


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


def call_accumulate(**change: Any) -> None:
    kernels.accumulate(**({"total": torch.zeros(4, 5), "part": torch.zeros(4, 5)} | change))


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
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
        (call_accumulate, {"total": torch.zeros(4, 5).half()}, "total has dtype float16"),
        (call_accumulate, {"part": torch.zeros(4, 6)}, r"part has shape \(4, 6\), expected \(4, 5\)"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(call, change, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_nothing_is_written_when_an_argument_is_bad():
    logits = torch.ones(4, 50)
    with pytest.raises(ValueError, match="targets"):
        call_chunk(logits=logits, targets=TARGETS + 50)
    assert (logits == 1).all()
