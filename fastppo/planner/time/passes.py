"""The work of passes through a role's model, and of what the sampler does with it.

Three or four of its upper layers run on fake tensors, and two fewer; those beyond are the same again, half of the two
for each. Layers may alternate between two kinds, as every other layer is left out with its neighbour. All sequences of
a pass are as long as their mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from fastppo import ops
from fastppo.config import PPOConfig, ResponseSettings
from fastppo.models import Policy, SequenceLayout, attention
from fastppo.planner.footprint import Footprint, layers_cut, layers_in_graph
from fastppo.planner.time.work import CountedAttention, Recording, Work
from fastppo.rollout import Decoder

CPU = torch.device("cpu")  # of fake tensors; those of a GPU have the same shapes
STREAMED = 10**9  # a seed that no run has: the counts do not depend on it


class Sampling(NamedTuple):
    """The work of sampling, on one rank."""

    prefill: Work  # of prompts, with the first draw and copies of their rows
    step: Work  # of a decode step


class Passes:
    """Counts the passes of one role.

    sequence: ranks that share each sequence.
    """

    def __init__(self, size: Footprint, *, sequence: int = 1) -> None:
        self.size, self.sequence = size, sequence
        self.trained_depth = layers_in_graph(size.model)
        self._counted = cache(self._count)

    def forward(self, sequences: int, length: int, depth: int | None = None) -> Work:
        """The backbone without gradient, through its upper `depth` layers or all of them."""
        return self._extended(sequences, length, self.size.layers if depth is None else depth, gradient=False)

    def layer(self, sequences: int, length: int) -> Work:
        """One more layer forward, without gradient."""
        most = min(self.size.layers, self.least)
        fewer = max(most - 2, 1)
        if most == 1:
            return self._counted(1, sequences, length, False)
        more = self._counted(most, sequences, length, False) - self._counted(fewer, sequences, length, False)
        return 1 / (most - fewer) * more

    def learn(self, sequences: int, length: int, *, kept: bool, recomputed: int) -> Work:
        """Forward and backward. kept: whether the outputs of frozen lower layers are there already; recomputed: layers
        whose activations are computed once more."""
        depth = self.trained_depth
        if depth == 0:  # a head alone, on detached states
            return self.forward(sequences, length, 1 if kept else None)
        found = self._extended(sequences, length, depth, gradient=True)
        below = 0 if kept else self.size.layers - depth
        return found + (below + min(recomputed, depth)) * self.layer(sequences, length)

    @property
    def least(self) -> int:
        """Layers that are run, of a model with more."""
        return 3 if self.size.layers % 2 else 4

    def _extended(self, sequences: int, length: int, depth: int, *, gradient: bool) -> Work:
        found = self._counted(min(depth, self.least), sequences, length, gradient)
        if depth <= self.least:
            return found
        fewer = self._counted(self.least - 2, sequences, length, gradient)
        return found + (depth - self.least) / 2 * (found - fewer)

    def _count(self, layers: int, sequences: int, length: int, gradient: bool) -> Work:
        each = -(-length // self.sequence)
        with self._recording(layers, base=True) as (model, recording):
            ids = torch.zeros(1, sequences * each, dtype=torch.int64)
            with recording, torch.set_grad_enabled(gradient):
                layout = SequenceLayout.of([each] * sequences, CPU)
                output = model(input_ids=ids, position_ids=ids, packed=layout, use_cache=False)
                hidden = output.last_hidden_state
                if gradient and hidden.requires_grad:
                    hidden.backward(torch.zeros_like(hidden))
        return recording.work

    @contextmanager
    def _recording(self, layers: int, *, base: bool, cached: int = 0) -> Iterator[tuple[Any, Recording]]:
        """A copy of the model with its upper layers, or of the backbone, on fake tensors."""
        with layers_cut(self.size.model, layers):
            model: Any = copy.deepcopy(self.size.model.base_model if base else self.size.model)
        recording = Recording(cached=cached, sequence=self.sequence)
        before = attention.backend_in_use()
        if not self.size.on_cpu or self.sequence > 1:
            attention.compute_with(CountedAttention(recording))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
                yield model, recording
        finally:
            attention.compute_with(before)

    def sampler(self, config: ResponseSettings, rows: int, responses: int, prompt: int, new: int) -> Sampling:
        """So many responses that begin together, and a step of `rows` rows, at the mean length of a row."""
        depth, least = self.size.layers, self.least
        found = self._sampled(min(depth, least), config, rows, responses, prompt, new)
        if depth <= least:
            return found
        fewer = self._sampled(least - 2, config, rows, responses, prompt, new)
        return Sampling(*(x + (depth - least) / 2 * (x - y) for x, y in zip(found, fewer, strict=True)))

    def _sampled(
        self, layers: int, config: ResponseSettings, rows: int, responses: int, prompt: int, new: int
    ) -> Sampling:
        samples = config.sampling.samples_per_prompt
        found = []
        with self._recording(layers, base=False, cached=prompt + new // 2) as (model, recording):
            policy = Policy(model)
            decoder = Decoder(policy, rows, prompt + new, config.sampling, [0], recorded=False)
            decoder.begin(config.sampling, STREAMED, prompt + new)
            at, owners = torch.arange(responses), range(0, responses, samples)
            with unset_fake_temporarily():  # the places of tokens, whose number depends on values
                decoder.cache.begin_prefill([prompt] * len(owners), owners)
            tokens = torch.zeros(len(owners) * prompt, dtype=torch.int64)

            def prefill() -> None:
                hidden = policy.prefill(tokens, tokens, decoder.cache)
                decoder.cache.begin_decode()
                for owner in owners:
                    decoder.cache.copy_row(owner, range(owner, min(owner + samples, responses)), prompt)
                decoder.start(at, at, hidden.new_empty(responses, hidden.shape[-1]), at, at)

            with torch.no_grad():
                for work in (prefill, lambda: decoder.step(torch.arange(rows))):
                    recording.work = Work()
                    with recording:
                        work()
                    found.append(recording.work)
        return Sampling(*found)


def head_asks(size: Footprint, tokens: int, *, reference: bool = False) -> Work:
    """Logprobs of so many tokens from the vocabulary head, without gradient; with the reference's head beside it."""
    with _head(size, tokens) as (recording, hidden, weight, targets):
        other = (hidden, weight) if reference else (None, None)
        with recording:
            ops.CHUNKED["linear_logprobs"](hidden, weight, None, targets, *other, None, 1.0, None, _workspace(size))
    return recording.work


