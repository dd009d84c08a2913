"""fastppo::attend_cached, one decode step over a key/value cache, against a loop in fp64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastppo import _C
from fastppo.ops import eager


@dataclass(frozen=True)
class Case:
    query: Tensor  # (R, Hq, D)
    key: Tensor  # (R, Hk, D)
    value: Tensor  # (R, Hk, D)
    key_cache: Tensor  # (rows, Hk, T, D)
    value_cache: Tensor  # (rows, Hk, T, D)
    lengths: Tensor  # (rows,) int32 or int64
    rows: Tensor  # (R,) int64
    scale: float
    window: int = 0
    softcap: float = 0.0

    def run(self) -> Tensor:
        """Works on copies of the caches."""
        fields: dict[str, Any] = dict(vars(self))
        for name in ("key_cache", "value_cache"):
            fields[name] = fields[name].clone()
        return torch.ops.fastppo.attend_cached(**fields)


def make(
    lengths: tuple[int, ...] = (0, 5, 30, 16),
    rows: tuple[int, ...] = (2, 0, 3),
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 64,
    capacity: int = 40,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    r, total = len(rows), len(lengths)
    return Case(
        normal(r, heads, width),
        normal(r, kv_heads, width),
        normal(r, kv_heads, width),
        normal(total, kv_heads, capacity, width),
        normal(total, kv_heads, capacity, width),
        torch.tensor(lengths),
        torch.tensor(rows),
        scale=width**-0.5,
        **options,
    )


def truth(case: Case) -> Tensor:
    """softmax(scale q k) v over positions 0 .. length of each row, head by head. (R, Hq, D) fp64."""
    out = torch.empty(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.key.shape[1]
    for r, row in enumerate(case.rows.tolist()):
        length = int(case.lengths[row])
        first = max(0, length + 1 - case.window) if case.window else 0
        for h in range(case.query.shape[1]):
            keys = torch.cat([case.key_cache[row, h // group, :length], case.key[r, h // group][None]])[first:]
            values = torch.cat([case.value_cache[row, h // group, :length], case.value[r, h // group][None]])[first:]
            scores = case.scale * keys.double() @ case.query[r, h].double()
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            out[r, h] = torch.softmax(scores, 0) @ values.double()
    return out


def test_the_reference_that_runs_off_the_cpu_equals_the_loop():
    for options in ({}, {"window": 7}, {"softcap": 2.0}):
        case = make(**options)
        expected = truth(case)
        torch.testing.assert_close(eager.attend_cached(**vars(case)).double(), expected, rtol=1e-5, atol=1e-6)


def error(case: Case) -> float:
    """Largest error, over the rounding of the output's dtype: 1 is one unit in the last place of a number near 1."""
    return float((case.run().double() - truth(case)).abs().max()) / torch.finfo(case.query.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 2.0}, {"window": 1, "softcap": 0.5}])
def test_equals_the_loop_at_every_simd_level(level, dtype, options):
    assert error(make(dtype=dtype, **options)) < 8


@pytest.mark.parametrize("width", [1, 7, 16, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (9, 3), (7, 1)])
def test_equals_the_loop_for_any_width_and_grouping(level, width, heads, kv_heads):
    assert error(make(width=width, heads=heads, kv_heads=kv_heads)) < 8
    assert error(make(width=width, heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16)) < 8
    assert error(make(width=width, heads=heads, kv_heads=kv_heads, dtype=torch.float16)) < 8


@given(
    lengths=st.lists(st.integers(0, 49), min_size=1, max_size=5),
    window=st.integers(0, 60),
    int32=st.booleans(),
    data=st.data(),
)
def test_equals_the_loop_for_ragged_lengths_and_any_rows(lengths, window, int32, data):
    rows = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    case = make(tuple(lengths), tuple(rows), width=16, capacity=50, window=window)
    if int32:
        case = replace(case, lengths=case.lengths.int(), rows=case.rows.int())
    assert error(case) < 8


