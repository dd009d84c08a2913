"""torch.compile of every op, without a graph break: one compilation for all sizes and coefficients, or two."""

from typing import Any

import pytest
import torch
from op_calls import OPS, Call, make, results
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo import ops

SIZES = range(4, 15)  # more than the eight compilations after which torch gives up

# A model's constants, those of `op_calls`, as a model's code has them: not among what is called with.
WITH_CONSTANTS: dict[str, Any] = {
    "token_logprobs": lambda **given: ops.token_logprobs(**given, softcap=5.0),
    "linear_logprobs": lambda **given: ops.linear_logprobs(**given, softcap=5.0),
    "linear_policy_loss": lambda **given: ops.linear_policy_loss(**given, softcap=5.0),
    "attend_cached": lambda **given: ops.attend_cached(**given, softcap=5.0, scale=0.25, window=3),
    "geglu": lambda **given: ops.geglu(**given, approximate="tanh"),
    "rms_norm": lambda **given: ops.rms_norm(**given, eps=1e-5, offset=1.0, round_first=False),
}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(op: str, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(
        WITH_CONSTANTS.get(op) or getattr(ops, op), fullgraph=True, backend=counter, **options
    ), counter


def assert_same(call: Call, run: Any) -> None:
    torch.testing.assert_close(results(call, run), results(call))


def moved(call: Call, step: int, dtype: torch.dtype | None) -> Call:
    """Coefficients a little larger at each step: as tensors of a dtype, or as numbers."""
    if call.op == "attend_cached":  # its numbers are constants of a model
        return call
    made: dict[str, Any] = {name: x + 0.01 * step for name, x in call.coefficients.items()}
    if dtype is not None:
        made = {name: torch.tensor(x, dtype=dtype) for name, x in made.items()}
    return Call(call.op, call.arguments, made)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_two_compilations_serve_all_numbers_of_tokens(op):
    run, counter = compiled(op)
    for tokens in SIZES:
        assert_same(make(op, tokens), run)
    assert counter.frame_count == 2


@pytest.mark.parametrize("op", OPS)
def test_one_compilation_serves_all_sizes_and_coefficients_in_tensors(op):
    run, counter = compiled(op, dynamic=True)
    for step, tokens in enumerate(SIZES):
        assert_same(moved(make(op, tokens, vocabulary=33 + 2 * step), step, torch.float32), run)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_numbers_that_change_do_not_compile_again(op):
    run, counter = compiled(op, dynamic=True)
    for step, tokens in enumerate(SIZES):
        assert_same(moved(make(op, tokens), step, None), run)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op != "attend_cached"])
def test_fp64_compiles_as_well(op):
    run, counter = compiled(op, dynamic=True)
    for step, tokens in enumerate((4, 9, 11)):
        assert_same(moved(make(op, tokens, dtype=torch.float64), step, torch.float32), run)
    assert counter.frame_count == 1


def test_a_seed_and_a_position_that_change_do_not_compile_again():
    run, counter = compiled("sample_tokens", dynamic=True)
    for step, tokens in enumerate(SIZES):
        call = make("sample_tokens", tokens)
        assert_same(
            Call(call.op, call.arguments | {"seed": 100 - 7 * step, "offset": 5 + step}, call.coefficients), run
        )
    assert counter.frame_count == 1


def test_a_coefficient_may_pass_through_zero_while_it_changes():
    """An annealed entropy bonus, say; a number is looked at, so that the term may be left out."""
    run, counter = compiled("policy_loss", dynamic=True)
    for entropy_coef in (0.2, 0.1, 0.0, -0.1, 0.3):
        call = make("policy_loss", 6)
        assert_same(Call(call.op, call.arguments, call.coefficients | {"entropy_coef": entropy_coef}), run)
    assert counter.frame_count <= 2


def test_a_wrong_argument_is_named_in_a_compiled_call_too():
    run, _ = compiled("policy_loss")
    call = make("policy_loss", 6)
    with pytest.raises(Exception, match=r"clip_low is 1\.5"):
        run(**(call.all() | {"clip_low": 1.5}))
