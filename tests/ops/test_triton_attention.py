"""Attention of a decode step in Triton: on the GPU where there is one, else under its interpreter (see conftest)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import assert_as_good
from conftest import COMPILED
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import make as call_of
from test_attend_cached import Case, make, truth
from test_ops import names
from test_triton import DEVICE, HALF, INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo import ops
from fastppo.kernels.attend_cached import attend_cached, padded_width, tiling
from fastppo.ops import eager

# NaN and infinities are among what is tested, and NumPy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = [torch.float32, HALF] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
SPLIT = tiling(1, 16, 4).split


def on_device(case: Case) -> Case:
    return Case(**{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in vars(case).items()})


def copied(case: Case) -> dict[str, Any]:
    """The case's arguments, with caches that may be written to; strides as they are."""
    return vars(case) | {name: getattr(case, name).clone() for name in ("key_cache", "value_cache")}


def run(case: Case) -> Tensor:
    return attend_cached(**copied(case))


def long(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Rows of one to five splits, one of them new."""
    lengths = (5 * SPLIT + 40, 0, 2 * SPLIT - 2, 2 * SPLIT - 1, 3 * SPLIT)
    shape = {"heads": 1, "kv_heads": 1, "width": 16, "capacity": 5 * SPLIT + 64}
    return on_device(make(lengths, (3, 0, 1, 2, 4), dtype=dtype, **(shape | options)))


def assert_near(case: Case) -> None:
    """As near to the truth as the reference in the same dtype."""
    exact = {"out": truth(case).to(DEVICE)}
    assert_as_good({"out": run(case)}, {"out": eager.attend_cached(**copied(case))}, exact, case.query.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 7}, {"window": 1, "softcap": 0.5}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (8, 1)])
def test_is_as_near_to_the_truth_as_the_reference(heads, kv_heads, options, dtype):
    assert_near(on_device(make(heads=heads, kv_heads=kv_heads, dtype=dtype, **options)))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("width", "group"), [(1, 2), (7, 9), (64, 1), (80, 2), (96, 3), (128, 16), (256, 2), (64, 71)])
def test_any_width_and_number_of_queries_a_head(width, group, dtype):
    assert_near(on_device(make((9, 70), (1, 0), heads=group, kv_heads=1, width=width, capacity=80, dtype=dtype)))


@pytest.mark.parametrize("window", [16, 17, 18, 30, 31, 32, 300])  # a row has 17, or 31, positions with the new one
def test_windows_shorter_than_a_row_as_long_and_longer(window):
    assert_near(on_device(make(window=window)))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 2 * SPLIT + 5}], ids=str)
def test_a_row_of_several_splits(options, dtype):
    case = long(dtype, **options)
    assert_near(replace(case, query=case.query * 4))  # so that the splits' largest scores differ


def test_more_splits_than_are_read_together_add_up_too(monkeypatch):
    monkeypatch.setattr("fastppo.kernels.attend_cached.SPLITS_READ_TOGETHER", 2)
    case = long(heads=6, kv_heads=6)  # of which some have their largest score late
    assert_near(replace(case, query=case.query * 4))


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 3 * SPLIT - 1), min_size=1, max_size=4),
    window=st.integers(0, 4 * SPLIT),
    data=st.data(),
)
def test_ragged_lengths_and_any_rows(lengths, window, data):
    rows = data.draw(st.permutations(range(len(lengths))))[: data.draw(st.integers(1, len(lengths)))]
    case = make(tuple(lengths), tuple(rows), heads=2, kv_heads=1, width=16, capacity=3 * SPLIT, window=window)
    assert_near(on_device(case))


def test_rows_and_lengths_may_be_int32():
    case = on_device(make())
    assert torch.equal(run(replace(case, lengths=case.lengths.int(), rows=case.rows.int())), run(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_row_has_the_same_bits_in_any_batch_and_in_a_cache_of_any_room(dtype):
    case = long(dtype)
    together = run(case)
    for active in ([2], [3, 1], [4, 0, 2]):
        few = {name: getattr(case, name)[active] for name in ("query", "key", "value", "rows")}
        assert torch.equal(run(replace(case, **few)), together[active])
    rows, room = torch.tensor([2, 1, 4]), int(case.lengths.max()) * 2
    larger = {
        name: torch.nn.functional.pad(getattr(case, name)[case.rows[rows]], (0, 0, 0, room))
        for name in ("key_cache", "value_cache")
    }
    larger |= {name: getattr(case, name)[rows] for name in ("query", "key", "value")}
    larger |= {"lengths": case.lengths[case.rows[rows]], "rows": torch.arange(3, device=DEVICE)}
    assert torch.equal(run(replace(case, **larger)), together[rows])
    assert torch.equal(run(replace(case, window=10**6)), together)  # a window that no row reaches


def test_a_window_splits_only_what_is_in_it():
    """A row and the same positions alone, in a cache of their own, have the same bits."""
    window = 2 * SPLIT + 5
    case = long(window=window)
    row = 1  # with more positions than that
    cut = {}
    for name in ("key_cache", "value_cache"):
        cache, length = getattr(case, name), int(case.lengths[case.rows[row]])
        cut[name] = cache[case.rows[row], :, length + 1 - window : length + 1][None]
    few = {name: getattr(case, name)[row : row + 1] for name in ("query", "key", "value")}
    lengths, rows = torch.tensor([window - 1], device=DEVICE), torch.tensor([0], device=DEVICE)
    alone = replace(case, **cut, **few, lengths=lengths, rows=rows, window=0)
    assert torch.equal(run(alone)[0], run(case)[row])


def test_writes_the_newest_position_and_reads_none_beyond_it():
    case = on_device(make())
    expected = run(case)
    for row, length in enumerate(case.lengths.tolist()):
        case.key_cache[row, :, length:] = case.value_cache[row, :, length:] = float("nan")
    keys, values = case.key_cache.clone(), case.value_cache.clone()
    assert torch.equal(attend_cached(**vars(case)), expected)
    for r, row in enumerate(case.rows.tolist()):
        keys[row, :, case.lengths[row]], values[row, :, case.lengths[row]] = case.key[r], case.value[r]
    assert torch.equal(case.key_cache.nan_to_num(9.0), keys.nan_to_num(9.0))
    assert torch.equal(case.value_cache.nan_to_num(9.0), values.nan_to_num(9.0))
    assert case.lengths.tolist() == [0, 5, 30, 16]


def test_a_cache_in_any_layout_gives_the_same_bits_and_is_written_in_place():
    case = on_device(make(window=9))
    by_position = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("key_cache", "value_cache")
    }
    strided = {
        name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("query", "key", "value")
    }
    other = replace(case, **by_position, **strided)
    assert torch.equal(attend_cached(**vars(other)), attend_cached(**vars(case)))
    assert torch.equal(other.key_cache, case.key_cache) and torch.equal(other.value_cache, case.value_cache)


def test_a_row_without_a_place_is_nan_and_nothing_is_written():
    case = on_device(make(lengths=(40, 5, 30, -1), rows=(0, 2, 3, 1)))
    rows = case.rows.clone()
    rows[3] = 4  # beyond the cache
    case = replace(case, rows=rows)
    keys = case.key_cache.clone()
    out = attend_cached(**vars(case))
    assert out.isnan().all(dim=(1, 2)).tolist() == [True, False, True, True] and not out[1].isnan().any()
    keys[2, :, 30] = case.key[1]
    assert torch.equal(case.key_cache, keys)


def test_large_scores_do_not_overflow_and_a_nan_is_not_hidden():
    case = long()
    large = replace(case, query=case.query * 1e4)
    torch.testing.assert_close(run(large).double(), truth(large).to(DEVICE), atol=5e-2, rtol=0)
    for name, place in (("query", (1, 0, 2)), ("key", (1, 0, 2)), ("key_cache", (0, 0, 20, 3))):
        broken = {name: getattr(case, name).clone()}
        broken[name][place] = float("nan")
        assert run(replace(case, **broken)).isnan().any(dim=2)[:, 0].tolist() == [False, True, False, False, False]


def test_a_split_that_is_excluded_by_its_scores_adds_nothing():
    case = long()
    query, keys = case.query.clone(), case.key_cache.clone()
    query[:, :, 0] = 1.0
    keys[0, :, : 2 * SPLIT, 0] = float("-inf")
    case = replace(case, query=query, key_cache=keys)
    torch.testing.assert_close(run(case).double(), truth(case).to(DEVICE), atol=1e-5, rtol=1e-5)


def test_no_active_row_is_no_work():
    case = on_device(make(rows=(0,)))
    empty = {name: getattr(case, name)[:0] for name in ("query", "key", "value", "rows")}
    assert run(replace(case, **empty)).shape == (0, 6, 64)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16, 32, 71])
@pytest.mark.parametrize(("width", "itemsize"), [(64, 2), (64, 4), (80, 2), (128, 2), (128, 4), (256, 2), (256, 4)])
def test_a_split_is_large_enough_for_what_it_costs(group, width, itemsize):
    """Its partial sums, written and read, and its read of the queries: at most 1/60 of its keys and values."""
    made = tiling(group, width, itemsize)
    cost = 8 * group * (width + 2) + group * width * itemsize
    assert cost <= 2 * made.split * width * itemsize / 60
    tiles = 2 * (made.stages - 1) * made.block * padded_width(width) * itemsize
    assert tiles <= 32 << 10 and made.block <= made.split


class HostReads(TorchDispatchMode):
    """Counts what waits for the device: numbers that the host reads, and shapes that depend on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero", "masked_select", "unique")

    def __enter__(self) -> "HostReads":
        self.found: list[str] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@COMPILED
@pytest.mark.usefixtures("triton_on_cpu")
def test_the_host_reads_nothing():
    arguments = call_of("attend_cached", 3).plain()
    with HostReads() as reads:
        ops.attend_cached(**arguments)
    assert not reads.found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 384)}, r"query is torch.float32 \(3, 384\)"),
        ({"query": torch.zeros(3, 6, 64).double()}, "query is torch.float64"),
        ({"query": torch.zeros(3, 5, 64)}, "multiple of kv heads"),
        ({"query": torch.zeros(3, 6, 128)[..., ::2]}, "query must be dense"),
        ({"key": torch.zeros(3, 2, 32)}, r"key has shape \(3, 2, 32\) on cpu; expected \(3, 2, 64\)"),
        ({"value": torch.zeros(3, 2, 64).double()}, "value must have the dtype of query"),
        ({"key_cache": torch.zeros(4, 2, 40, 64).half()}, "key_cache must have the dtype of query"),
        ({"key_cache": torch.zeros(2, 40, 64)}, r"key_cache has shape \(2, 40, 64\)"),
        ({"value_cache": torch.zeros(4, 2, 41, 64)}, r"value_cache has shape \(4, 2, 41, 64\)"),
        ({"value_cache": torch.zeros(4, 2, 64, 40).transpose(2, 3)}, "value_cache must be dense"),
        ({"lengths": torch.zeros(4)}, "lengths is torch.float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths has shape \(3,\)"),
        ({"rows": torch.tensor([2, 0])}, r"rows has shape \(2,\)"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(change, message):
    """Of shapes and dtypes, which are the same on every device; `lengths` and `rows` are not read."""
    with pytest.raises(ValueError, match=message):
        attend_cached(**vars(replace(make(), **change)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
def test_a_recorded_graph_serves_later_lengths_and_rows(dtype):
    case = long(dtype, window=3 * SPLIT, softcap=5.0)
    arguments = copied(case) | {"lengths": torch.zeros_like(case.lengths), "rows": case.rows.clone()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.attend_cached(**arguments)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend_cached(**arguments)
    for rows in ([3, 0, 1, 2, 4], [4, 3, 2, 1, 0]):
        now = replace(case, rows=torch.tensor(rows, device=DEVICE))
        expected = copied(now)
        for name in ("lengths", "rows", "key_cache", "value_cache"):
            arguments[name].copy_(getattr(now, name))
        graph.replay()
        assert torch.equal(out, ops.attend_cached(**expected))
        assert torch.equal(arguments["key_cache"], expected["key_cache"])
