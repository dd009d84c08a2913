"""Numbers of rows of which each rank of a group computes some: hidden states that predict tokens, or that are scored.

A head computes this rank's rows, and gives back the numbers of all: so an objective sees whole sequences, on each rank
of the group alike, whatever it makes of them. The gradient of a number flows to the rank that computed it. As each rank
has the gradient of its own rows alone, a sum of gradients over ranks counts each row once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.distributed import Neighbours
from fastppo.models.parallel.group import Split


@dataclass(frozen=True)
class Rows:
    """R rows in the order of tokens: those of a rank's tokens are the rank's."""

    group: Neighbours
    counts: tuple[int, ...]  # of each rank

    @staticmethod
    def of(tokens: Tensor, split: Split) -> Rows:
        """tokens: (R,) int64, ascending, on the host: which of the N tokens each row belongs to."""
        ends = torch.searchsorted(tokens, torch.tensor(split.bounds)).tolist()
        return Rows(split.group, tuple(end - start for start, end in pairwise(ends)))

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        start = sum(self.counts[: self.group.index])
        return slice(start, start + self.counts[self.group.index])

    def all(self, x: Tensor) -> Tensor:
        """The numbers of all rows, (R, ...), from those of this rank's, (r, ...); the gradient is that of own rows."""
        found: Tensor = _All.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.own = rows.own
        size, each = rows.group.size, math.prod(x.shape[1:])
        sent, received = [x.numel()] * size, [count * each for count in rows.counts]
        return rows.group.exchange(x.reshape(-1).repeat(size), sent, received).view(sum(rows.counts), *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None


_rows: Rows | None = None  # those that the objective which runs is about


@contextmanager
def computing(rows: Rows | None) -> Iterator[None]:
    """Within this context the heads have these rows; None: each rank has all rows."""
    global _rows
    rows_before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = rows_before


def own_rows(x: Tensor) -> Tensor:
    """This rank's part of numbers of all rows, (R, ...) -> (r, ...), a view."""
    return x if _rows is None else x[_rows.own]


def all_rows(x: Tensor) -> Tensor:
    """The numbers of all rows, (r, ...) -> (R, ...), with the gradient of own ones. All ranks of the group call it."""
    return x if _rows is None else _rows.all(x)


def all_columns(columns: Sequence[Tensor | None]) -> list[Any]:
    """`all_rows` of several numbers a row, (r,) each, of one dtype, in one exchange; None stays None."""
    if _rows is None:
        return list(columns)
    given = [x for x in columns if x is not None]
    whole = iter(_rows.all(torch.stack(given, dim=1)).unbind(1))
    found = [None if x is None else (x, next(whole)) for x in columns]
    return [None if pair is None else pair[1] if pair[0].requires_grad else pair[1].detach() for pair in found]
