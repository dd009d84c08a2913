"""Sampling in the trainer's own process: packed prefill, decode at each row's own length, rows refilled as they end.

A response depends on the seed, its prompt's stream and the model, and on nothing else: its random numbers come from
a counter-based generator, it attends to its own row of the cache alone, and the number of rows in a batch is one of
a few fixed sizes, never below four, because matrix products of one to three rows take another path and round
differently. So do those of up to eleven rows on some numbers of threads, if they are not four or eight: a prefill is of
sixteen tokens or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout, pack, segment_offsets
from fastppo.distributed import World, stop
from fastppo.models import Cache, Policy, SampledModel, SamplingWeights, attention
from fastppo.rollout.graphs import StepGraphs

Response = tuple[list[int], list[float], bool]  # tokens, their logprobs, whether it ended by itself

BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FEWEST_TOKENS = 16  # of a prefill; shorter prompts are computed several times


class InProcess:
    """The reference of all engines: the actor's own module, or at ZeRO stage 3 a copy of it."""

    def __init__(self, weights: SamplingWeights, sampling: SamplingConfig, stop_ids: Sequence[int]):
        self._weights, self._sampling, self._stop_ids = weights, sampling, stop_ids
        self._policy: Policy | None = None

    def sync(self) -> None:
        self._policy = self._weights.gather()

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        assert self._policy is not None, "sync() comes first"
        sampling = replace(self._sampling, temperature=temperature)
        return sample(self._policy, prompts, sampling, stop_ids=self._stop_ids, seed=seed)


def make_inprocess(config: ResponseSettings, roles: SampledModel, stop_ids: Sequence[int], world: World) -> InProcess:
    return InProcess(roles.sampling_weights, config.sampling, stop_ids)


def sample(policy: Policy, prompts: Prompts, config: SamplingConfig, *, stop_ids: Sequence[int], seed: int) -> Rollout:
    """One response of 1 to `max_new_tokens` tokens to each prompt, the stop token included; on the CPU.

    To be called within `stop.together`: ranks do not wait for each other in here, and one may leave alone.
    """
    was_training = policy.training
    policy.eval()
    with torch.no_grad():
        responses = _Decoding(policy, prompts, config, stop_ids, seed).run() if len(prompts) else []
    policy.train(was_training)
    packed = pack([(*p, *r[0]) for p, r in zip(prompts.tokens, responses, strict=True)], [len(r[0]) for r in responses])
    logprobs = torch.tensor([x for r in responses for x in r[1]], dtype=torch.float32)
    ended = torch.tensor([r[2] for r in responses], dtype=torch.bool)
    return Rollout(packed, logprobs, ended, prompts.sources)


@dataclass(frozen=True)
class _Computed:
    """A prompt that has been computed."""

    prompt: tuple[int, ...]
    row: int  # of the cache, that holds its keys and values
    state: Tensor  # (H,), the hidden state of its last token


