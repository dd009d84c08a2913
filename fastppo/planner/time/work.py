"""What a pass computes and moves, counted on the model itself: every kernel that it launches, by its shapes.

The pass runs on fake tensors (shapes and dtypes, no data) within a `Recording`. Formulas are needed for three kinds of
kernels only: a product of (m, k) and (k, n) takes 2 m n k FLOP; causal attention of a sequence of L tokens with h heads
of width d takes 2 L^2 h d FLOP forward, half of the 4 L^2 h d of all pairs, and 2.5 times as much backward (Dao et al.,
2022); a decode step reads the keys and values of each row. Every kernel also reads its inputs and writes its outputs
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastppo.models import ActiveRows
from fastppo.planner.footprint import grouped_product

Kind = Literal["products", "attention", "memory"]

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "_grouped_mm"})
ALLOCATIONS = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "lift_fresh"})
# These read of their first argument only what they return.
GATHERS = frozenset({"embedding", "index", "index_select", "gather"})
# These write or read of their first argument only as much as they are given.
SCATTERS = frozenset({"index_put_", "_index_put_impl_", "index_copy_", "index_fill_"})
# The passes of ops over the logits, their first argument.
LOGIT_PASSES = {"policy_loss_in_chunk": 3, "vocabulary_forward": 1, "vocabulary_backward": 2, "sample_tokens": 1}
NONE = 1e-9  # less is rounding of a difference
BACKWARD = 2.5  # times the FLOP of attention forward, which it computes once more on the way


class Shape(NamedTuple):
    """A tensor without its data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        text = f"{str(self.dtype).removeprefix('torch.')}{list(self.size)}"
        if self.size and self.stride[-1] != 1:
            text += f":{list(self.stride)}"
        return text.replace(" ", "")


class Call(NamedTuple):
    """A kernel on tensors of these shapes."""

    kind: Kind
    name: str  # with the shapes, as in files of measured constants
    dtype: torch.dtype  # of the largest tensor
    flops: float
    moved: float  # bytes read and written
    function: Any = None  # torch's op and its arguments, with a `Shape` for each tensor; None: attention of no library
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Work:
    """Kernels, each so many times. A number need not be whole: work is also a mean over microbatches."""

    calls: Counter[Call] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        found = Counter(self.calls)
        for call, times in other.calls.items():
            found[call] += times
        return Work(Counter({call: times for call, times in found.items() if abs(times) > NONE}))

    def __sub__(self, other: Work) -> Work:
        return self + -1 * other

    def __rmul__(self, factor: float) -> Work:
        found = Counter[Call]()
        if factor:
            for call, times in self.calls.items():
                found[call] = factor * times  # type: ignore[assignment]
        return Work(found)

    def flops(self, kind: Kind | None = None) -> float:
        return sum(n * call.flops for call, n in self.calls.items() if kind in (None, call.kind))

    def moved(self, kind: Kind | None = None) -> float:
        """Bytes."""
        return sum(n * call.moved for call, n in self.calls.items() if kind in (None, call.kind))

    @property
    def kernels(self) -> float:
        return sum(self.calls.values())


