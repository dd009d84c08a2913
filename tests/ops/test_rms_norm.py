"""RMSNorm with the sum of a residual: as good as its oracle on the CPU at each SIMD level and in Triton, row by row."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import assert_as_good, gradients, in_fp64
from csrc_calls import assert_repeats, names
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastppo import ops
from fastppo.ops.layers import eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@dataclass(frozen=True)
class NormCase:
    name: str
    shape: tuple[int, ...]
    residual: bool = True
    offset: float = 0.0
    round_first: bool = True
    size: float = 1.0  # of the entries

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype) -> dict[str, Any]:
        random = torch.Generator().manual_seed(len(self.name))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(DEVICE)

        made: dict[str, Any] = {"x": self.size * normal(*self.shape), "weight": normal(self.shape[-1]), "eps": 1e-6}
        made |= {"offset": self.offset, "round_first": self.round_first}
        return made | ({"residual": self.size * normal(*self.shape)} if self.residual else {})


CASES = [
    NormCase("two numbers", (2,), residual=False),
    NormCase("no rows", (0, 64)),
    NormCase("a width below a register", (5, 7)),
    NormCase("a register and some", (5, 37), round_first=False, offset=1.0),
    NormCase("heads of Qwen3", (1, 3, 4, 128), residual=False),
    NormCase("SmolLM2", (2, 9, 576)),
    NormCase("Gemma", (9, 640), offset=1.0, round_first=False),
    NormCase("OLMo-2", (9, 1000), round_first=False, residual=False),
    NormCase("many rows", (150, 64)),
    NormCase("small numbers", (3, 96), size=1e-4),
]


def passes(op: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of all tensors."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if isinstance(x, Tensor)}
    made = op(**(arguments | leaves))
    outputs = dict(zip(("y", "total"), made if isinstance(made, tuple) else (made,), strict=False))
    upstream = {}
    for i, (name, x) in enumerate(outputs.items()):
        upstream[name] = torch.linspace(-1 - i, 1, max(1, x.numel()), device=DEVICE)[: x.numel()].reshape(x.shape)
    return {name: x.detach() for name, x in outputs.items()} | gradients(outputs, upstream, leaves)


def assert_good(case: NormCase, dtype: torch.dtype) -> None:
    arguments = case.build(dtype)
    tested, same, truth = (
        passes(op, given)
        for op, given in (
            (ops.rms_norm, arguments),
            (eager.rms_norm, arguments),
            (eager.rms_norm, in_fp64(arguments)),
        )
    )
    assert all(x.dtype == dtype for x in tested.values())
    # A quotient at the middle of two numbers of the dtype is rounded to the one or the other.
    ulp = (
        0.0
        if dtype == torch.float32
        else torch.finfo(dtype).eps * (truth["y"].abs().max().item() if len(truth["y"]) else 0)
    )
    tested["y"] = torch.where((tested["y"].double() - same["y"].double()).abs() <= ulp, same["y"], tested["y"])
    assert_as_good(tested, same, truth, dtype)
    if case.residual:
        assert torch.equal(tested["total"], arguments["x"] + arguments["residual"])
        assert torch.equal(tested["d_x"], tested["d_residual"])


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("level")
def test_rms_norm(case, dtype):
    assert_good(case, dtype)


# The interpreter cuts fp32 to bf16 instead of rounding it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=names)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("triton_on_cpu")
def test_rms_norm_by_triton(case, dtype):
    assert_good(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    "case", [*CASES, NormCase("a 1B Llama", (3000, 2048)), NormCase("wide", (40, 16_384))], ids=str
)
def test_rms_norm_on_the_gpu(case, dtype):
    assert_good(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    ("module", "options"), [(LlamaRMSNorm, {}), (Gemma2RMSNorm, {"offset": 1.0, "round_first": False})]
)
def test_it_is_what_the_models_compute(module, options, dtype):
    norm = module(576, eps=1e-6).to(dtype)
    x, residual = torch.randn(2, 64, 576).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        expected = norm(x + residual)
        y, total = ops.rms_norm(x, norm.weight, 1e-6, residual, **options)
    assert torch.equal(total, x + residual)
    # Sums in another order move a quotient over the middle of two numbers of the dtype now and then.
    torch.testing.assert_close(
        y, expected, rtol=1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps, atol=1e-5
    )
    assert (y == expected).float().mean() > (0.3 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_weight_may_have_another_dtype(backend, dtype, weight_dtype):
    case = NormCase("mixture", (9, 70), round_first=False)
    arguments = case.build(dtype)
    arguments["weight"] = arguments["weight"].to(weight_dtype)
    found, expected = passes(ops.rms_norm, arguments), passes(eager.rms_norm, arguments)
    assert found["y"].dtype == dtype and found["d_weight"].dtype == weight_dtype
    for name, x in expected.items():
        rounding = 4 * max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps) if "d_" in name else 1e-2
        torch.testing.assert_close(found[name], x, rtol=1e-2, atol=rounding * x.abs().max().item())


# Rows


def forward_and_gradient(x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
    y, total = ops.rms_norm(x, weight, 1e-6, residual)
    d_x, _ = torch.ops.fastppo.rms_norm_backward(y, x, total, weight, 1e-6, 0.0, True)
    return [y, total, d_x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("width", [64, 100, 576])
def test_a_row_does_not_depend_on_others_or_on_how_many_there_are(backend, width, dtype):
    x, residual = torch.randn(2, 70, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    together = forward_and_gradient(x, residual, weight)
    for rows in (slice(69, 70), slice(3, 20), torch.arange(70).flip(0)):
        alone = forward_and_gradient(x[rows], residual[rows], weight)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
    deep = forward_and_gradient(*(x.view(7, 2, 5, width) for x in (x, residual)), weight)
    assert all(torch.equal(a.view(70, width), b) for a, b in zip(deep, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_results_repeat_for_any_number_of_threads(dtype):
    x, residual, d_y = torch.randn(3, 300, 200).to(dtype)
    weight = torch.randn(200).to(dtype)

    def run() -> list[Tensor]:
        y, total = ops.rms_norm(x, weight, 1e-6, residual)
        return [y, total, *torch.ops.fastppo.rms_norm_backward(d_y, None, total, weight, 1e-6, 0.0, True)]

    assert_repeats(run)


def views_of_heads() -> dict[str, Tensor]:
    joined = torch.randn(6, 8 * 64)
    return {
        "of a joined projection": joined[:, : 4 * 64].view(1, 6, 4, 64),
        "of a joined projection, the last": joined[:, 4 * 64 :].view(1, 6, 4, 64),
        "transposed": joined.view(1, 6, 8, 64).transpose(1, 2),
        "expanded rows": torch.randn(1, 1, 64).expand(6, 4, 64),
        "every second row": joined.view(48, 64)[::2],
        "one head": joined.view(6, 8, 64)[:, 3:4],
    }


@pytest.mark.parametrize("view", views_of_heads())
def test_rows_apart_are_read_in_place(backend, view, caplog):
    x = views_of_heads()[view]
    weight = torch.randn(64)
    with caplog.at_level("WARNING", "fastppo"):
        y = ops.rms_norm(x, weight, 1e-6)
    assert not caplog.records  # Triton's launcher logs a copy
    assert y.is_contiguous()
    assert torch.equal(y, ops.rms_norm(x.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.usefixtures("level")
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(dtype, bad):
    x, residual = torch.randn(2, 3, 37).to(dtype)
    weight = torch.randn(37).to(dtype)
    x[1, 5] = bad
    y, total = ops.rms_norm(x, weight, 1e-6, residual)
    expected, _ = eager.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(total.isnan(), (x + residual).isnan()) and torch.equal(total.isinf(), (x + residual).isinf())
    assert torch.equal(y.isnan(), expected.isnan()) and y[[0, 2]].isfinite().all()
    weight[4] = math.nan
    y = ops.rms_norm(residual, weight, 1e-6)
    assert y[:, 4].isnan().all() and y.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.usefixtures("level")
def test_zeros_without_eps_are_nan_as_in_the_oracle(dtype):
    x = torch.zeros(2, 40, dtype=dtype)
    assert ops.rms_norm(x, torch.ones(40, dtype=dtype), 0.0).isnan().all()
    assert (ops.rms_norm(x, torch.ones(40, dtype=dtype), 1e-6) == 0).all()


# Gradients


def leaves_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, 20, 48).to(dtype)
    return x.requires_grad_(), residual.requires_grad_(), torch.randn(48).to(dtype).requires_grad_()


def test_x_and_residual_share_one_gradient(backend):
    x, residual, weight = leaves_of()
    y, total = ops.rms_norm(x, weight, 1e-6, residual)
    d_x, d_residual = torch.autograd.grad([y, total], [x, residual], [y.detach(), x.detach()])
    assert d_x.data_ptr() == d_residual.data_ptr()


def test_a_frozen_weight_costs_no_gradient(backend):
    x, residual, weight = leaves_of()
    y, total = ops.rms_norm(x, weight.detach(), 1e-6, residual)
    (y.sum() + total.sum()).backward()
    assert x.grad is not None
    d_x, d_weight = torch.ops.fastppo.rms_norm_backward(
        torch.ones_like(y), torch.ones_like(y), total.detach(), weight.detach(), 1e-6, 0.0, False
    )
    assert d_weight.shape == (0,) and torch.equal(d_x, x.grad)


def test_an_output_without_a_use_has_no_part_in_the_gradient(backend):
    x, residual, weight = leaves_of()
    for used in (0, 1):
        found, expected = (
            torch.autograd.grad(
                op(x, weight, 1e-6, residual)[used].square().sum(), [x, residual, weight], materialize_grads=True
            )
            for op in (ops.rms_norm, eager.rms_norm)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_trained_weight_of_frozen_rows_gets_its_gradient(backend):
    x, residual, weight = leaves_of()
    found, expected = (
        torch.autograd.grad(op(x.detach(), weight, 1e-6, residual.detach())[0].square().sum(), weight)
        for op in (ops.rms_norm, eager.rms_norm)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_column_is_its_sign_and_has_no_slope(backend):
    x = torch.tensor([[3.0], [-0.5]]).requires_grad_()
    y = ops.rms_norm(x, torch.full((1,), 2.0), 1e-12)
    torch.testing.assert_close(y.detach(), torch.tensor([[2.0], [-2.0]]))
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert d_x.abs().max() < 1e-5


def test_no_gradient_is_recorded_where_none_is_wanted(backend):
    x, residual, weight = leaves_of()
    with torch.no_grad():
        assert not ops.rms_norm(x, weight, 1e-6, residual)[0].requires_grad
    with torch.inference_mode():
        assert ops.rms_norm(x, weight, 1e-6).is_inference()
    assert not ops.rms_norm(x.detach(), weight.detach(), 1e-6).requires_grad


def test_a_compiled_norm_trains_its_weight():
    """Through the registered rule of gradients, which eager calls do not take."""
    torch._dynamo.reset()
    x, residual, weight = leaves_of()
    run = torch.compile(lambda *given: ops.rms_norm(*given), fullgraph=True, backend="aot_eager")
    for frozen in (False, True):
        inputs = [x, residual] if frozen else [x, residual, weight]
        found, expected = (
            torch.autograd.grad(
                sum(part.sum() for part in op(x, weight.detach() if frozen else weight, 1e-6, residual)), inputs
            )
            for op in (run, ops.rms_norm)
        )
        torch.testing.assert_close(found, expected)
