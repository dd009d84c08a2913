"""Derivatives of the ops: reverse mode once; of the rest none is zero without a word, and fp64 has them all."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import DIFFERENTIABLE, OPS, TRAINED, Call, make, outputs_of, results
from torch import Tensor
from torch.autograd import forward_ad

from fastppo import ops

KERNEL_DTYPES = [torch.float32, torch.bfloat16]


def first_leaf(call: Call) -> str:
    return next(iter(call.leaves()))


def total(call: Call, x: Tensor) -> Tensor:
    """The sum of what carries gradients, as a function of the first leaf."""
    outputs = outputs_of(call.op, call.plain() | {first_leaf(call): x})
    return sum((y.sum() for i in DIFFERENTIABLE[call.op] if (y := outputs[i]) is not None), torch.zeros(()))


def leaf_of(call: Call) -> Tensor:
    return call.leaves()[first_leaf(call)].detach()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in TRAINED if op != "rotary"])  # which is linear: that one is zero
@pytest.mark.usefixtures("backend")
def test_a_second_derivative_is_refused(op, dtype):
    call = make(op, 5, dtype=dtype)
    x = leaf_of(call).requires_grad_()
    (first,) = torch.autograd.grad(total(call, x), x, create_graph=True)
    (plain,) = torch.autograd.grad(total(call, x), x)
    assert torch.equal(first.detach(), plain)
    penalty = first.square().sum() + (x * x).sum()  # the second term has a derivative, which would hide the first's
    with pytest.raises(NotImplementedError, match=f"gradient of ops.{op} has no derivative of its own; give fp64"):
        torch.autograd.grad(penalty, x)


@pytest.mark.parametrize("op", TRAINED)
def test_a_derivative_by_the_incoming_gradient_is_refused(op):
    call = make(op, 5)
    x, scale = leaf_of(call).requires_grad_(), torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(total(call, x) * scale, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"gradient of ops.{op}"):
        torch.autograd.grad(first.sum(), scale)


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "forward mode": dual,
    "forward mode, graph": lambda f, x: dual(f, x.clone().requires_grad_()),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "per-sample grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack((x, x))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", TRAINED)
def test_forward_mode_and_function_transforms_are_refused(op, way):
    call = make(op, 5)
    with pytest.raises(NotImplementedError, match=f"ops.{op} .*give fp64 inputs"):
        WAYS[way](lambda x: total(call, x), leaf_of(call))


@pytest.mark.parametrize("op", TRAINED)
def test_a_compiled_tangent_is_refused_too(op):
    call, f = make(op, 5), getattr(ops, op)
    given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in call.all().items()}
    name = first_leaf(call)

    def run(x: Tensor) -> Any:
        return torch.func.jvp(lambda y: f(**(given | {name: y}))[0].sum(), (x,), (torch.ones_like(x),))

    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"ops.{op} has no derivative of forward mode"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(leaf_of(call))


@pytest.mark.parametrize("op", TRAINED)
def test_fp64_has_derivatives_of_every_order_and_mode(op):
    call = make(op, 3, vocabulary=4, dtype=torch.float64)

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = outputs_of(op, call.plain() | dict(zip(call.leaves(), leaves, strict=True)))
        return tuple(y for i in DIFFERENTIABLE[op] if (y := outputs[i]) is not None)

    leaves = tuple(x.detach().requires_grad_() for x in call.leaves().values())
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)
    x = leaf_of(call)
    expected = torch.autograd.functional.hessian(lambda y: total(call, y), x)
    torch.testing.assert_close(torch.func.hessian(lambda y: total(call, y))(x), expected)


@pytest.mark.parametrize("op", TRAINED)
def test_vmap_gives_what_a_loop_gives(op):
    call = make(op, 5)
    x = torch.stack((leaf_of(call), leaf_of(call).flip(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no rule to do better than a loop
        mapped = torch.func.vmap(lambda y: total(call, y).detach())(x)
    torch.testing.assert_close(mapped, torch.stack([total(call, y).detach() for y in x]))


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op != "attend_cached"])
def test_only_what_is_differentiable_says_so(op, dtype):
    call = make(op, 5, dtype=dtype)
    given = {
        name: x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and name != "normalizer"
        else x
        for name, x in call.all().items()
    }
    for i, output in enumerate(outputs_of(op, given)):
        assert output is None or output.requires_grad == (i in DIFFERENTIABLE[op]), f"output {i}"


def test_attention_over_a_cache_carries_no_gradients():
    given = {n: x.requires_grad_() if n in ("query", "key") else x for n, x in make("attend_cached", 5).plain().items()}
    assert not ops.attend_cached(**given).requires_grad


@pytest.mark.parametrize("op", [op for op in OPS if op != "attend_cached" and make(op, 5).coefficients])
@pytest.mark.usefixtures("backend")
def test_coefficients_in_tensors_give_what_numbers_give(op):
    """On the CPU under the interpreter this is also the kernels' way to read them through a pointer."""
    call = make(op, 5)
    for dtype in (torch.float64, torch.float32, torch.float16):
        # halves: numbers that each dtype holds
        numbers = {name: max(0.5, round(2 * x) / 2) for name, x in call.coefficients.items()}
        given = {name: torch.tensor(x, dtype=dtype) for name, x in numbers.items()}
        if "dual_clip" in given:  # some as numbers beside
            given["dual_clip"] = numbers["dual_clip"]
        made, expected = (results(Call(op, call.arguments, x)) for x in (given, numbers))
        assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))


@pytest.mark.parametrize("op", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_of_zero_leaves_an_infinite_term_out(op, dtype):
    call = make(op, 5, dtype=dtype)
    if op == "policy_loss":
        call.arguments["kl"][0] = torch.inf
    else:
        call.arguments["ref_bias"][3] = -torch.inf
    zero = {"kl_coef": torch.zeros(())}
    made, expected = (results(Call(op, call.arguments, call.coefficients | x)) for x in (zero, {"kl_coef": 0.0}))
    assert made[0].isfinite()
    torch.testing.assert_close(made, expected)
