"""The rows in which responses grow: what the device knows of each, and the step that takes all of them a token further.

Nothing in a step depends on a number that the host would have to read first, so that it can be recorded as a CUDA
graph, head, draw and all. A row whose response is complete goes on as it is until the host looks: it computes its
newest position again, and what it draws is written behind the end of its response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.models import Cache, Policy
from fastppo.rollout.graphs import StepGraphs

BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Recorded steps from one look for complete responses to the next. At a look the host waits for the GPU, and then the
# GPU for the host; until then a row whose response is complete is idle, for 3.5 steps on average.
STEPS_UNREAD = 8


class Decoder:
    """Rows, their cache, and where their steps are recorded the graphs."""

    def __init__(
        self,
        policy: Policy,
        rows: int,
        length: int,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        *,
        recorded: bool,
    ):
        """rows: how many there are; length: positions of each, the prompt's and those of a whole response."""
        device = policy.device
        self.policy, self._sampling, self._seed = policy, sampling, 0
        self.cache = Cache(policy.model.config.get_text_config(), rows, length, policy.model.dtype, device)
        self._stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=device)
        self._graphs = StepGraphs() if recorded else None
        # Of the response in each row, (rows,) each: its stream, its number of tokens, the newest of them; whether it is
        # complete, as it is where there is none, and whether it ended by itself.
        self.streams, self.counts, self.newest = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.complete = torch.ones(rows, dtype=torch.bool, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        # The number of tokens with which it is complete, if no stop token came before; (rows,).
        self.limits = torch.zeros(rows, dtype=torch.int64, device=device)
        # Its tokens and their logprobs, (rows, max_new_tokens + 1): the last place is behind the longest response.
        self.tokens = torch.zeros(rows, sampling.max_new_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, sampling.max_new_tokens + 1, device=device)

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def length(self) -> int:
        return self.cache.keys.shape[3]

    @property
    def recorded(self) -> bool:
        return self._graphs is not None

    @property
    def steps_unread(self) -> int:
        """Steps after which the host is to look. A look costs little where each kernel is launched on its own."""
        return STEPS_UNREAD if self.recorded else 1

    def begin(self, sampling: SamplingConfig, seed: int, longest: int) -> None:
        """Another batch: how its tokens are drawn, and the positions that its longest row may need."""
        self._sampling, self._seed = sampling, seed
        self.cache.longest = longest
        self.cache.lengths.zero_()
        self.counts.zero_()
        self.complete.fill_(True)
        if self._graphs is not None:
            model = self.policy
            reads = (*model.parameters(), *model.buffers(), *self.cache.states())
            self._graphs.use((sampling, seed), reads)

    def start(self, at: Tensor, streams: Tensor, hidden: Tensor, counts: Tensor, limits: Tensor) -> None:
        """The rows `at` (R,) int64 begin to write for these streams (R,), behind `counts` (R,) tokens of their
        responses and up to `limits` (R,): the first is drawn from the hidden state (R, H) of the token before it."""
        self.streams[at] = streams
        self.counts[at], self.limits[at] = counts, limits
        self.complete[at] = False
        self._draw(at, hidden)

    def step(self, at: Tensor) -> None:
        """The responses in the rows `at`, (a bucket,) int64, get another token where they are not complete."""
        if self._graphs is None:
            self._step(at)
        else:
            self._graphs(self._step, at)

    def clear(self, at: Tensor) -> None:
        """The rows `at` (R,) int64 hold no response any more: attention in them need not read what is left."""
        self.counts[at] = 0
        self.cache.lengths[at] = 0

    def _step(self, at: Tensor) -> None:
        self.cache.begin_step(at)
        hidden = self.policy.step(self.newest[at], self.cache.lengths[at], self.cache)
        self._draw(at, hidden)
        self.cache.end_step(~self.complete[at])

    def _draw(self, at: Tensor, hidden: Tensor) -> None:
        """Draw a token for each of these rows from its hidden state (R, H), and write it down."""
        missing = bucket(len(at)) - len(at)
        filled = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        logits = self.policy.head(filled)[: len(at)]  # (R, V)
        position, growing = self.counts[at], ~self.complete[at]
        tokens, logprobs = self._drawn(logits, self.streams[at], position)
        self.tokens[at, position], self.logprobs[at, position] = tokens, logprobs
        self.newest[at] = tokens
        stops = (tokens[:, None] == self._stop_ids).any(-1)  # torch.isin may sort, and then the host has to wait
        self.ended[at] = torch.where(growing, stops, self.ended[at])
        self.complete[at] = ~growing | stops | (position + 1 >= self.limits[at])
        self.counts[at] = position + growing

    def _drawn(self, logits: Tensor, stream: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """A token and its logprob for each row of logits (R, V), which may be written to."""
        config = self._sampling
        if config.min_new_tokens and len(self._stop_ids):
            early = position < config.min_new_tokens
            logits[:, self._stop_ids] = logits[:, self._stop_ids].masked_fill(early[:, None], float("-inf"))
        return ops.sample_tokens(
            logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=self._seed,
            stream=stream,
            offset=position,
        )


def bucket(rows: int) -> int:
    """The fixed batch size that holds so many rows."""
    for size in BUCKETS:
        if rows <= size:
            return size
    return -(-rows // 256) * 256
