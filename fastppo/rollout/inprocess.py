"""Sampling in the trainer's own process: packed prefill, decode at each row's own length, rows refilled as they end.

A response depends on the seed, its prompt's stream and the model, and on nothing else: its random numbers come from
a counter-based generator, it attends to its own row of the cache alone, and the number of rows in a batch is one of
a few fixed sizes, never below four, because matrix products of one to three rows take another path and round
differently. So do those of up to eleven rows on some numbers of threads, if they are not four or eight: a prefill is of
sixteen tokens or more. In a mixture of experts it depends on the other rows by rounding, as the products of its experts
have rows of all responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout, pack, segment_offsets
from fastppo.distributed import World, stop, to_device
from fastppo.models import Policy, SampledModel, SamplingWeights, attention, joined_projections
from fastppo.rollout.decoder import Decoder, bucket

Response = tuple[list[int], list[float], bool]  # tokens, their logprobs, whether it ended by itself

FEWEST_TOKENS = 16  # of a prefill; shorter prompts are computed several times


class InProcess:
    """The reference of all engines: the actor's own module, or at ZeRO stage 3 a copy of it.

    Where decode steps are recorded, the cache and the graphs are kept from batch to batch. As a `Sleeper` it frees the
    cache meanwhile; if the allocator then gives it another place, steps are recorded anew.
    """

    def __init__(
        self, weights: SamplingWeights, sampling: SamplingConfig, stop_ids: Sequence[int], longest: int | None = None
    ):
        """longest: the most tokens of a prompt and its response, where that is known."""
        self._weights, self._sampling, self._stop_ids, self._longest = weights, sampling, stop_ids, longest
        self._policy: Policy | None = None
        self._decoder: Decoder | None = None

    def sync(self) -> None:
        self._policy = self._weights.gather()

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        assert self._policy is not None, "sync() comes first"
        sampling = replace(self._sampling, temperature=temperature)
        if not records(self._policy, sampling):
            self._decoder = None
        elif len(prompts):
            self._decoder = self._serving(self._policy, prompts)
        return sample(self._policy, prompts, sampling, stop_ids=self._stop_ids, seed=seed, decoder=self._decoder)

    def sleep(self) -> None:
        if self._decoder is not None:
            self._decoder.cache.free()

    def wake(self) -> None:
        if self._decoder is not None:
            self._decoder.cache.restore()

    def _serving(self, policy: Policy, prompts: Prompts) -> Decoder:
        """The decoder of the last batch, or a larger one."""
        rows, length = space(prompts, self._sampling)
        if (kept := self._decoder) is not None:
            if kept.policy is policy and kept.rows >= rows and kept.length >= length:
                return kept
            rows, length = max(rows, kept.rows), max(length, kept.length)
        self._decoder = kept = None  # its memory is free before the next takes its own
        length = max(length, min(roomy(length), self._longest or roomy(length)))
        return Decoder(policy, rows, length, self._sampling, self._stop_ids, recorded=True)


def make_inprocess(config: ResponseSettings, roles: SampledModel, stop_ids: Sequence[int], world: World) -> InProcess:
    longest = (config.data.first_tokens or config.data.max_prompt_tokens) + config.sampling.max_new_tokens
    return InProcess(roles.sampling_weights, config.sampling, stop_ids, longest)


def sample(
    policy: Policy,
    prompts: Prompts,
    config: SamplingConfig,
    *,
    stop_ids: Sequence[int],
    seed: int,
    decoder: Decoder | None = None,
) -> Rollout:
    """One response of 1 to `max_new_tokens` tokens to each prompt, the stop token included; on the CPU.

    decoder: of this policy and these stop ids, with space for the prompts; one is made where there is none. To be
    called within `stop.together`: ranks do not wait for each other in here, and one may leave alone.
    """
    was_training = policy.training
    policy.eval()
    responses: list[Response] = []
    if len(prompts):
        with torch.no_grad(), joined_projections(policy):
            if decoder is None:
                decoder = Decoder(policy, *space(prompts, config), config, stop_ids, recorded=records(policy, config))
            responses = _Decoding(decoder, prompts, config, seed).run()
    policy.train(was_training)
    packed = pack([(*p, *r[0]) for p, r in zip(prompts.tokens, responses, strict=True)], [len(r[0]) for r in responses])
    logprobs = torch.tensor([x for r in responses for x in r[1]], dtype=torch.float32)
    ended = torch.tensor([r[2] for r in responses], dtype=torch.bool)
    return Rollout(packed, logprobs, ended, prompts.sources)


def records(policy: Policy, config: SamplingConfig) -> bool:
    """Whether decode steps are recorded."""
    return config.cuda_graphs and attention.decodes_without_sync(policy.model)


def space(prompts: Prompts, config: SamplingConfig) -> tuple[int, int]:
    """Rows, and positions of each, that these prompts and their responses need."""
    return bucket(min(len(prompts), config.settled_rows)), max(map(len, prompts.tokens)) + config.max_new_tokens


def roomy(length: int) -> int:
    """At least so many positions, and at most a quarter more: a cache that is kept should seldom have to grow."""
    step = 1 << max(length.bit_length() - 3, 4)
    return -(-length // step) * step


@dataclass(frozen=True)
class _Computed:
    """A prompt that has been computed."""

    prompt: tuple[int, ...]
    row: int  # of the cache, that holds its keys and values
    state: Tensor  # (H,), the hidden state of its last token


class _Decoding:
    """Prompts on their way to responses, through a fixed number of rows.

    A row whose response is complete takes the next prompt as soon as the host sees it: it looks after each prefill and
    after every few decode steps. Consecutive equal prompts, the n samples of one, are computed once, and further rows
    copy keys and values. Prompts are taken in order, so only the newest can have samples left, and its row stays as it
    is until another prompt takes a row. Once no prompt is left, rows without a response fill the bucket; what they
    compute is thrown away.
    """

    def __init__(self, decoder: Decoder, prompts: Prompts, config: SamplingConfig, seed: int):
        self.decoder, self.prompts, self.device = decoder, prompts, decoder.policy.device
        rows, longest = space(prompts, config)
        decoder.begin(config, seed, longest)
        self.due = 0  # the first response without a row
        self.running: dict[int, int] = {}  # row -> its response
        self.free = list(range(rows))
        self.batch = list(range(rows))  # the rows that are decoded together
        self.active = torch.tensor(self.batch, device=self.device)  # the same, (active,) int64
        self.unread = 0  # steps since the host looked
        self.newest: _Computed | None = None
        self.responses: list[Response] = [([], [], False)] * len(prompts)

    def run(self) -> list[Response]:
        while True:
            stop.check_alone()
            if self.free and self.due < len(self.prompts):
                self._start()
                self._take()
            elif self.running:
                self._step()
                if self.unread == self.decoder.steps_unread:
                    self._take()
            else:
                return self.responses

    def _start(self) -> None:
        """Give the free rows the responses that are due, and draw the first token of each."""
        count = min(len(self.free), len(self.prompts) - self.due)
        rows, self.free = self.free[:count], self.free[count:]
        due = range(self.due, self.due + count)
        self.due += count
        self.running |= zip(rows, due, strict=True)
        states = self._prefill(rows, [self.prompts.tokens[i] for i in due])
        streams = to_device(self.prompts.streams[due.start : due.stop], self.device)
        self.decoder.start(to_device(torch.tensor(rows), self.device), streams, states)

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
        self.decoder.cache.copy_row(computed.row, rows, len(computed.prompt))

    def _compute(self, prompts: list[tuple[tuple[int, ...], int]]) -> list[_Computed]:
        """Compute prompts, each into its row."""
        if not prompts:
            return []
        packed = [prompt for prompt, _ in prompts]
        missing = FEWEST_TOKENS - sum(map(len, packed))
        packed += packed[-1:] * max(0, -(-missing // len(packed[-1])))
        tokens = torch.tensor([token for prompt in packed for token in prompt])
        counts = torch.tensor([len(prompt) for prompt in packed])
        tokens, positions, last = (
            to_device(x, self.device) for x in (tokens, segment_offsets(counts), counts.cumsum(0) - 1)
        )
        cache = self.decoder.cache
        cache.begin_prefill([len(prompt) for prompt in packed], [row for _, row in prompts])
        hidden = self.decoder.policy.prefill(tokens, positions, cache)
        cache.begin_decode()
        states = hidden[last]
        return [_Computed(prompt, row, state) for (prompt, row), state in zip(prompts, states, strict=False)]

    def _step(self) -> None:
        """Draw the next token of every response that has a row."""
        size = bucket(len(self.running))
        if size < len(self.batch):
            self.batch = sorted([*self.running, *self.free][:size])
            self.active = to_device(torch.tensor(self.batch), self.device)
        self.decoder.step(self.active)
        self.unread += 1

    def _take(self) -> None:
        """Take complete responses from their rows. Here alone the host waits for the device."""
        self.unread, decoder = 0, self.decoder
        state = torch.stack([decoder.complete.long(), decoder.ended.long(), decoder.counts])
        complete, ended, counts = state.tolist()
        rows = [row for row in self.running if complete[row]]
        if not rows:
            return
        at = to_device(torch.tensor(rows), self.device)
        tokens, logprobs = (x[at].tolist() for x in (decoder.tokens, decoder.logprobs))
        for row, t, p in zip(rows, tokens, logprobs, strict=True):
            self.responses[self.running.pop(row)] = (t[: counts[row]], p[: counts[row]], bool(ended[row]))
        decoder.clear(at)
        self.free += rows
