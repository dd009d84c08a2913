"""The Triton kernels: on the GPU where there is one, else under Triton's interpreter (see conftest), on fewer rows.

The interpreter checks arithmetic, indices and masks. It has no threads: races, and the instructions that a GPU
rounds in its own way, are only tested where there is one.
"""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from cases import (
    CERTAIN_CASES,
    LINEAR_CASES,
    VOCABULARY_CASES,
    LinearCase,
    VocabularyCase,
    assert_as_good,
    certain,
    gradients,
    in_fp64,
)
from interpreted import replace_the_language_once_a_launch
from test_ops import DIFFERENTIABLE, names, policy_update, token_stats
from torch import Tensor

from fastppo import ops
from fastppo.errors import log_once
from fastppo.kernels.policy_loss import policy_loss
from fastppo.kernels.policy_loss_in_chunk import policy_loss_in_chunk
from fastppo.kernels.sample_tokens import sample_tokens
from fastppo.kernels.scale_gradient import BLOCK, PROGRAMS, scale_gradient
from fastppo.kernels.sum_tokens import sum_tokens
from fastppo.kernels.value_loss import value_loss
from fastppo.kernels.vocabulary_backward import vocabulary_backward
from fastppo.kernels.vocabulary_forward import vocabulary_forward
from fastppo.ops import eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts fp32 to bf16 instead of rounding it; a product of such numbers is off by more than one rounding.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
STATISTICS = [
    *("logprobs", "entropy", "lse", "peak", "log_total"),
    *("ref_logprobs", "kl", "ref_lse", "ref_peak", "ref_log_total"),
]
OPTIONS = {"softcap": None, "ref_logits": None}
if INTERPRETED:
    replace_the_language_once_a_launch()
# NaN and infinities are among what is tested, and NumPy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def triton_anywhere(request):
    """The ops run the Triton kernels on this machine's device; on a GPU they do so anyway."""
    if INTERPRETED:
        request.getfixturevalue("triton_on_cpu")