def head_learns(size: Footprint, tokens: int, ppo: PPOConfig | None) -> Work:
    """The loss of so many tokens and its gradient; ppo: None for logprobs of an offline method, whose gradient computes
    the logits once more."""
    fused = ppo is not None and ppo.loss_is_fused
    with _head(size, tokens) as (recording, hidden, weight, targets):
        reference = (hidden, weight) if ppo is not None and ppo.loss_reads_reference else (None, None)
        rows, wanted = torch.zeros(tokens), (True, size.head_trains, False)
        heads = (hidden, weight, None, targets)
        with recording:
            if fused:
                coefficients = (1.0, None, 0.2, 0.2, None, 0.0, 0.0, "exact")
                ops.CHUNKED["linear_policy_loss"](
                    *heads,
                    rows,
                    rows,
                    torch.ones(()),
                    None,
                    None,
                    *reference,
                    None,
                    *coefficients,
                    _workspace(size),
                    wanted,
                )
            else:
                asked = (*heads, *reference, None)
                ends = (1.0, None, _workspace(size))
                stats = ops.CHUNKED["linear_logprobs"](*asked, *ends)
                upstream = torch.zeros(4, tokens)
                ops.CHUNKED["linear_logprobs_backward"](*asked, stats, upstream, *ends, wanted)
    return recording.work


def value_work(size: Footprint, tokens: int, *, gradient: bool) -> Work:
    """A value or score head: it reads hidden states in fp32, and computes one number of each."""
    recording = Recording()
    with FakeTensorMode(), torch.set_grad_enabled(gradient), recording:
        hidden = torch.zeros(tokens, size.width, dtype=size.dtype, requires_grad=gradient)
        weight = torch.zeros(1, size.width, dtype=size.dtype, requires_grad=gradient)
        values = torch.nn.functional.linear(hidden.float(), weight.float()).squeeze(-1)
        if gradient:
            values.backward(torch.zeros_like(values))
    return recording.work


@contextmanager
def _head(size: Footprint, tokens: int) -> Iterator[tuple[Recording, Tensor, Tensor, Tensor]]:
    with FakeTensorMode():
        hidden = torch.empty(tokens, size.width, dtype=size.dtype)
        weight = torch.empty(size.vocabulary, size.width, dtype=size.dtype)
        yield Recording(), hidden, weight, torch.zeros(tokens, dtype=torch.int64)


def _workspace(size: Footprint) -> int:
    return ops.workspace_bytes(cpu=size.on_cpu)
