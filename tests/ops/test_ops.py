"""The ops behind their door: as good as the reference on the shared cases."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import op_calls
import pytest
import torch
from cases import LINEAR_CASES, VOCABULARY_CASES, LinearCase, VocabularyCase, assert_as_good, gradients, in_fp64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo import ops
from fastppo.errors import log_once
from fastppo.ops import eager, philox
from fastppo.ops.backend import log_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Op = Callable[..., Any]


@pytest.fixture(params=[None, 1], ids=["one chunk", "a chunk a row"])
def workspace(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(ops, "WORKSPACE_BYTES", request.param)
    return request.param


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Against the reference


def token_stats(op: Op, arguments: dict[str, Any], inputs: list[str], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """All outputs, and the gradients of the inputs."""
    arguments = dict(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in inputs}
    stats = op(**(arguments | leaves))
    outputs = {name: x for name, x in stats._asdict().items() if x is not None}
    upstream = {name: g for name, g in upstream.items() if name in outputs}
    return {name: x.detach() for name, x in outputs.items()} | gradients(outputs, upstream, leaves)


DIFFERENTIABLE = ["logprobs", "entropy", "lse", "kl"]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", VOCABULARY_CASES, ids=str)
def test_token_logprobs(case, dtype):
    arguments, upstream = case.build(dtype), case.upstream(DIFFERENTIABLE)
    tested = token_stats(ops.token_logprobs, arguments, ["logits"], upstream)
    same_dtype = token_stats(eager.token_logprobs, arguments, ["logits"], upstream)
    truth = token_stats(eager.token_logprobs, in_fp64(arguments), ["logits"], upstream)
    assert_as_good(tested, same_dtype, truth, dtype)
    assert tested["d_logits"].dtype == dtype
    assert tested["logprobs"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("wanted", [[name] for name in DIFFERENTIABLE] + [["entropy", "kl"]], ids="+".join)
def test_gradients_of_outputs_that_are_not_used_are_zero(wanted):
    case = VocabularyCase("upstream", 7, 127, reference=True, temperature=0.6, softcap=20.0)
    arguments = case.build(torch.float64)
    for stride0 in (False, True):
        upstream = case.upstream(wanted, stride0)
        tested = token_stats(ops.token_logprobs, arguments, ["logits"], upstream)
        truth = token_stats(eager.token_logprobs, arguments, ["logits"], upstream)
        torch.testing.assert_close(tested, truth)


def test_non_contiguous_logits_and_an_infinite_kl():
    logits, ref_logits = torch.randn(2, 127, 7, dtype=torch.float64).mT
    ref_logits[2, 5] = -torch.inf
    arguments = {"logits": logits, "ref_logits": ref_logits, "targets": torch.arange(7)}
    upstream = VocabularyCase("upstream", 7, 127).upstream(DIFFERENTIABLE)
    tested = token_stats(ops.token_logprobs, arguments, ["logits"], upstream)
    truth = token_stats(eager.token_logprobs, arguments, ["logits"], upstream)
    assert truth["kl"][2] == math.inf and truth["d_logits"].isfinite().all()
    torch.testing.assert_close(tested, truth)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_rows_that_hold_nothing_or_a_nan_mean_the_same_to_kernel_and_oracle(backend, vocabulary):
    logits, ref_logits = torch.randn(2, 8, vocabulary, generator=torch.Generator().manual_seed(0))
    inf, nan = math.inf, math.nan
    ref_logits[0] = -inf  # excludes every token: q = 0, KL +inf
    ref_logits[1, -1] = nan
    ref_logits[2, 3], ref_logits[2, -1] = -inf, nan
    ref_logits[3, 3] = inf
    logits[4] = -inf
    logits[5] = ref_logits[5] = -inf
    logits[6, 3:], ref_logits[6, :3] = -inf, -inf
    arguments = {"logits": logits, "ref_logits": ref_logits, "targets": torch.zeros(8, dtype=torch.int64)}
    upstream = VocabularyCase("upstream", 8, 1).upstream(DIFFERENTIABLE)
    tested = token_stats(ops.token_logprobs, arguments, ["logits"], upstream)
    truth = token_stats(eager.token_logprobs, in_fp64(arguments), ["logits"], upstream)
    assert truth["kl"][0] == inf and truth["ref_logprobs"][0] == truth["ref_lse"][0] == -inf
    assert truth["kl"].isnan().tolist() == [False, True, True, True, True, True, False, False]
    assert truth["d_logits"][[0, 6, 7]].isfinite().all()
    tested["ref_lse"][3] = truth["ref_lse"][3] = 0.0  # of a row with +inf: inf or a NaN
    for name, exact in truth.items():
        torch.testing.assert_close(tested[name].double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    # The same in the pass that makes the loss, whose head has such rows from a bias.
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "temperature": 1.0, "kl_coef": 0.5}
    options["normalizer"] = torch.tensor(1.0)
    head: dict[str, Any] = {
        "hidden": torch.ones(2, 1),
        "weight": logits[7:].t().clone(),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    head |= {"ref_hidden": torch.ones(2, 1), "ref_weight": ref_logits[7:].t().clone()}
    head["ref_bias"] = torch.full((vocabulary,), -inf)
    tokens = {"old_logprobs": torch.zeros(2), "advantages": torch.ones(2)}
    loss, stats = ops.linear_policy_loss(**head, **tokens, **options)
    assert loss == stats.sums[2] == inf and stats.sums[1].isfinite()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("softcap", [None, 1e-20, 1e20])
@pytest.mark.parametrize("temperature", [1e-20, 1e20])
def test_the_hottest_and_coldest_that_is_taken_is_right(backend, temperature, softcap):
    case = VocabularyCase("extremes", 4, 130, values="holes", temperature=temperature, softcap=softcap, reference=True)
    arguments, upstream = case.build(torch.float32), case.upstream(["logprobs"])
    tested = token_stats(ops.token_logprobs, arguments, ["logits"], upstream)
    truth = token_stats(eager.token_logprobs, in_fp64(arguments), ["logits"], upstream)
    for name in ("logprobs", "entropy", "lse", "d_logits"):
        size = truth[name].abs().max().item()
        torch.testing.assert_close(
            tested[name].double(), truth[name], rtol=1e-4, atol=1e-5 * min(size, 1 / temperature)
        )


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    temperature=st.floats(0.3, 2),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_holds_for_any_distribution(backend, rows, vocabulary, spread, temperature, seed, dtype):
    random = torch.Generator().manual_seed(seed)
    logits, ref_logits = (spread * torch.randn(2, rows, vocabulary, generator=random)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=random)
    stats = ops.token_logprobs(logits, targets, temperature=temperature, ref_logits=ref_logits)
    rounding = 1e-5 * math.log(vocabulary + 1) + 1e-6
    assert (stats.logprobs <= 0).all()
    assert (stats.entropy >= -rounding).all() and (stats.entropy <= math.log(vocabulary) + rounding).all()
    assert stats.kl is not None and (stats.kl >= -1e-6 * (1 + spread / temperature)).all()
    same = ops.token_logprobs(logits, targets, temperature=temperature, ref_logits=logits)
    assert same.kl is not None and (same.kl.abs() < 1e-9).all() and torch.equal(same.ref_logprobs, same.logprobs)
    # Powers of two shift a row of small numbers without a rounding.
    whole = (logits.float() / max(1.0, spread)).round()
    shifted = ops.token_logprobs(whole + 64.0, targets, temperature=temperature)
    still = ops.token_logprobs(whole, targets, temperature=temperature)
    torch.testing.assert_close(shifted[:2], still[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shifted.lse, still.lse + 64.0 / temperature, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_logprobs(case, dtype):
    arguments = case.build(dtype)
    upstream = VocabularyCase("upstream", case.rows, 1).upstream(DIFFERENTIABLE)
    inputs = ["hidden", "weight"] + ["bias"] * case.bias
    tested = token_stats(ops.linear_logprobs, arguments, inputs, upstream)
    same_dtype = token_stats(eager.linear_logprobs, arguments, inputs, upstream)
    truth = token_stats(eager.linear_logprobs, in_fp64(arguments), inputs, upstream)
    assert_as_good(tested, same_dtype, truth, dtype)


def policy_update(op: Op, arguments: dict[str, Any], inputs: list[str]) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in inputs}
    loss, stats = op(**(arguments | leaves))
    assert not stats.sums.requires_grad and not stats.ratio_max.requires_grad
    # An upstream gradient other than 1, as loss scaling makes.
    made = gradients({"loss": loss}, {"loss": torch.tensor(3.0)}, leaves)
    return made | {"loss": loss.detach(), "sums": stats.sums, "ratio_max": stats.ratio_max}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_policy_loss(case, dtype):
    logprobs = eager.linear_logprobs(**in_fp64(case.build(dtype))).logprobs
    arguments = case.build_loss(dtype, logprobs)
    inputs = ["hidden", "weight"] + ["bias"] * case.bias
    tested = policy_update(ops.linear_policy_loss, arguments, inputs)
    same_dtype = policy_update(eager.linear_policy_loss, arguments, inputs)
    truth = policy_update(eager.linear_policy_loss, in_fp64(arguments), inputs)
    assert_as_good(tested, same_dtype, truth, dtype)


FAR = torch.tensor([-18.0, -3.0, 0.0, 3.0, 21.0, 29.0, 60.0], dtype=torch.float64)  # log p - log q


def far_apart(dtype: torch.dtype) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A head's arguments, its hidden states in fp64, and what the logprobs of these are."""
    made = LinearCase("far", len(FAR), 127, 16).build(dtype)
    hidden = made["hidden"].double().requires_grad_()
    return made, hidden, eager.linear_logprobs(**in_fp64(made) | {"hidden": hidden}).logprobs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=names)