def test_writes_the_newest_position_and_nothing_else():
    case = make()
    keys, values = case.key_cache.clone(), case.value_cache.clone()
    torch.ops.fastppo.attend_cached(*vars(case).values())
    for r, row in enumerate(case.rows.tolist()):
        keys[row, :, case.lengths[row]] = case.key[r]
        values[row, :, case.lengths[row]] = case.value[r]
    assert torch.equal(case.key_cache, keys) and torch.equal(case.value_cache, values)
    assert case.lengths.tolist() == [0, 5, 30, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit(level, dtype):
    case = make(dtype=dtype)
    together = case.run()
    for r in range(len(case.rows)):
        one = slice(r, r + 1)
        alone = replace(case, query=case.query[one], key=case.key[one], value=case.value[one], rows=case.rows[one])
        assert torch.equal(alone.run()[0], together[r])


def test_does_not_depend_on_the_number_of_threads_bit_for_bit():
    rows = tuple(range(32))
    case = make(tuple(200 + r for r in rows), rows, heads=9, kv_heads=3, capacity=256)  # enough to share out
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_lies_beyond_a_row_s_length_is_not_read():
    case = make()
    poisoned = replace(case, key_cache=case.key_cache.clone(), value_cache=case.value_cache.clone())
    for row, length in enumerate(case.lengths.tolist()):
        poisoned.key_cache[row, :, length:] = float("nan")
        poisoned.value_cache[row, :, length:] = float("nan")
    assert torch.equal(poisoned.run(), case.run())


def test_strided_heads_give_the_same_as_dense_ones():
    case = make()
    strided = {
        name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("query", "key", "value")
    }
    assert torch.equal(replace(case, **strided).run(), case.run())


def test_large_scores_do_not_overflow_and_a_nan_is_not_hidden():
    case = make()
    assert error(replace(case, query=case.query * 1e4)) < 8 * 1e4  # the scores' own rounding grows with the query
    broken = replace(case, query=case.query.clone())
    broken.query[1, 2] = float("nan")
    assert broken.run().isnan().any(dim=2).nonzero().tolist() == [[1, 2]]


def test_no_active_row_is_no_work():
    case = make(rows=(0,))
    empty = replace(case, query=case.query[:0], key=case.key[:0], value=case.value[:0], rows=case.rows[:0])
    assert empty.run().shape == (0, 6, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 384)}, r"query has shape \(3, 384\)"),
        ({"query": torch.zeros(3, 6, 64).double()}, "query must be float32, bfloat16 or float16"),
        ({"query": torch.zeros(3, 5, 64)}, "query has 5 heads, and key_cache 2"),
        ({"query": torch.zeros(3, 6, 128)[..., ::2]}, "query must be dense"),
        ({"key": torch.zeros(3, 2, 32)}, r"key has shape \(3, 2, 32\), expected \(3, 2, 64\)"),
        ({"value": torch.zeros(2, 2, 64)}, r"value has shape \(2, 2, 64\), expected \(3, 2, 64\)"),
        ({"value": torch.zeros(3, 2, 64).double()}, "value must have the dtype of query"),
        ({"key_cache": torch.zeros(4, 2, 40, 64).bfloat16()}, "key_cache must have the dtype of query"),
        ({"key_cache": torch.zeros(2, 40, 64)}, r"key_cache has shape \(2, 40, 64\)"),
        ({"value_cache": torch.zeros(4, 2, 64, 40).transpose(2, 3)}, "value_cache must be dense"),
        ({"value_cache": torch.zeros(4, 2, 41, 64)}, r"value_cache has shape \(4, 2, 41, 64\), key_cache \(4, 2, 40"),
        ({"lengths": torch.zeros(4)}, "lengths must be int32 or int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths has shape \(3,\), expected \(4,\)"),
        ({"lengths": torch.tensor([0, 5, 40, 16])}, r"lengths\[2\] is 40, and key_cache holds 40 positions"),
        ({"lengths": torch.tensor([0, 5, -1, 16])}, r"lengths\[2\] is -1"),
        ({"rows": torch.tensor([2, 0, 4])}, r"rows\[2\] is 4, and key_cache has 4 rows"),
        ({"rows": torch.tensor([2, 0, 2])}, "rows names row 2 twice"),
        ({"rows": torch.tensor([2, 0])}, r"rows has shape \(2,\), expected \(3,\)"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -1.0}, "softcap is -1"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make(), **change).run()


def test_an_unknown_simd_level_is_an_error():
    with pytest.raises(ValueError, match="mmx is not in this build"):
        _C.set_simd("mmx")
