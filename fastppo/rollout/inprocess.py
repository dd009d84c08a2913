"""Sampling in the trainer's own process: one packed prefill, then decode at each row's own length.

A response depends on the seed, its prompt's stream and the model, and on nothing else: its random numbers come from
a counter-based generator, it attends to its own row of the cache alone, and the number of rows in a batch is one of
a few fixed sizes, never below four, because matrix products of one to three rows take another path and round
differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastppo import ops
from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout, pack, segment_offsets
from fastppo.distributed import World, stop
from fastppo.models import Cache, Policy, SampledModel, SamplingWeights, attention
from fastppo.rollout.graphs import StepGraphs

Response = tuple[list[int], list[float], bool]  # tokens, their logprobs, whether it ended by itself

BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


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
    responses: list[Response] = []
    with torch.no_grad():
        for start in range(0, len(prompts), config.rows):
            group = prompts.select(range(start, min(start + config.rows, len(prompts))))
            responses += _Decoding(policy, group, config, stop_ids, seed).run()
    policy.train(was_training)
    packed = pack([(*p, *r[0]) for p, r in zip(prompts.tokens, responses, strict=True)], [len(r[0]) for r in responses])
    logprobs = torch.tensor([x for r in responses for x in r[1]], dtype=torch.float32)
    ended = torch.tensor([r[2] for r in responses], dtype=torch.bool)
    return Rollout(packed, logprobs, ended, prompts.sources)


class _Decoding:
    """A group of prompts on its way to responses. Rows beyond the group fill the bucket and are thrown away."""

    def __init__(
        self,
        policy: Policy,
        group: Prompts,
        config: SamplingConfig,
        stop_ids: Sequence[int],
        seed: int,
    ):
        self.policy, self.group, self.config, self.seed = policy, group, config, seed
        device = policy.device
        self.rows = bucket(len(group))
        filled = [min(i, len(group) - 1) for i in range(self.rows)]
        self.prompts = [group.tokens[i] for i in filled]
        self.streams = group.streams[filled].to(device)  # (rows,)
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=device)
        self.active = torch.arange(self.rows, device=device)
        self.ended = torch.arange(self.rows, device=device) >= len(group)  # (rows,) bool; the fillers from the start
        length = max(map(len, self.prompts)) + config.max_new_tokens
        self.cache = Cache(policy.model.config.get_text_config(), self.rows, length, policy.model.dtype, device)
        recorded = config.cuda_graphs and attention.decodes_without_sync(policy.model)
        self.graphs = StepGraphs(policy, self.cache) if recorded else None
        self.tokens = torch.zeros(self.rows, config.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(self.rows, config.max_new_tokens, device=device)
        self.lengths = torch.full((self.rows,), config.max_new_tokens, device=device)

    def run(self) -> list[Response]:
        hidden = self._prefill()
        for position in range(self.config.max_new_tokens):
            stop.check_alone()
            newest = self._draw(self.policy.head(hidden), position)
            if position + 1 == self.config.max_new_tokens or not self._shrink():
                break
            hidden = self._step(newest)
        return self._responses()

    def _prefill(self) -> Tensor:
        """Hidden states (rows, H) of each prompt's last token."""
        lengths = [len(p) for p in self.prompts]
        tokens = torch.tensor([t for p in self.prompts for t in p], device=self.policy.device)
        counts = torch.tensor(lengths, device=self.policy.device)
        self.cache.begin_prefill(lengths)
        hidden = self.policy.prefill(tokens, segment_offsets(counts), self.cache)
        self.cache.begin_decode()
        return hidden[counts.cumsum(0) - 1]

    def _step(self, newest: Tensor) -> Tensor:
        """newest (rows,) int64, the token drawn last in every row; hidden states (active, H)."""
        self.cache.begin_step(self.active)
        tokens, positions = newest[self.active], self.cache.lengths[self.active]
        if self.graphs is None:
            hidden = self.policy.step(tokens, positions, self.cache)
        else:
            hidden = self.graphs(tokens, positions)
        self.cache.end_step()
        return hidden

    def _draw(self, logits: Tensor, position: int) -> Tensor:
        """logits (active, V) -> tokens (rows,), those of rows at rest being old; notes which rows have ended."""
        if position < self.config.min_new_tokens and len(self.stop_ids):
            logits = logits.index_fill(1, self.stop_ids, float("-inf"))
        logits = restrict(logits, self.config.temperature, self.config.top_k, self.config.top_p)
        stream = self.streams[self.active]
        tokens, logprobs = ops.sample_tokens(
            logits,
            temperature=self.config.temperature,
            seed=self.seed,
            stream=stream,
            offset=torch.full_like(stream, position),
        )
        running = ~self.ended[self.active]
        at = self.active[running]
        self.tokens[at, position], self.logprobs[at, position] = tokens[running], logprobs[running]
        ending = at[torch.isin(tokens[running], self.stop_ids)]
        self.lengths[ending] = position + 1
        self.ended[ending] = True
        return self.tokens[:, position]

    def _shrink(self) -> bool:
        """Let rows that have ended leave the batch once a smaller bucket holds the others; False if none is left."""
        running = ~self.ended[self.active]
        count = int(running.sum())
        size = bucket(count)
        if count > 0 and size < len(self.active):
            order = torch.argsort(~running, stable=True)  # the running rows first, then fillers
            self.active = self.active[order[:size]].sort().values
        return count > 0

    def _responses(self) -> list[Response]:
        count = len(self.group)
        tokens, logprobs = self.tokens[:count].tolist(), self.logprobs[:count].tolist()
        lengths, ended = self.lengths[:count].tolist(), self.ended[:count].tolist()
        return [(t[:n], p[:n], e) for t, p, n, e in zip(tokens, logprobs, lengths, ended, strict=True)]


def restrict(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits (R, V) with -inf outside the k most likely tokens and outside the nucleus (Holtzman et al., 2020).

    The nucleus is the smallest set of most likely tokens whose probability, at this temperature and after top_k,
    reaches `top_p`; the most likely token is always in it. Of equally likely tokens the first come first, and top_k
    keeps all that are as likely as the k-th. Probabilities and their sums are fp64: in fp32 the sums of 150,000 are off
    by hundreds of tokens' worth.
    """
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().div_(temperature).softmax(-1)
        outside = probabilities.cumsum(-1).sub_(probabilities) >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return logits


def bucket(rows: int) -> int:
    """The fixed batch size that holds so many rows."""
    for size in BUCKETS:
        if rows <= size:
            return size
    return -(-rows // 256) * 256