class _Decoding:
    """Prompts on their way to responses, through a fixed number of rows.

    A row whose response is complete takes the next prompt at once. Consecutive equal prompts, the n samples of one, are
    computed once, and further rows copy keys and values. Prompts are taken in order, so only the newest can have
    samples left, and its row stays as it is until another prompt takes a row. Once no prompt is left, rows without a
    response fill the bucket; what they compute is thrown away.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        config: SamplingConfig,
        stop_ids: Sequence[int],
        seed: int,
    ):
        self.policy, self.prompts, self.config, self.seed = policy, prompts, config, seed
        self.device, rows = policy.device, bucket(min(len(prompts), config.rows))
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=self.device)
        length = max(map(len, prompts.tokens)) + config.max_new_tokens
        self.cache = Cache(policy.model.config.get_text_config(), rows, length, policy.model.dtype, self.device)
        recorded = config.cuda_graphs and attention.decodes_without_sync(policy.model)
        self.graphs = StepGraphs(policy, self.cache) if recorded else None

        self.due = 0  # the first response without a row
        self.running: dict[int, int] = {}  # row -> its response
        self.free = list(range(rows))
        self.batch = list(range(rows))  # the rows that are decoded together
        self.active = torch.tensor(self.batch, device=self.device)  # the same, (active,) int64
        self.newest: _Computed | None = None
        self.responses: list[Response] = [([], [], False)] * len(prompts)

        # Of the response in each row: its stream, its number of tokens, these and their logprobs.
        self.streams, self.counts = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(rows, config.max_new_tokens, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(rows, config.max_new_tokens, device=self.device)

    def run(self) -> list[Response]:
        while True:
            stop.check_alone()
            if self.free and self.due < len(self.prompts):
                self._start()
            elif self.running:
                self._continue()
            else:
                return self.responses

    def _start(self) -> None:
        """Give the free rows the responses that are due, and draw the first token of each."""
        count = min(len(self.free), len(self.prompts) - self.due)
        rows, self.free = self.free[:count], self.free[count:]
        due = range(self.due, self.due + count)
        self.due += count
        self.running |= zip(rows, due, strict=True)
        at = torch.tensor(rows, device=self.device)
        self.streams[at] = self.prompts.streams[due.start : due.stop].to(self.device)
        self._draw(rows, at, self._prefill(rows, [self.prompts.tokens[i] for i in due]))

    def _prefill(self, rows: list[int], prompts: list[tuple[int, ...]]) -> Tensor:
        """Let each of these rows of the cache hold its prompt; hidden states (R, H) of the prompts' last tokens."""
        takers = [
            (prompt, [row for row, _ in group])
            for prompt, group in groupby(zip(rows, prompts, strict=True), itemgetter(1))
        ]
        known = [self.newest] if self.newest is not None and self.newest.prompt == prompts[0] else []
        for computed in known:  # copied first: a new prompt may take its row
            self._copy(computed, takers[0][1])
        new = self._compute([(prompt, own[0]) for prompt, own in takers[len(known) :]])
        for computed, (_, own) in zip(new, takers[len(known) :], strict=True):
            self._copy(computed, own)
        self.newest = (known + new)[-1]
        return torch.stack([one.state for one, (_, own) in zip(known + new, takers, strict=True) for _ in own])

    def _copy(self, computed: _Computed, rows: list[int]) -> None:
        for row in rows:
            self.cache.copy_row(computed.row, row, len(computed.prompt))

    def _compute(self, prompts: list[tuple[tuple[int, ...], int]]) -> list[_Computed]:
        """Compute prompts, each into its row."""
        if not prompts:
            return []
        packed = [prompt for prompt, _ in prompts]
        missing = FEWEST_TOKENS - sum(map(len, packed))
        packed += packed[-1:] * max(0, -(-missing // len(packed[-1])))
        tokens = torch.tensor([token for prompt in packed for token in prompt], device=self.device)
        counts = torch.tensor([len(prompt) for prompt in packed], device=self.device)
        self.cache.begin_prefill([len(prompt) for prompt in packed], [row for _, row in prompts])
        hidden = self.policy.prefill(tokens, segment_offsets(counts), self.cache)
        self.cache.begin_decode()
        states = hidden[counts.cumsum(0) - 1]
        return [_Computed(prompt, row, state) for (prompt, row), state in zip(prompts, states, strict=False)]

    def _continue(self) -> None:
        """Draw the next token of every response that has a row, after a decode step."""
        size = bucket(len(self.running))
        if size < len(self.batch):
            self.batch = sorted([*self.running, *self.free][:size])
            self.active = torch.tensor(self.batch, device=self.device)
        self.cache.begin_step(self.active)
        newest = self.tokens[self.active, self.counts[self.active] - 1]  # any token in rows without a response
        positions = self.cache.lengths[self.active]
        if self.graphs is None:
            hidden = self.policy.step(newest, positions, self.cache)
        else:
            hidden = self.graphs(newest, positions)
        self.cache.end_step()
        self._draw(self.batch, self.active, hidden)

    def _draw(self, rows: list[int], at: Tensor, hidden: Tensor) -> None:
        """Draw a token for each of these rows, (R,) int64 in `at`, from its hidden state (R, H)."""
        filled = F.pad(hidden, (0, 0, 0, bucket(len(rows)) - len(rows)))
        logits = self.policy.head(filled)[: len(rows)]  # (R, V)
        position, stream = self.counts[at], self.streams[at]
        if self.config.min_new_tokens and len(self.stop_ids):
            early = position < self.config.min_new_tokens
            logits[:, self.stop_ids] = logits[:, self.stop_ids].masked_fill(early[:, None], float("-inf"))
        tokens, logprobs = ops.sample_tokens(
            logits,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            seed=self.seed,
            stream=stream,
            offset=position,
        )
        self.tokens[at, position], self.logprobs[at, position] = tokens, logprobs
        self.counts[at] = position + 1
        ended = torch.isin(tokens, self.stop_ids)
        complete = ended | (position + 1 == self.config.max_new_tokens)
        found = zip(rows, *torch.stack([complete, ended]).tolist(), strict=True)
        self._keep({row: end for row, whole, end in found if whole and row in self.running})

    def _keep(self, complete: dict[int, bool]) -> None:
        """Take complete responses from their rows; complete: row -> whether its response ended by itself.

        The rows are then empty, so that they have places for as many steps as the others can still take.
        """
        if not complete:
            return
        at = torch.tensor(list(complete), device=self.device)
        tokens, logprobs, counts = (x[at].tolist() for x in (self.tokens, self.logprobs, self.counts))
        for row, t, p, n in zip(complete, tokens, logprobs, counts, strict=True):
            self.responses[self.running.pop(row)] = (t[:n], p[:n], complete[row])
        self.free += complete
        self.counts[at] = 0
        self.cache.lengths[at] = 0


def bucket(rows: int) -> int:
    """The fixed batch size that holds so many rows."""
    for size in BUCKETS:
        if rows <= size:
            return size
    return -(-rows // 256) * 256
