"""SwiGLU and GeGLU, apart and joined, against fp64 truth: C++ at each level, and Triton."""

from collections.abc import Callable

import pytest
import torch
from csrc_calls import DTYPES, assert_repeats, names
from torch import Tensor

from fastppo import ops
from fastppo.ops.layers import eager

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

Pass = Callable[[Tensor, Tensor], Tensor]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# A whole block and more, none, one, a part of a register, and a row longer than a block of 4,096 numbers.
SHAPES = [(3, 5, 96), (2, 33), (4, 1), (7,), (0, 8), (3, 0), (2, 5000)]
# Of one number; in fp32, of all steps together.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def op_of(activation: str, module=ops) -> Pass:
    if activation == "silu":
        return module.swiglu
    return lambda gate, up: module.geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def joined_op_of(activation: str) -> Callable[[Tensor], Tensor]:
    if activation == "silu":
        return ops.swiglu_joined
    return lambda x: ops.geglu_joined(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and an incoming gradient"""
    return rows(shape, dtype), rows(shape, dtype, 1), rows(shape, dtype, 2)


def both_passes(op: Pass, gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = op(gate, up)
    return [y.detach(), *torch.autograd.grad(y, [gate, up], grad)]


def assert_right(activation: str, given: tuple[Tensor, ...], dtype: torch.dtype, roundings: float = 1.02) -> None:
    """Rounded once, and a tenth of a rounding, where activation and slope are 1, from the activation in fp32."""
    gate, up, grad = wide = tuple(x.double() for x in given)
    truth, made = both_passes(op_of(activation, eager), *wide), both_passes(op_of(activation), *given)
    for x, y, size in zip(made, truth, (gate * up, grad * up, grad * gate), strict=True):
        assert x.dtype == dtype
        allowed = ROUNDING[dtype] * (roundings * y.abs() + 0.1 * size.abs()) + 1e-7
        assert ((x.double() - y).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_truth_rounded_once(activation, shape, dtype, level):
    assert_right(activation, inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("triton_on_cpu")
def test_triton_gives_the_truth(activation, shape, dtype):
    assert_right(activation, inputs(shape, dtype), dtype, 2.02)  # the interpreter cuts bf16 numbers off


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=names)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_joined_is_the_same_as_its_halves_bit_for_bit(activation, dtype, backend):
    gate, up, grad = inputs((3, 5, 48), dtype)
    joined = torch.cat([gate, up], -1).requires_grad_()
    y = joined_op_of(activation)(joined)
    (d_joined,) = torch.autograd.grad(y, joined, grad)
    apart = both_passes(op_of(activation), gate, up, grad)
    halves = both_passes(op_of(activation), *joined.detach().chunk(2, -1), grad)  # rows twice as far apart
    for x, *same in zip([y.detach(), *d_joined.chunk(2, -1)], apart, halves, strict=True):
        assert all(torch.equal(x, other) for other in same)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(activation, dtype, level):
    given = inputs((37, 1003), dtype)
    assert_repeats(lambda: both_passes(op_of(activation), *given))
    together = both_passes(op_of(activation), *given)
    for row in (0, 20, 36):
        alone = both_passes(op_of(activation), *(x[row : row + 1] for x in given))
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_large_output_that_goes_past_the_caches_is_the_same_as_its_parts(dtype, level):
    """Of more than 4 MiB, as a whole or row by row."""
    given = inputs((80, 32_768), dtype)
    whole = both_passes(ops.swiglu, *given)
    parts = [both_passes(ops.swiglu, *(x[i : i + 10] for x in given)) for i in range(0, 80, 10)]
    assert all(torch.equal(x, torch.cat(y)) for x, y in zip(whole, zip(*parts, strict=True), strict=True))
    joined = torch.cat(given[:2], -1).requires_grad_()
    y = ops.swiglu_joined(joined)
    (d_joined,) = torch.autograd.grad(y, joined, given[2])
    assert torch.equal(y, whole[0]) and torch.equal(d_joined, torch.cat(whole[1:], -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_far_out_and_none_at_all(activation, dtype, level):
    largest = 6e4 if dtype == torch.float16 else 1e18
    gate = torch.tensor([0.0, -0.0, 50.0, -50.0, 90.0, -90.0, largest, -largest, torch.inf, torch.nan]).to(dtype)
    up, grad = torch.full_like(gate, 0.5), torch.ones_like(gate)
    y, d_gate, d_up = both_passes(op_of(activation), gate, up, grad)
    expected = torch.relu(gate)  # far from 0 both activations are that, and their slope is 0 or 1
    torch.testing.assert_close(y[:9], 0.5 * expected[:9])
    torch.testing.assert_close(d_up[:9], expected[:9])
    torch.testing.assert_close(d_gate[:8], torch.tensor([0.25, 0.25, 0.5, 0, 0.5, 0, 0.5, 0]).to(dtype))
    assert y[9].isnan() and d_up[9].isnan() and d_gate[9].isnan()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_but_gate_and_up_is_saved(activation, compiled):
    saved = []
    gate, up, _ = (x.requires_grad_() for x in inputs((4, 64), torch.bfloat16))
    op = torch.compile(op_of(activation), backend="aot_eager") if compiled else op_of(activation)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        op(gate, up)
    assert set(saved) <= {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.swiglu(x, x[:1]), ValueError, r"up has shape \(1, 4\); expected \(2, 4\)"),
        (lambda x: ops.swiglu(x, x.bfloat16()), TypeError, "up has dtype torch.bfloat16 and gate torch.float32"),
        (lambda x: ops.swiglu(x, x.to("meta")), ValueError, "up is on meta and gate on cpu"),
        (lambda x: ops.swiglu(x.sum(), x.sum()), ValueError, r"gate has shape \(\)"),
        (lambda x: ops.swiglu_joined(x[:, :3]), ValueError, r"gate_up has shape \(2, 3\); expected \(..., 2 I\)"),
        (lambda x: ops.swiglu_joined(x.long()), TypeError, "gate_up has dtype torch.int64"),
        (lambda x: ops.geglu(x, x, approximate="erf"), ValueError, "approximate is 'erf'; expected 'none' or 'tanh'"),
        (lambda x: ops.geglu_joined(x, approximate="erf"), ValueError, "approximate is 'erf'"),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x: (x, x[:1]), "up has shape"),
        (lambda x: (x, x.half()), "up has dtype float16"),
        (lambda x: (x[:, :3], None), "gate has shape"),
        (lambda x: (x.double(), None), "gate has dtype float64"),
    ],
)
def test_the_kernel_itself_refuses_what_it_cannot_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fastppo.swiglu(*arguments(torch.zeros(2, 4)))