def total(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


class Recording(TorchDispatchMode):
    """Records the kernels that run within it.

    cached: positions of a row that a decode step attends to; sequence: ranks that share each sequence: its tokens are
    divided among them, and in attention its heads.
    """

    def __init__(self, *, cached: int = 0, sequence: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cached, self.sequence = cached, sequence
        self.work = Work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:  # a check reads whether numbers are finite: they are
            return True
        if function is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):  # which knows bf16 alone
            out: Any = grouped_product(*args[:3])
        else:
            out = function(*args, **kwargs)
        if launches(function, args, kwargs, out):
            self.add(self._call(function, args, kwargs, out))
        return out

    def add(self, call: Call, times: float = 1) -> None:
        self.work.calls[call] += times  # type: ignore[assignment]

    def _call(self, function: Any, args: Any, kwargs: Any, out: Any) -> Call:
        name = function.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(out)
        kind, flops, moved = self._amounts(function, name, given, made)
        shaped = tree_map(_shaped, args), tree_map(_shaped, kwargs)
        said = " ".join(str(_shaped(x)) for x in given)
        largest = max((*given, *made), key=lambda x: x.numel() * x.is_floating_point())
        called = f"{function.namespace}.{name} {said}"
        if name == "attend_cached":
            called = f"{called} at {self.cached}"
        return Call(
            kind, called, largest.dtype, flops, moved, function, _frozen(shaped[0]), tuple(_frozen(shaped[1]).items())
        )

    def _amounts(self, function: Any, name: str, given: list[Tensor], made: list[Tensor]) -> tuple[Kind, float, float]:
        moved: float = _bytes([*given, *made])
        if function._schema.is_mutable:
            moved += _bytes(given[:1])
        if name in PRODUCTS:
            first, second = given[1:3] if name in ("addmm", "baddbmm") else given[:2]
            columns = second.shape[0 if name == "_linear_pointwise" else -1]
            return "products", 2.0 * first.numel() * columns, moved
        if "scaled_dot_product" in name:
            query = given[1] if "backward" in name else given[0]
            flops = attention_flops(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])
            return "attention", flops * (BACKWARD if "backward" in name else 1), moved
        if name == "attend_cached":
            query, key = given[0], given[1]
            read = 2 * self.cached * key.numel() * key.element_size()
            return "attention", 4.0 * self.cached * query.numel(), read + 2 * _bytes([query, key])
        if name in LOGIT_PASSES:
            moved = LOGIT_PASSES[name] * _bytes(given[:1])
        elif name in GATHERS:
            moved = 2 * _bytes(made)
        elif name in SCATTERS:
            moved = 2 * _bytes(given[1:])
        return "memory", 0.0, moved


class CountedAttention:
    """Attention on a GPU, where one kernel computes it: a backend that records what it is asked for."""

    name = setting = "counted"
    required = False

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def lacks(self, width: int, dtype: torch.dtype, softcap: float) -> str | None:
        return None

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """Every sequence of the row is as long as the longest."""
        output: Tensor = _Counted.apply(query, key, value, longest, window, self.recording)  # type: ignore[no-untyped-call]
        return output

    def cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        active: ActiveRows,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        cached = min(self.recording.cached, window or self.recording.cached)
        read = 2.0 * cached * key.numel() * key.element_size() + 2 * _bytes([query, key])
        name = f"attention_cached {_shaped(query)} {_shaped(key)} at {cached}"
        self.recording.add(Call("attention", name, query.dtype, 4.0 * cached * query.numel(), read))
        return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, longest: int, window: int, recording: Recording
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.recording, ctx.call = recording, _packed_attention(query, key, longest, window, recording.sequence)
        recording.add(ctx.call)
        return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        ctx.recording.add(
            call._replace(
                name=call.name.replace("attention", "attention_backward"),
                flops=BACKWARD * call.flops,
                moved=2 * call.moved,
            )
        )
        return (*(torch.empty_like(x) for x in ctx.saved_tensors), None, None, None)


def _packed_attention(query: Tensor, key: Tensor, longest: int, window: int, sequence: int) -> Call:
    """Of ranks that share sequences each has whole sequences of its heads."""
    _, heads, rows, width = query.shape
    length = longest * sequence
    flops = attention_flops(rows // longest, length, heads * width, window) / sequence
    name = f"attention {_shaped(query)} {_shaped(key)} of {length}"
    return Call("attention", name, query.dtype, flops, 2.0 * _bytes([query, key]))


def attention_flops(sequences: int, length: int, width: int, window: int = 0) -> float:
    """FLOP of causal attention forward; width: of all heads of the queries; window: 0 for none."""
    seen = length * length / 2 if not 0 < window < length else window * (length - window / 2)
    return 4.0 * sequences * seen * width


def launches(function: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an op computes anything: one that allocates or returns a view does not."""
    if function.overloadpacket.__name__ in ALLOCATIONS or function.namespace == "prim":
        return False
    if function._schema.is_mutable:
        return any(x.numel() for x in _tensors((args, kwargs)))
    given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
    return any(x.numel() for x in _tensors(out) if x.untyped_storage()._cdata not in given)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of tensors, each once, and of one that is expanded what it is a view of."""
    found = {(x.untyped_storage()._cdata, x.storage_offset(), x.numel()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in found.values())


def _shaped(x: Any) -> Any:
    return Shape(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _frozen(tree: Any) -> Any:
    """Lists as tuples, so that it can be a key."""
    if isinstance(tree, Shape):
        return tree
    if isinstance(tree, dict):
        return {name: _frozen(x) for name, x in tree.items()}
    return tuple(_frozen(x) for x in tree) if isinstance(tree, list | tuple) else tree