def test_k3_in_the_loss_is_right_however_far_the_reference_is(backend, dtype):
    """At log p - log q = 29 it is 28 with slope 1. The truth, written out, overflows nowhere here."""
    made, hidden, logprobs = far_apart(dtype)
    q = (logprobs.detach() - FAR).to(dtype)
    d = logprobs - q.double()
    truth = (-d).exp() - 1 + d
    (expected,) = torch.autograd.grad(truth.sum(), hidden)
    options = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": torch.tensor(1.0), "kl_coef": 1.0, "kl_kind": "k3"}
    options |= {"ref_logprobs": q, "advantages": torch.zeros_like(q)}
    leaf = made["hidden"].clone().requires_grad_()
    loss, stats = ops.linear_policy_loss(**made | {"hidden": leaf}, old_logprobs=q, **options)
    rounding = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(stats.sums[2].double(), truth.sum().detach(), rtol=rounding, atol=0)
    (found,) = torch.autograd.grad(loss, leaf)
    for row in range(len(FAR)):  # one by one, so that none hides behind a larger one
        size = float(expected[row].abs().max()) + 1e-2
        torch.testing.assert_close(found[row].double(), expected[row], rtol=0, atol=rounding * size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=names)
def test_a_ratio_is_right_however_small_and_so_is_the_approximate_kl(backend, dtype):
    """In one pass over the vocabulary, and from logprobs. Bad tokens that became likelier are pushed back."""
    made, hidden, logprobs = far_apart(dtype)
    old = (logprobs.detach() + FAR).to(dtype)
    d = logprobs - old.double()
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": torch.tensor(1.0)}
    options |= {"advantages": -torch.ones_like(old), "old_logprobs": old}
    truth = torch.maximum(d.exp(), torch.full_like(d, 0.8)).sum()  # -min(rho A, clip(rho) A) with A = -1
    (expected,) = torch.autograd.grad(truth, hidden)
    d = d.detach()
    leaf = made["hidden"].clone().requires_grad_()
    loss, stats = ops.linear_policy_loss(**made | {"hidden": leaf}, **options)
    (found,) = torch.autograd.grad(loss, leaf)
    of_tokens, token_stats = ops.policy_loss(logprobs.detach().to(dtype), **options)
    rounding = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding * float(expected.abs().max()))
    for made_loss, sums in ((loss, stats.sums), (of_tokens, token_stats.sums)):
        assert made_loss.item() == pytest.approx(truth.item(), rel=rounding)
        assert float(sums[3]) == pytest.approx(float((d.exp() - 1 - d).sum()), rel=rounding)
        assert float(sums[6]) == pytest.approx(float(d.exp().sum()), rel=rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=names)