def few(case: Any) -> Any:
    """The case with as many rows as the interpreter has patience for."""
    rows = 2 if case.vocabulary > 1000 else 5
    return dataclasses.replace(case, rows=min(case.rows, rows)) if INTERPRETED else case


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def padded(rows: Tensor) -> Tensor:
    """The same rows in a buffer where each starts at a multiple of 16 bytes, as those of a chunk do."""
    width = 16 // rows.element_size()
    buffer = rows.new_full((len(rows), -(-rows.shape[1] // width) * width), math.nan)
    return buffer[:, : rows.shape[1]].copy_(rows)


# The vocabulary pass


def forward(arguments: dict[str, Any]) -> Tensor:
    a = OPTIONS | arguments
    return vocabulary_forward(a["logits"], a["targets"], a["temperature"], a["softcap"], a["ref_logits"])


def backward(arguments: dict[str, Any], stats: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    a = OPTIONS | arguments
    vocabulary_backward(a["logits"], a["targets"], stats, grad, a["temperature"], a["softcap"], a["ref_logits"], out)
    return out


def stacked(upstream: dict[str, Tensor]) -> Tensor:
    return torch.stack([upstream[name].float() for name in DIFFERENTIABLE]).to(DEVICE)


def reference_stats(arguments: dict[str, Any], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = arguments["logits"].detach().requires_grad_()
    stats = eager.token_logprobs(**(arguments | {"logits": leaf}))
    outputs = {name: x for name, x in stats._asdict().items() if x is not None}
    made = gradients(outputs, {name: g for name, g in upstream.items() if name in outputs}, {"logits": leaf})
    return {name: x.detach() for name, x in outputs.items()} | made


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", VOCABULARY_CASES, ids=str)
def test_vocabulary(case, dtype):
    case = few(case)
    arguments, upstream = on_device(case.build(dtype)), on_device(case.upstream(DIFFERENTIABLE))
    if case.vocabulary == 50257:
        arguments |= {name: padded(x) for name, x in arguments.items() if name.endswith("logits")}
    stats = forward(arguments)
    d_logits = backward(arguments, stats, stacked(upstream), torch.empty_like(arguments["logits"]))
    truth = reference_stats(in_fp64(arguments), upstream)
    named = dict(zip(STATISTICS, stats, strict=False)) | {"d_logits": d_logits}
    torch.testing.assert_close(stats[3] / case.temperature + stats[4], stats[2])
    assert_as_good({name: named[name] for name in truth}, reference_stats(arguments, upstream), truth, dtype)


@pytest.mark.parametrize("layout", ["in place", "columns apart", "stride-0 gradients", "rows apart", "odd address"])
def test_layouts(layout):
    arguments = on_device(VocabularyCase("layouts", 3, 600, reference=True).build(torch.bfloat16))
    upstream = stacked(VocabularyCase("layouts", 3, 600).upstream(DIFFERENTIABLE, stride0=True)).clone()
    stats = forward(arguments)
    expected = backward(arguments, stats, upstream, torch.empty_like(arguments["logits"]))
    logits, out = arguments["logits"], torch.empty_like(expected)
    if layout == "in place":
        out = arguments["logits"] = logits.clone()
    elif layout == "columns apart":
        arguments |= {name: x.t().contiguous().t() for name, x in arguments.items() if name.endswith("logits")}
        out = out.t().contiguous().t()
    elif layout == "stride-0 gradients":
        upstream = upstream[:, :1].expand(-1, 3)
    else:
        width, first = (777, 0) if layout == "rows apart" else (608, 3)
        arguments["logits"] = logits.new_zeros(3, width)[:, first : first + 600].copy_(logits)
        out = out.new_zeros(3, 1000)[:, 17:617]
    made = forward(arguments), backward(arguments, stats, upstream, out)
    if layout in ("rows apart", "odd address"):  # tiles of rows that are not aligned add up in another order
        torch.testing.assert_close(made, (stats, expected), rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(made[0], stats) and torch.equal(made[1], expected)


def test_results_repeat_and_do_not_depend_on_other_rows():
    arguments = on_device(VocabularyCase("repeats", 4, 5000, reference=True, softcap=10.0).build(torch.bfloat16))
    grad = stacked(VocabularyCase("repeats", 4, 5000).upstream(DIFFERENTIABLE))
    stats = forward(arguments)
    d_logits = backward(arguments, stats, grad, torch.empty_like(arguments["logits"]))
    for rows in (slice(0, 4), slice(2, 3)):
        part = arguments | {name: x[rows] for name, x in arguments.items() if isinstance(x, Tensor)}
        assert torch.equal(forward(part), stats[:, rows])
        again = backward(part, stats[:, rows], grad[:, rows], torch.empty_like(part["logits"]))
        assert torch.equal(again, d_logits[rows])


def test_an_infinite_kl_passes_no_gradient():
    arguments = on_device(VocabularyCase("infinite", 4, 127, reference=True).build(torch.float32))
    arguments["ref_logits"][1, 5] = arguments["ref_logits"][2, 0] = -math.inf
    arguments["logits"][2, 0] = -200.0  # e^-200 is 0 in fp32, at first the peak of its group: finite after all
    upstream = on_device(VocabularyCase("infinite", 4, 127).upstream(DIFFERENTIABLE))
    stats = forward(arguments)
    assert stats[6].isinf().tolist() == [False, True, False, False]
    d_logits = backward(arguments, stats, stacked(upstream), torch.empty_like(arguments["logits"]))
    upstream["kl"] = upstream["kl"].masked_fill(stats[6].isinf(), 0.0)
    arguments["ref_logits"][1, 5] = 0.0
    expected = reference_stats(arguments, upstream)["d_logits"]  # in fp64 p[2, 0] would be above 0
    torch.testing.assert_close(d_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CERTAIN_CASES if case.vocabulary < 1000], ids=str)
def test_a_token_that_is_certain_gets_no_gradient(case):
    arguments = on_device(certain(few(case)))
    stats = forward(arguments)
    d_logits = backward(
        arguments, stats, torch.ones(4, len(stats[0]), device=DEVICE), torch.empty_like(arguments["logits"])
    )
    d_lse = torch.zeros_like(d_logits).scatter_(1, arguments["targets"][:, None], 1 / case.temperature)
    slope = 1.0 if case.softcap is None else 1 - (arguments["logits"] / case.softcap).tanh().square()
    torch.testing.assert_close(d_logits, slope * d_lse, rtol=1e-4, atol=1e-8)
    assert (stats[:2].abs() < 1e-20).all()


def test_nan_is_not_hidden():
    arguments = on_device(VocabularyCase("nan", 3, 5000).build(torch.float32))
    arguments["logits"][1, 4321] = math.nan
    arguments["logits"][2, 17] = math.inf
    assert forward(arguments)[:3].isnan().any(0).tolist() == [False, True, True]


def test_the_lowest_number_serves_as_minus_infinity():
    # Models mask with it. It is also where a running peak starts.
    for dtype in DTYPES[:2]:
        arguments = on_device(VocabularyCase("lowest", 2, 3000).build(dtype))
        arguments["logits"][0, :2999] = torch.finfo(dtype).min
        arguments["logits"][1, :] = torch.finfo(dtype).min
        stats = forward(arguments)
        torch.testing.assert_close(stats[1].cpu(), torch.tensor([0.0, math.log(3000)]))


@pytest.mark.parametrize("aligned", [True, False])
def test_offsets_past_2_to_the_31(aligned):
    case = VocabularyCase("far apart", 2, 127, reference=True)
    arguments, grad = on_device(case.build(torch.bfloat16)), stacked(case.upstream(DIFFERENTIABLE))
    stride = 2**31 + (8 if aligned else 1)
    far = torch.empty_strided((2, 127), (stride, 1), dtype=torch.bfloat16, device=DEVICE)  # few pages are touched
    far.copy_(arguments["logits"])
    if aligned:
        arguments["logits"] = padded(arguments["logits"])
    rows = torch.arange(2, device=DEVICE)
    stats = forward(arguments)
    assert torch.equal(forward(arguments | {"logits": far}), stats)
    drawn = sample_tokens(arguments["logits"], rows, rows, 1.0, 0)
    assert torch.equal(torch.stack(sample_tokens(far, rows, rows, 1.0, 0)), torch.stack(drawn))
    d_logits = backward(arguments, stats, grad, torch.empty_like(arguments["logits"]))
    assert torch.equal(backward(arguments | {"logits": far}, stats, grad, far), d_logits)


def test_rows_that_are_not_aligned_are_logged_once(caplog):
    log_once.cache_clear()
    logits, targets = torch.zeros(2, 51, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with caplog.at_level(logging.WARNING, "fastppo"):
        for _ in range(2):
            vocabulary_forward(padded(logits), targets, 1.0, None, None)
        assert not caplog.records
        for _ in range(2):
            vocabulary_forward(logits, targets, 1.0, None, None)
    assert len(caplog.records) == 1 and "51 elements apart" in caplog.text


# Losses


def loss_in_chunk(arguments: dict[str, Any], gradient: bool = True) -> dict[str, Tensor]:
    """`policy_loss_in_chunk` on a copy of the logits, then `sum_tokens`."""
    defaults = {"dual_clip": None, "entropy_coef": 0.0, "kl_coef": 0.0, "kl_kind": "exact", "mask": None}
    a = OPTIONS | defaults | arguments
    d_logits = padded(a["logits"])
    token_stats = torch.full((8, len(d_logits) + 3), math.nan, device=DEVICE)[:, 1:-2]
    order = ("targets", "old_logprobs", "advantages", "normalizer", "temperature", "softcap", "clip_low", "clip_high")
    order += ("dual_clip", "entropy_coef", "kl_coef", "kl_kind", "ref_logprobs", "ref_logits", "mask")
    policy_loss_in_chunk(d_logits, *(a[name] for name in order), gradient, token_stats)
    loss, sums, ratio_max = sum_tokens(token_stats, a["entropy_coef"], a["kl_coef"], a["normalizer"])
    return {"d_logits": d_logits, "loss": loss, "sums": sums, "ratio_max": ratio_max}


def reference_loss(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What `eager.linear_policy_loss` does with the logits once it has them."""
    a = dict(arguments)
    logits, kind = a.pop("logits").detach().requires_grad_(), a.pop("kl_kind", "exact")
    inputs = {name: a.pop(name) for name in ("targets", "temperature", "softcap")}
    ref_logits, ref_logprobs = a.pop("ref_logits", None), a.pop("ref_logprobs")
    stats = eager.token_logprobs(logits, **inputs, ref_logits=ref_logits)
    kl = stats.kl if kind == "exact" else eager.kl_estimate(stats.logprobs, ref_logprobs, kind)
    loss, policy_stats = eager.policy_loss(stats.logprobs, entropy=stats.entropy, kl=kl, **a)
    made = gradients({"loss": loss}, {"loss": torch.ones((), device=DEVICE)}, {"logits": logits})
    return made | {"loss": loss.detach(), "sums": policy_stats.sums, "ratio_max": policy_stats.ratio_max}


def loss_arguments(case: LinearCase, dtype: torch.dtype) -> dict[str, Any]:
    """A case's arguments with the logits in place of what they are the product of."""
    made = case.build(dtype)
    logits = torch.nn.functional.linear(made["hidden"], made["weight"], made["bias"])
    scale = {"temperature": case.temperature, "softcap": case.softcap}
    logprobs = eager.token_logprobs(logits.double(), made["targets"], **scale).logprobs
    made = case.build_loss(dtype, logprobs)
    if "ref_hidden" in made:
        made["ref_logits"] = torch.nn.functional.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    head = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    return on_device({name: x for name, x in made.items() if name not in head} | {"logits": logits})


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_policy_loss_in_chunk(case, dtype):
    arguments = loss_arguments(few(case), dtype)
    tested, truth = loss_in_chunk(arguments), reference_loss(in_fp64(arguments))
    assert_as_good(tested, reference_loss(arguments), truth, dtype)


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_the_chunked_heads(case, dtype):
    """Through the public door, with all gradients."""
    case = few(case)
    inputs = ["hidden", "weight"] + ["bias"] * case.bias
    upstream = on_device(VocabularyCase("upstream", case.rows, 1).upstream(DIFFERENTIABLE))
    arguments = on_device(case.build(dtype))
    logprobs = eager.linear_logprobs(**in_fp64(arguments)).logprobs
    stats = [
        token_stats(op, given, inputs, upstream)
        for op, given in both_oracles(ops.linear_logprobs, eager.linear_logprobs, arguments)
    ]
    assert_as_good(*stats, dtype)
    update = on_device(case.build_loss(dtype, logprobs.cpu()))
    losses = [
        policy_update(op, given, inputs)
        for op, given in both_oracles(ops.linear_policy_loss, eager.linear_policy_loss, update)
    ]
    assert_as_good(*losses, dtype)


def both_oracles(op: Any, oracle: Any, arguments: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The op, its oracle in the same dtype, and the truth, with their arguments."""
    return [(op, arguments), (oracle, arguments), (oracle, in_fp64(arguments))]


def test_without_a_gradient_the_logits_stay():
    case = LinearCase("no gradient", 3, 127, 16, reference="own", loss=(("kl_coef", 0.2),))
    arguments = loss_arguments(case, torch.bfloat16)
    with_gradient, without = loss_in_chunk(arguments), loss_in_chunk(arguments, gradient=False)
    assert torch.equal(without.pop("d_logits"), arguments["logits"])
    assert all(torch.equal(x, with_gradient[name]) for name, x in without.items())


def test_dropped_rows_may_hold_anything():
    arguments = loss_arguments(LinearCase("dropped", 6, 127, 16, mask="some"), torch.float32)
    expected = loss_in_chunk(arguments)
    for name in ("logits", "old_logprobs", "advantages"):
        arguments[name][~arguments["mask"]] = math.nan
    assert all(torch.equal(x, expected[name]) for name, x in loss_in_chunk(arguments).items())
    assert not expected["d_logits"][~arguments["mask"]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_the_first_update_has_ratio_one_bit_for_bit(dtype):
    case = LinearCase("first update", 4, 700, 16, temperature=0.7, reference="own")
    arguments = loss_arguments(case, dtype)
    for ref_logits in (None, arguments["ref_logits"]):
        old = forward({**arguments, "logits": padded(arguments["logits"]), "ref_logits": ref_logits})[0]
        made = loss_in_chunk(arguments | {"old_logprobs": old})
        assert made["ratio_max"] == 1 and made["sums"][3] == 0 and made["sums"][6] == made["sums"][7] == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", ["plain", "masked", "dual clip", "nothing kept"])
@pytest.mark.parametrize("tokens", [0, 1, 1023, 3000])
def test_token_losses(tokens, options, dtype):
    random = torch.Generator().manual_seed(tokens)
    inputs = ("logprobs", "old_logprobs", "advantages", "entropy", "kl")
    drawn = [torch.randn(tokens, generator=random, dtype=torch.float64) for _ in inputs]
    arguments: dict[str, Any] = on_device({name: x.to(dtype) for name, x in zip(inputs, drawn, strict=True)})
    normalizer = torch.tensor(float(max(1, tokens)), device=DEVICE)
    mask = None
    if options != "plain":
        mask = (
            torch.arange(tokens, device=DEVICE) % 5 != 0 if options != "nothing kept" else normalizer.new_zeros(tokens)
        )
        mask = mask.bool()
    dual_clip, clip = (1.5, 0.2) if options == "dual clip" else (None, None)

    loss, sums, ratio_max, d = policy_loss(*arguments.values(), mask, normalizer, 0.2, 0.28, dual_clip, 0.1, 0.3)
    policy = {"loss": loss, "sums": sums, "ratio_max": ratio_max, "d_logprobs": d}
    loss, sums, d = value_loss(*list(arguments.values())[:3], mask, normalizer, clip)
    value = {"loss": loss, "sums": sums, "d_values": d}

    def expected(a: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaf = a["logprobs"].detach().float() if a["logprobs"].dtype != torch.float64 else a["logprobs"].detach()
        leaf.requires_grad_()
        common = {"normalizer": normalizer, "mask": mask}
        clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual_clip, "entropy_coef": 0.1, "kl_coef": 0.3}
        loss, stats = eager.policy_loss(**(a | {"logprobs": leaf}), **clips, **common)
        d = torch.autograd.grad(loss, leaf)[0]
        policy = {"loss": loss.detach(), "sums": stats.sums, "ratio_max": stats.ratio_max, "d_logprobs": d}
        loss, stats = eager.value_loss(leaf, a["old_logprobs"], a["advantages"], clip=clip, **common)
        return policy, {"loss": loss.detach(), "sums": stats.sums, "d_values": torch.autograd.grad(loss, leaf)[0]}

    truths, same_dtype = expected(in_fp64(arguments)), expected(arguments)
    for tested, same, truth in zip((policy, value), same_dtype, truths, strict=True):
        assert_as_good(tested, same, truth, torch.float32)


def test_a_term_with_coefficient_0_may_be_infinite():
    token_stats = torch.ones(8, 5, device=DEVICE)
    token_stats[1:3, 2] = math.inf
    loss, sums, _ = sum_tokens(token_stats, 0.0, 0.0, torch.tensor(2.0, device=DEVICE))
    assert loss == 2.5 and sums[1] == sums[2] == math.inf
    assert sum_tokens(token_stats, 0.0, 0.1, torch.tensor(2.0, device=DEVICE))[0] == math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("count", [0, 5, BLOCK, 3 * BLOCK + 7])
def test_a_gradient_is_scaled_where_it_lies_and_rounded_once(count, dtype):
    gradient = torch.randn(count, device=DEVICE).to(dtype)
    before = gradient.clone()
    for factor in (1.0, 1 / 3, math.nan):
        gradient.copy_(before)
        scale_gradient(gradient, torch.tensor(factor, device=DEVICE))
        expected = before.float() * torch.tensor(factor, device=DEVICE)
        torch.testing.assert_close(gradient, expected.to(dtype), equal_nan=True)
    scale_gradient(gradient, torch.ones((), device=DEVICE))
    assert gradient.isnan().all()


def test_a_program_scales_every_so_many_blocks(monkeypatch):
    monkeypatch.setattr("fastppo.kernels.scale_gradient.PROGRAMS", 2)
    gradient = torch.randn(7 * BLOCK + 1, device=DEVICE)
    expected = gradient * 3
    scale_gradient(gradient, torch.tensor(3.0, device=DEVICE))
    assert PROGRAMS > 2 and torch.equal(gradient, expected)


# Arguments


def test_wrong_arguments_are_refused():
    logits, targets = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match=r"logits has dtype torch.float64"):
        vocabulary_forward(logits.double(), targets, 1.0, None, None)
    with pytest.raises(ValueError, match=r"ref_logits has shape \(2, 7\)"):
        vocabulary_forward(logits, targets, 1.0, None, logits[:, :7])
    with pytest.raises(ValueError, match=r"targets has shape \(1,\); expected \(2,\)"):
        vocabulary_forward(logits, targets[:1], 1.0, None, None)
    with pytest.raises(ValueError, match=r"expected torch.float32, fp32"):
        backward({"logits": logits, "targets": targets, "temperature": 1.0}, logits[:, :5], logits[:, :4], logits)
    with pytest.raises(ValueError, match=r"gradient is torch.float32 with strides \(1, 8\)"):
        scale_gradient(logits.t(), torch.ones((), device=DEVICE))
    with pytest.raises(ValueError, match=r"factor is torch.float64 \(\)"):
        scale_gradient(logits, torch.ones((), device=DEVICE, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"token_stats is torch.float32"):
        sum_tokens(logits, 0.0, 0.0, torch.ones((), device=DEVICE))
