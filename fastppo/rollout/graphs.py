"""Decode steps as CUDA graphs.

A decode step is hundreds of short kernels, and launched one by one they leave a GPU idle between them. Recorded once
and replayed they are launched together. What a graph reads and writes must not move: the cache never does, the weights
stay where they are over a batch (`fastppo.models.sampling_weights`), and a step's inputs are copied to a
place of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.errors import log_once
from fastppo.models import ActiveRows, Cache, Policy

Run = Callable[[], Tensor]


class StepGraphs:
    """`policy.step` on one cache, recorded anew for each number of active rows; there are a few, as buckets are."""

    def __init__(self, policy: Policy, cache: Cache):
        self._policy, self._cache = policy, cache
        self._steps: dict[int, _Step | None] = {}  # None: it could not be recorded

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions (R,) int64, the cache's step having begun; hidden states (R, H), good until the next call.

        A step that cannot be recorded is launched kernel by kernel, and the log says why.
        """
        rows = len(tokens)
        if rows not in self._steps:
            self._steps[rows] = self._recorded(tokens, positions)
        step = self._steps[rows]
        return self._policy.step(tokens, positions, self._cache) if step is None else step(tokens, positions)

    def _recorded(self, tokens: Tensor, positions: Tensor) -> _Step | None:
        try:
            return _Step(self._policy, self._cache, tokens, positions)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log_once(f"sampling: decode steps cannot be recorded as a CUDA graph ({reason})", logging.WARNING)
            return None


class _Step:
    """The graph of a step of R rows, and the tensors that it reads: tokens, positions (R,), the cache's active rows."""

    def __init__(self, policy: Policy, cache: Cache, tokens: Tensor, positions: Tensor):
        assert cache.active is not None  # its step has begun
        self._cache = cache
        self._tokens, self._positions = tokens.clone(), positions.clone()
        self._active = cache.active = ActiveRows(*(x.clone() for x in cache.active))
        self._replay = record(lambda: policy.step(self._tokens, self._positions, cache))

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self._cache.active is not None
        now = (tokens, positions, *self._cache.active)
        for fixed, new in zip((self._tokens, self._positions, *self._active), now, strict=True):
            fixed.copy_(new)
        self._cache.active = self._active
        return self._replay()


def record(run: Run) -> Run:
    """A CUDA graph of what `run` does; calling it gives the very tensor that `run` returned, with new content.

    It runs once before: libraries choose their kernels and take their memory at first use, which no graph can hold. A
    decode step may be done twice, as it writes the same keys and values at the same positions.
    """
    now, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        run()
    now.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
