"""ops.gae on the CPU: as good as the oracle, the same bits always, strict about what it is given."""

import math
from typing import Any

import pytest
import torch
from gae_cases import EACH_LENGTH, GAE_CASES, GaeCase, assert_alone_as_together, assert_right
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastppo import _C, ops

LEVELS = _C.built()["simd"]
BEST = _C.built()["simd_used"]
DTYPES = [torch.float32, torch.bfloat16]
KERNEL = torch.ops.fastppo.gae.default


@pytest.fixture(params=LEVELS)
def level(request):
    try:
        _C.set_simd(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.set_simd(BEST)


def at_every_level(check: Any) -> None:
    try:
        for name in LEVELS:
            try:
                _C.set_simd(name)
            except ValueError:
                continue
            check()
    finally:
        _C.set_simd(BEST)


# The numbers


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", GAE_CASES, ids=str)
def test_every_case_is_as_good_as_the_oracle_at_every_simd_level(case, dtype):
    arguments = case.build(dtype)
    if not arguments["rewards"].isfinite().all() or not arguments["values"].isfinite().all():
        pytest.skip(f"the numbers overflow {dtype}")
    at_every_level(lambda: assert_right(ops.gae, arguments))


def packed(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_known_answers():
    rewards, values = torch.tensor([0.0, 0, 5]), torch.tensor([1.0, 2, 3])
    advantages, returns = ops.gae(rewards, values, packed(3), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [1, 1, 2] and returns.tolist() == [2, 3, 5]
    rewards, values, mask = torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 1, 1.5]), torch.tensor([True, False, True])
    advantages, returns = ops.gae(rewards, values, packed(3), gamma=1.0, lam=0.95, mask=mask)
    torch.testing.assert_close(advantages, torch.tensor([3.425, 0, 1.5]))
    torch.testing.assert_close(returns, torch.tensor([3.925, 0, 3]))


@given(
    lengths=st.lists(st.one_of(st.integers(0, 70), st.integers(2040, 2060)), max_size=6),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    kept=st.floats(0, 1),
    bf16=st.booleans(),
)
def test_any_lengths_and_masks_are_as_good_as_the_oracle(lengths, gamma, lam, seed, kept, bf16):
    random = torch.Generator().manual_seed(seed)
    arguments = GaeCase(str(seed), tuple(lengths), gamma, lam, bootstrap=True).build(DTYPES[bf16])
    arguments["mask"] = torch.rand(sum(lengths), generator=random) < kept
    at_every_level(lambda: assert_right(ops.gae, arguments))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_earlier_tokens_of_its_own_sequence_alone(level, dtype, bad):
    lengths = (5, 40, 7000, 20_000, 33)
    arguments = GaeCase("not finite", lengths).build(dtype)
    clean = torch.stack(ops.gae(**arguments))
    begin, end = sum(lengths[:3]), sum(lengths[:4])
    for at in (begin, begin + 1, begin + 4321, end - 2, end - 1):
        rewards = arguments["rewards"].clone()
        rewards[at] = bad
        out = torch.stack(ops.gae(**(arguments | {"rewards": rewards})))
        others = torch.ones(len(rewards), dtype=torch.bool)
        others[begin : at + 1] = False
        assert not out[:, begin : at + 1][:, -1].isfinite().any()
        if math.isnan(bad):
            assert out[:, begin : at + 1].isnan().all()
        assert torch.equal(out[:, others], clean[:, others])


def test_a_masked_token_s_numbers_are_not_looked_at(level):
    arguments = GaeCase("masked numbers", (5, 40, 3000), mask="some", bootstrap=True).build(torch.float32)
    clean = ops.gae(**arguments)
    poison = arguments["mask"].logical_not()
    poisoned = {name: arguments[name].masked_fill(poison, math.nan) for name in ("rewards", "values")}
    assert torch.equal(torch.stack(ops.gae(**(arguments | poisoned))), torch.stack(clean))


# The bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["", "some", "ends"])
def test_a_sequence_does_not_depend_on_its_neighbours_bit_for_bit(level, mask, dtype):
    case = GaeCase("alone", (*EACH_LENGTH, 40_000, 7), mask=mask, bootstrap=True)
    assert_alone_as_together(ops.gae, case.build(dtype))


@pytest.mark.parametrize("mask", ["", "some", "runs"])
def test_does_not_depend_on_the_number_of_threads_bit_for_bit(mask):
    arguments = GaeCase("threads", (100_000, *EACH_LENGTH, 50_000, 10), mask=mask).build(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3, 8):
            torch.set_num_threads(threads)
            results.append(torch.stack(ops.gae(**arguments)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_masking_tokens_is_taking_them_out_bit_for_bit(level):
    arguments = GaeCase("taken out", (1, 30, 2000), mask="some").build(torch.float32)
    kept = arguments.pop("mask")
    masked = torch.stack(ops.gae(**arguments, mask=kept))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[arguments["cu_seqlens"].long()]
    short = {"rewards": arguments["rewards"][kept], "values": arguments["values"][kept], "cu_seqlens": starts}
    assert torch.equal(masked[:, kept], torch.stack(ops.gae(**(arguments | short))))
    assert not masked[:, ~kept].any()


# What it takes


def test_views_and_mixed_dtypes_are_taken():
    arguments = GaeCase("views", (5, 300), bootstrap=True, mask="some").build(torch.float32)
    expected = torch.stack(ops.gae(**arguments))
    strided = {name: torch.stack([x, x], -1)[:, 0] for name, x in arguments.items() if isinstance(x, Tensor)}
    assert torch.equal(torch.stack(ops.gae(**(arguments | strided))), expected)
    rounded = arguments | {"values": arguments["values"].bfloat16()}
    same = arguments | {"values": arguments["values"].bfloat16().float()}
    assert torch.equal(torch.stack(ops.gae(**rounded)), torch.stack(ops.gae(**same)))


def test_the_outputs_take_no_part_in_autograd():
    arguments = GaeCase("autograd", (5,)).build(torch.float32)
    advantages, returns = ops.gae(**(arguments | {"values": arguments["values"].requires_grad_()}))
    assert not advantages.requires_grad and not returns.requires_grad


GOOD: dict[str, Any] = {
    "rewards": torch.zeros(4),
    "values": torch.zeros(4),
    "cu_seqlens": torch.tensor([0, 1, 4]),
    "gamma": 1.0,
    "lam": 0.9,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rewards", torch.zeros(2, 2), r"rewards has shape \(2, 2\)"),
        ("rewards", torch.zeros(()), r"rewards has shape \(\)"),
        ("rewards", torch.zeros(4).half(), "rewards must be float32 or bfloat16"),
        ("rewards", torch.zeros(8)[::2], "rewards must be contiguous"),
        ("values", torch.zeros(3), r"values has shape \(3,\); expected \(4,\)"),
        ("values", torch.zeros(4).bfloat16(), "values has a wrong dtype"),
        ("cu_seqlens", torch.tensor([1, 4]), "cu_seqlens runs from 1 to 4; expected 0 to 4"),
        ("cu_seqlens", torch.tensor([0, 3]), "cu_seqlens runs from 0 to 3"),
        ("cu_seqlens", torch.tensor([0]), "cu_seqlens runs from 0 to 0"),
        ("cu_seqlens", torch.tensor([0, 3, 2, 4]), "cu_seqlens falls from 3 to 2 at index 2"),
        ("cu_seqlens", torch.tensor([0, 2**62, 4]), "cu_seqlens falls from 4611686018427387904 to 4"),
        ("cu_seqlens", torch.tensor([0, -1, 4], dtype=torch.int32), "cu_seqlens falls from 0 to -1"),
        ("cu_seqlens", torch.tensor([0.0, 4.0]), "cu_seqlens has a wrong dtype; expected int32 or int64"),
        ("cu_seqlens", torch.tensor([[0, 4]]), r"cu_seqlens has shape \(1, 2\)"),
        ("cu_seqlens", torch.tensor([], dtype=torch.int64), r"cu_seqlens has shape \(0,\)"),
        ("gamma", 1.1, "gamma is 1.1"),
        ("gamma", math.nan, "gamma is nan"),
        ("lam", -0.1, "lam is -0.1"),
        ("bootstrap", torch.zeros(3), r"bootstrap has shape \(3,\); expected \(2,\)"),
        ("bootstrap", torch.zeros(2).bfloat16(), "bootstrap has a wrong dtype"),
        ("mask", torch.zeros(3).bool(), r"mask has shape \(3,\)"),
        ("mask", torch.zeros(4), "mask has a wrong dtype"),
    ],
)
def test_the_kernel_itself_names_a_wrong_argument(name, value, message):
    """Whoever calls it; tests/ops/test_ops_arguments.py has the checks of `ops.gae`."""
    with pytest.raises(ValueError, match=message):
        KERNEL(**(GOOD | {name: value}))


# As an op of torch


@pytest.mark.parametrize(
    "case", [GaeCase("op", (3, 0, 70)), GaeCase("op, all", (3, 0, 70), mask="some", bootstrap=True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_proper_op(case, dtype):
    arguments = case.build(dtype)
    checked = torch.library.opcheck(KERNEL, (), arguments)
    assert set(checked.values()) == {"SUCCESS"}


def test_it_compiles_without_a_break_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(ops.gae, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 0, 70), (5, 80, 1, 2)):
        arguments = GaeCase("compiled", lengths, mask="some", bootstrap=True).build(torch.float32)
        assert torch.equal(torch.stack(compiled(**arguments)), torch.stack(ops.gae(**arguments)))


def test_fake_and_meta_tensors_give_shapes():
    arguments = GaeCase("fake", (3, 4), mask="some", bootstrap=True).build(torch.bfloat16)
    on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    for made in (on_meta, fake):
        for out in ops.gae(**made):
            assert out.shape == (7,) and out.dtype == torch.float32 and out.device == made["rewards"].device