def test_a_ratio_and_a_k3_that_would_overflow_are_finite_and_keep_the_sign_of_their_slope(backend, dtype):
    logprobs = torch.zeros(2, dtype=dtype).requires_grad_()
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": torch.tensor(1.0)}
    loss, stats = ops.policy_loss(logprobs, logprobs.detach() - 1000, -torch.ones_like(logprobs), **options)
    (slope,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite() and stats.sums.isfinite().all()
    torch.testing.assert_close(slope, torch.full_like(slope, math.exp(20)))
    head = {
        "hidden": torch.ones(1, 1, dtype=dtype).requires_grad_(),
        "weight": torch.tensor([[2.0], [1.0]], dtype=dtype),
    }
    kl = {"kl_coef": 1.0, "kl_kind": "k3", "ref_logprobs": torch.full((1,), 1000.0, dtype=dtype), "temperature": 1.0}
    tokens = {"old_logprobs": torch.zeros(1, dtype=dtype), "advantages": torch.zeros(1, dtype=dtype)}
    loss, _ = ops.linear_policy_loss(**head, targets=torch.tensor([0]), **tokens, **options, **kl)
    (slope,) = torch.autograd.grad(loss, head["hidden"])
    p = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(0)[1]  # d logprob / d hidden, as 1 - (2 p_0 + p_1) + 1
    assert loss.isfinite() and slope.item() == pytest.approx(float((1 - math.exp(20)) * p), rel=1e-4)


def test_the_first_update_has_ratio_one_bit_for_bit(workspace):
    case = LinearCase("first update", 63, 127, 16, temperature=0.7, reference="own")
    arguments = case.build(torch.bfloat16)
    with torch.no_grad():
        old = ops.linear_logprobs(**arguments).logprobs
    arguments = case.build_loss(torch.bfloat16, old) | {"old_logprobs": old}
    arguments["hidden"].requires_grad_()
    _, stats = ops.linear_policy_loss(**arguments)
    assert stats.ratio_max == 1 and stats.sums[3] == 0 and stats.sums[6] == stats.sums[7] == 63


@pytest.mark.usefixtures("workspace", "backend")
@pytest.mark.parametrize("tokens", [1e5, 1e6, 1e7])
def test_in_fp16_a_scaled_loss_has_its_gradients_however_many_tokens_it_is_a_mean_of(tokens):
    """The gradient of a mean over 1e6 tokens is below what fp16 can hold, until the loss is scaled."""
    case = LinearCase("loss scale", 12, 700, 16, bias=True, loss=(("normalizer", torch.tensor(tokens)),))
    logprobs = eager.linear_logprobs(**in_fp64(case.build(torch.float16))).logprobs
    arguments = case.build_loss(torch.float16, logprobs)
    inputs = ["hidden", "weight", "bias"]

    def scaled(op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
        leaves = {name: arguments[name].detach().requires_grad_() for name in inputs}
        loss, _ = op(**(arguments | leaves))
        return gradients({"loss": loss}, {"loss": torch.tensor(0.5 * tokens)}, leaves)  # as a loss scale does

    tested, truth = scaled(ops.linear_policy_loss, arguments), scaled(eager.linear_policy_loss, in_fp64(arguments))
    for name, exact in truth.items():
        assert tested[name].dtype == torch.float16
        error, size = (tested[name].double() - exact).abs().max(), exact.abs().max()
        assert error <= 3e-3 * size, f"{name}: off by {error / size:.2g}"


def test_in_fp16_a_gradient_that_sums_up_beyond_its_largest_number_is_right_once_divided():
    tokens = 100_000
    hidden, weight = torch.ones(tokens, 1).half(), torch.zeros(2, 1).half().requires_grad_()
    options: dict[str, Any] = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2, "normalizer": tokens}
    old, advantages = torch.full((tokens,), -math.log(2)), torch.full((tokens,), 2.0)
    loss, _ = ops.linear_policy_loss(hidden, weight, torch.zeros(tokens).long(), old, advantages, **options)
    loss.backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-1.0, 1.0]


