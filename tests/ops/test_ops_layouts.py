"""Every layout of every tensor that an op takes, forward and backward, against the same numbers side by side."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import COMPILED
from op_calls import CACHES, OPS, TRAINED, Call, make, results
from torch import Tensor

from fastppo import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-12}


def reversed_dimensions(x: Tensor) -> Tensor:
    """Column-major where there are two."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def within(x: Tensor, first: int, last: int, step: int = 1) -> Tensor:
    """A part of a larger tensor with nothing sensible elsewhere: `first` entries before each row, `last` after."""
    strange = 0 if x.dtype == torch.bool or not x.is_floating_point() else math.nan
    buffer = x.new_full((*x.shape[:-1], first + step * x.shape[-1] + last), strange)
    return buffer[..., first : first + step * x.shape[-1] : step].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column-major": reversed_dimensions,
    "first two dimensions swapped": lambda x: x if x.ndim < 3 else x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda x: within(x, 0, 7),
    "at an odd address": lambda x: within(x, 1, 2),
    "every second entry": lambda x: within(x, 3, 0, step=2),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one column for all": lambda x: x[..., :1].expand(x.shape),
}
# What one row, or one entry, for all would make wrong.
DISTINCT = ("cu_seqlens", "rows", *CACHES)


def assert_near(made: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(made, expected, strict=True):
        size = y[y.isfinite()].abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1.0, size))


def walk(call: Call, layout: str, dtype: torch.dtype) -> None:
    """One tensor after the other in this layout."""
    for name, tensor in call.arguments.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim or ("for all" in layout and name in DISTINCT):
            continue
        strange = LAYOUTS[layout](tensor)
        plain = strange.clone(memory_format=torch.contiguous_format)
        made, expected = (
            results(Call(call.op, call.arguments | {name: x}, call.coefficients)) for x in (strange, plain)
        )
        assert_near(made, expected, dtype)


# attend_cached takes no fp64
SUPPORTED = [(op, dtype) for op in OPS for dtype in (DTYPES[:3] if op == "attend_cached" else DTYPES)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "dtype"), SUPPORTED, ids=str)
def test_each_tensor_in_each_layout(op, layout, dtype):
    walk(make(op, 6, vocabulary=19, dtype=dtype), layout, dtype)


@contextmanager
def new_memory_holds_nans() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Of sizes at which oneDNN computes bf16 products with AMX, and reads behind the rows of its first factor.
def wide(op: str, dtype: torch.dtype) -> Call:
    return make(op, 24, vocabulary=101, dtype=dtype)


@pytest.mark.parametrize("layout", ["padded rows", "at an odd address"])
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_policy_loss"])
def test_nans_behind_the_rows_of_a_larger_product(op, layout):
    walk(wide(op, torch.bfloat16), layout, torch.bfloat16)


@pytest.mark.parametrize(("op", "dtype"), SUPPORTED, ids=str)
def test_what_new_memory_holds_is_in_no_result(op, dtype):
    with new_memory_holds_nans():
        assert torch.empty(1).isnan()
        made = results(wide(op, dtype))
    torch.testing.assert_close(made, results(wide(op, dtype)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("layout", ["column-major", "at an odd address", "every second entry", "one row for all"])
@pytest.mark.parametrize("op", [*TRAINED, "sample_tokens", "attend_cached"])
@pytest.mark.usefixtures("triton_on_cpu")
def test_each_tensor_in_each_layout_by_triton(op, layout):
    # the interpreter runs a program a row and head
    walk(make(op, 3, vocabulary=19, dtype=torch.bfloat16, kv_heads=2), layout, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", TRAINED)
def test_all_tensors_apart_and_every_incoming_gradient(op, dtype):
    call = make(op, 6, vocabulary=19, dtype=dtype)
    apart = {
        name: reversed_dimensions(within(x, 1, 2, step=2)) if isinstance(x, Tensor) and x.ndim else x
        for name, x in call.arguments.items()
    }
    strange = Call(op, apart, call.coefficients)
    for upstream in ("dense", "apart", "expanded"):
        assert_near(results(strange, upstream=upstream), results(call, upstream=upstream), dtype)
    dense = results(call, upstream="dense")
    assert all(torch.equal(x, y) for x, y in zip(results(call, upstream="apart"), dense, strict=True))


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs", "linear_policy_loss"])
def test_compiled_gradients_of_column_major_inputs(op):
    """A fake kernel that promised other strides than the kernel gives would be found here."""
    call = make(op, 6, vocabulary=19)
    turned = {name: reversed_dimensions(x) if isinstance(x, Tensor) else x for name, x in call.arguments.items()}
    turned.pop("softcap")
    strange = Call(op, turned, call.coefficients)
    torch._dynamo.reset()
    run = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(strange, run), results(strange))


def test_expanded_caches_are_refused():
    call = make("attend_cached", 6, vocabulary=19)
    for name in CACHES:
        for change in (lambda x: x[:1].expand(x.shape), lambda x: x[..., :1].expand(x.shape)):
            given: dict[str, Any] = call.plain() | {name: change(call.arguments[name])}
            with pytest.raises(ValueError, match=f"{name} is expanded"):
                ops.attend_cached(**given)
