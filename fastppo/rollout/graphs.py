"""Decode steps as CUDA graphs.

A decode step is hundreds of short kernels, and launched one by one they leave a GPU idle between them. Recorded once
and replayed they are launched together, and the host has nothing else to do. What a graph reads and writes must not
move: steps are recorded anew once a weight or the cache has another address than before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastppo.errors import log_once

Run = Callable[[], None]
Step = Callable[[Tensor], None]

WAYS = 2  # to draw, whose steps are kept: that of training and that of evaluation


class CannotRecordError(Exception):
    """The step ran, but it is one that no graph can hold."""


class StepGraphs:
    """A step on some rows, recorded once for each number of rows; there are a few, as buckets are.

    Constants of a step, such as the temperature, are in its graphs: `use` says which are meant. All graphs share one
    pool of memory, as no result of a step but those in tensors from outside is read after it. It is held while they
    are: the logits and the like of the largest step.
    """

    def __init__(self) -> None:
        self._ways: dict[Hashable, dict[int, _Recorded | None]] = {}  # None: it could not be recorded
        self._steps: dict[int, _Recorded | None] = {}
        self._addresses: list[int] = []
        self._pool = cache(torch.cuda.graph_pool_handle)

    def use(self, way: Hashable, reads: Iterable[Tensor]) -> None:
        """The steps that follow draw in this way; `reads`: all tensors from outside, which have the same addresses
        until the next call."""
        addresses = [x.data_ptr() for x in reads]
        if addresses != self._addresses:
            self._ways, self._addresses, self._pool = {}, addresses, cache(torch.cuda.graph_pool_handle)
        self._steps = self._ways.pop(way, {})
        self._ways[way] = self._steps  # the newest is last
        while len(self._ways) > WAYS:
            del self._ways[next(iter(self._ways))]

    def __call__(self, step: Step, rows: Tensor) -> None:
        """`step(rows)`, once; rows (R,) int64, whose content does not change.

        A step that cannot be recorded is launched kernel by kernel, and the log says why.
        """
        count = len(rows)
        if count not in self._steps:
            self._steps[count] = self._recorded(step, rows)
        elif (recorded := self._steps[count]) is not None:
            recorded(rows)
        else:
            step(rows)

    def _recorded(self, step: Step, rows: Tensor) -> _Recorded | None:
        try:
            return _Recorded(step, rows, self._pool)
        except CannotRecordError as error:
            log_once(f"sampling: decode steps cannot be recorded as a CUDA graph ({error})", logging.WARNING)
            return None


class _Recorded:
    """The graph of a step, and the tensor of rows that it reads. It is made by doing the step."""

    def __init__(self, step: Step, rows: Tensor, pool: Callable[[], Any]):
        self._rows, self._given = rows.clone(), rows
        self._replay = record(lambda: step(self._rows), pool)

    def __call__(self, rows: Tensor) -> None:
        if rows is not self._given:
            self._rows.copy_(rows)
            self._given = rows
        self._replay()


def record(run: Run, pool: Callable[[], Any]) -> Run:
    """Do what `run` does, once, and return what does it again: a CUDA graph. Raises CannotRecordError, having done it.

    It runs outside of the graph at first: libraries choose their kernels and take their memory at first use, which no
    graph can hold. Recording it computes nothing. `pool()`: the memory of its graphs.
    """
    now, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        run()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as NCCL's watchdog, may ask the GPU something meanwhile.
        with torch.cuda.graph(graph, pool=pool(), capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        raise CannotRecordError(str(error).splitlines()[0]) from error
    return graph.replay