def test_the_reference_may_have_a_dtype_and_a_width_of_its_own():
    arguments = LinearCase("reference of its own", 7, 127, 16).build(torch.bfloat16)
    ref = LinearCase("wide reference", 7, 127, 24).build(torch.float32)
    arguments |= {"ref_hidden": ref["hidden"], "ref_weight": ref["weight"]}
    tested, expected = ops.linear_logprobs(**arguments), eager.linear_logprobs(**arguments)
    torch.testing.assert_close(tested.ref_logprobs, expected.ref_logprobs)
    torch.testing.assert_close(tested.kl, expected.kl)


def test_the_sum_over_parts_of_a_batch_is_the_whole():
    case = LinearCase("parts", 63, 127, 16, mask="some", loss=(("entropy_coef", 0.1),))
    arguments = case.build_loss(torch.float64, eager.linear_logprobs(**case.build(torch.float64)).logprobs)
    whole = policy_update(ops.linear_policy_loss, arguments, ["weight"])
    parts = []
    for rows in (slice(0, 20), slice(20, 63)):
        per_token = {n: x[rows] for n, x in arguments.items() if isinstance(x, Tensor) and x.shape[:1] == (63,)}
        parts.append(policy_update(ops.linear_policy_loss, arguments | per_token, ["weight"]))
    for name in ("loss", "sums", "d_weight"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_gradients_flow_only_where_they_are_wanted():
    case = LinearCase("wanted", 7, 127, 16, reference="shared", loss=(("kl_coef", 0.2),))
    arguments = case.build_loss(torch.float32, torch.zeros(7) - 5)
    for frozen, trained in (("weight", "hidden"), ("hidden", "weight")):
        leaves = {trained: arguments[trained].clone().requires_grad_(), frozen: arguments[frozen].clone()}
        ref_hidden = arguments["ref_hidden"].clone().requires_grad_()
        loss, _ = ops.linear_policy_loss(**(arguments | leaves | {"ref_hidden": ref_hidden}))
        loss.backward()
        assert leaves[trained].grad is not None and leaves[trained].grad.any()
        assert leaves[frozen].grad is None and ref_hidden.grad is None
    with torch.no_grad():
        loss, _ = ops.linear_policy_loss(**(arguments | {"hidden": arguments["hidden"].clone().requires_grad_()}))
    assert not loss.requires_grad


def test_backward_can_run_twice_over_a_kept_graph():
    case = LinearCase("twice", 7, 127, 16)
    arguments = case.build_loss(torch.float32, torch.zeros(7) - 5)
    hidden = arguments["hidden"].requires_grad_()
    loss, _ = ops.linear_policy_loss(**arguments)
    (first,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(first, 2 * second)


@pytest.mark.parametrize("op", op_calls.TRAINED)
def test_a_sum_over_no_tokens_has_gradients_of_zero(op):
    """The gradient that arrives is one number, expanded: no memory layout that a kernel writes."""
    call = op_calls.make(op, tokens=0)
    given = call.all() | ({"normalizer": 1.0} if "normalizer" in call.arguments else {})
    outputs = getattr(ops, op)(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(outputs[i].sum() for i in op_calls.DIFFERENTIABLE[op]).backward()
    assert all(given[name].grad is None or not given[name].grad.any() for name in call.leaves())


@pytest.mark.slow
def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made():
    """The logits would take 40 MB, the workspace is 2; measured in a process of its own."""
    script = """
import resource, torch
from fastppo import ops

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def update(tokens, vocabulary):
    hidden, weight = (torch.randn(n, 8, dtype=torch.bfloat16).requires_grad_() for n in (tokens, vocabulary))
    targets, one = torch.zeros(tokens, dtype=torch.int64), torch.tensor(1.0)
    options = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2, "normalizer": one}
    loss, _ = ops.linear_policy_loss(hidden, weight, targets, torch.zeros(tokens), torch.ones(tokens), **options)
    loss.backward()
    (-ops.linear_logprobs(hidden, weight, targets).logprobs.sum()).backward()

ops.WORKSPACE_BYTES = 2 << 20
update(10, 20_000)
before = peak()
update(1_000, 20_000)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 15


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("scale", [0.0625, 3.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_logit_scale_is_as_if_the_logits_were_multiplied(softcap, scale, dtype):
    loss = (("kl_coef", 0.2), ("entropy_coef", 0.1))
    case = LinearCase("scaled", 20, 127, 16, 0.7, softcap, bias=True, reference="own", loss=loss)
    arguments = case.build(dtype) | {"logit_scale": scale}
    wide = in_fp64(arguments)
    logits, ref_logits = (
        scale * torch.nn.functional.linear(*(wide[f"{prefix}{name}"] for name in ("hidden", "weight", "bias")))
        for prefix in ("", "ref_")
    )
    written_out = eager.token_logprobs(logits, wide["targets"], temperature=0.7, softcap=softcap, ref_logits=ref_logits)
    truth = eager.linear_logprobs(**wide)
    torch.testing.assert_close(tuple(truth), tuple(written_out))
    inputs, upstream = ["hidden", "weight", "bias"], VocabularyCase("upstream", case.rows, 1).upstream(DIFFERENTIABLE)
    tested = token_stats(ops.linear_logprobs, arguments, inputs, upstream)
    same_dtype = token_stats(eager.linear_logprobs, arguments, inputs, upstream)
    assert_as_good(tested, same_dtype, token_stats(eager.linear_logprobs, wide, inputs, upstream), dtype)
    update = case.build_loss(dtype, truth.logprobs) | {"logit_scale": scale}
    losses = [
        policy_update(op, given, inputs)
        for op, given in (
            (ops.linear_policy_loss, update),
            (eager.linear_policy_loss, update),
            (eager.linear_policy_loss, in_fp64(update)),
        )
    ]
    assert_as_good(*losses, dtype)


# Sampling


def draw(logits: Tensor, seed: int = 0, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(logits))
    return ops.sample_tokens(logits, temperature=temperature, seed=seed, stream=rows, offset=3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    draws, vocabulary = 200_000, 300
    logits = torch.linspace(-3, 3, vocabulary)[torch.randperm(vocabulary)].index_fill(
        0, torch.tensor([0, 150]), -math.inf
    )
    tokens, _ = draw(logits.expand(draws, -1), temperature=temperature)
    expected = (logits / temperature).softmax(-1) * draws
    counts = tokens.bincount(minlength=vocabulary)
    possible = expected > 0
    chi2 = float(((counts - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    assert not counts[~possible].any()


@settings(max_examples=30)
@given(st.integers(1, 600), st.integers(0, 999), st.sampled_from(DTYPES), st.floats(0.3, 2))
def test_the_token_is_the_oracle_s_away_from_rounding(vocabulary, seed, dtype, temperature):
    logits = (3 * torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)
    tokens, logprobs = draw(logits, seed, temperature)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    p = (logits.double() / temperature).softmax(-1)
    cumulative = p.cumsum(-1)
    u = philox.uniform(seed, torch.arange(16), torch.full((16,), 3))
    prefix_states = cumulative.gather(1, tokens[:, None])[:, 0] - p.gather(1, tokens[:, None])[:, 0]
    assert (prefix_states <= u + 1e-6).all() and (u <= cumulative.gather(1, tokens[:, None])[:, 0] + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), p.log().gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("vocabulary", [127, 50257])
def test_a_row_s_draw_does_not_depend_on_its_neighbours(vocabulary, dtype):
    torch.manual_seed(0)
    rows = 17
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    stream, offset = torch.arange(rows) + 2**40, torch.arange(rows) * 5
    tokens, logprobs = ops.sample_tokens(logits, temperature=0.9, seed=-1, stream=stream, offset=offset)
    for chosen in (torch.arange(rows).flip(0), torch.tensor([4]), torch.tensor([9, 2, 16])):
        again = ops.sample_tokens(
            logits[chosen], temperature=0.9, seed=-1, stream=stream[chosen], offset=offset[chosen]
        )
        assert torch.equal(again[0], tokens[chosen]) and torch.equal(again[1], logprobs[chosen])


def test_sampling_from_no_rows():
    tokens, logprobs = draw(torch.empty(0, 5))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_cannot_be_drawn_from_is_an_error(bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="row 1 of logits"):
        draw(logits)
    with pytest.raises(ValueError, match="row 0 of logits"):
        draw(torch.full((1, 5), -math.inf))


def test_the_log_says_once_what_the_ops_run_on(caplog):
    log_once.cache_clear()
    log_backend.cache_clear()
    with caplog.at_level("INFO", logger="fastppo"):
        for dtype in (torch.float32, torch.float64, torch.float32):
            ops.token_logprobs(torch.zeros(1, 2, dtype=dtype), torch.tensor([0]))
    kernel, oracle = caplog.messages
    assert kernel.startswith("ops on cpu in float32: C++") and "no kernel supports fp64" in oracle
