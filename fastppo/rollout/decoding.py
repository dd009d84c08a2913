"""Prompts on their way to responses, through the rows of a `Decoder`: prefill, decode, and what the host does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.data import Prompts, segment_offsets
from fastppo.distributed import stop, to_device
from fastppo.rollout.decoder import Decoder, bucket

# The tokens that are new in a response, their logprobs, whether it ended by itself.
Response = tuple[list[int], list[float], bool]

T = TypeVar("T")

FEWEST_TOKENS = 16  # of a prefill or an extension; what is shorter is computed several times


@dataclass(frozen=True)
class Computed:
    """A prompt that has been computed, with what there was of its response."""

    prompt: tuple[int, ...]
    row: int  # of the cache, that holds its keys and values
    state: Tensor  # (H,), the hidden state of its last token


class Decoding:
    """Prompts on their way to responses, through a fixed number of rows.

    A row whose response is complete takes the next prompt as soon as the host sees it: it looks after each prefill and
    after every few decode steps. Consecutive equal prompts, the n samples of one, are computed once, and further rows
    copy keys and values. Prompts are taken in order, so only the newest can have samples left, and its row stays as it
    is until another prompt takes a row. Once no prompt is left, rows without a response fill the bucket; what they
    compute is thrown away.

    A response that was begun before goes on behind a prefill of prompt and response: it has the random numbers that it
    would have had then.
    """

    def __init__(self, decoder: Decoder, prompts: Prompts, config: SamplingConfig, seed: int):
        self.decoder, self.prompts, self.device = decoder, prompts, decoder.policy.device
        self.longest_response, self.prefixes = config.max_new_tokens, prompts.tokens_so_far
        # Tokens of each response before what is being written.
        self.before = [len(whole) - len(own) for whole, own in zip(self.prefixes, prompts.tokens, strict=True)]
        rows, longest = space(prompts, config)
        decoder.begin(config, seed, longest)
        self.due = 0  # the first response without a row
        self.running: dict[int, int] = {}  # row -> its response
        self.free = list(range(rows))
        self.batch = list(range(rows))  # the rows that are decoded together
        self.active = torch.tensor(self.batch, device=self.device)  # the same, (active,) int64
        self.unread = 0  # steps since the host looked
        self.newest: Computed | None = None
        self.responses: list[Response] = [([], [], False)] * len(prompts)

    def run(self) -> list[Response]:
        while self.advance():
            stop.check_alone()
        return self.responses

    def advance(self) -> bool:
        """Begin what there is room for, or draw a token of what has begun; False if there is nothing to do."""
        if self.free and self.due < len(self.prompts):
            self._start()
            self.take()
        elif self.running:
            self._step()
            if self.unread == self.decoder.steps_unread:
                self.take()
        return bool(self.running or self.due < len(self.prompts))

    def limit(self, response: int) -> int:
        """The number of tokens up to which a response that begins is written, if no stop token comes before."""
        by = self.prompts.extend_by
        return self.longest_response if by is None else min(self.before[response] + by, self.longest_response)

    def completed(
        self, rows: list[int], tokens: list[list[int]], logprobs: list[list[float]], ended: list[bool]
    ) -> None:
        """Take what these rows have written, which are no longer running: the tokens of each response by their
        places, of which those before what it began behind are not there."""
        for row, written, of_written, has_ended in zip(rows, tokens, logprobs, ended, strict=True):
            response = self.running.pop(row)
            before = self.before[response]
            self.responses[response] = written[before:], of_written[before:], has_ended
        self.release(rows)

    def release(self, rows: list[int]) -> None:
        """These rows may take other responses."""
        self.decoder.clear(self.on_device(rows))
        self.free += rows

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.device)

    def _start(self) -> None:
        """Give the free rows the responses that are due, and draw the first token of each."""
        count = min(len(self.free), len(self.prompts) - self.due)
        rows, self.free = self.free[:count], self.free[count:]
        due = range(self.due, self.due + count)
        self.due += count
        self.running |= zip(rows, due, strict=True)
        states = self._prefill(rows, [self.prefixes[i] for i in due])
        self.begin(rows, list(due), states, [self.before[i] for i in due], [self.limit(i) for i in due])

    def begin(
        self, rows: list[int], responses: list[int], states: Tensor, counts: Sequence[int], limits: Sequence[int]
    ) -> None:
        """Let rows write on these responses, behind `counts` tokens of each and up to `limits`; states (R, H): the
        hidden states of the tokens before."""
        streams = to_device(self.prompts.streams[responses], self.device)
        self.decoder.start(self.on_device(rows), streams, states, self.on_device(counts), self.on_device(limits))

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

    def _copy(self, computed: Computed, rows: list[int]) -> None:
        self.decoder.cache.copy_row(computed.row, rows, len(computed.prompt))

    def _compute(self, prompts: list[tuple[tuple[int, ...], int]]) -> list[Computed]:
        """Compute prompts, each into its row."""
        passes = self.passes(prompts, lambda one: len(one[0]))
        return [computed for part in passes for computed in self._compute_at_once(part)]

    def passes(self, items: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
        """Parts of the items for a pass each: of as many tokens as whole rows of prompts have, or of one item. So what
        has begun, or is extended, needs no more memory to be computed than what begins. size: tokens of an item."""
        most, part = self.decoder.rows * max(map(len, self.prompts.tokens)), list[T]()
        for one in items:
            if part and sum(map(size, (*part, one))) > most:
                yield part
                part = []
            part.append(one)
        if part:
            yield part

    def _compute_at_once(self, prompts: list[tuple[tuple[int, ...], int]]) -> list[Computed]:
        packed = [prompt for prompt, _ in prompts]
        missing = FEWEST_TOKENS - sum(map(len, packed))
        packed += packed[-1:] * max(0, -(-missing // len(packed[-1])))
        self.decoder.cache.begin_prefill([len(prompt) for prompt in packed], [row for _, row in prompts])
        states = self.prefill(packed, [0] * len(packed))
        return [Computed(prompt, row, state) for (prompt, row), state in zip(prompts, states, strict=False)]

    def prefill(self, packed: Sequence[Sequence[int]], before: Sequence[int]) -> Tensor:
        """Compute tokens that the cache has been told of, behind `before` positions of their rows; hidden states (R, H)
        of the last of each."""
        counts = torch.tensor([len(tokens) for tokens in packed])
        positions = segment_offsets(counts) + torch.tensor(before).repeat_interleave(counts)
        tokens = self.on_device([token for tokens in packed for token in tokens])
        cache = self.decoder.cache
        hidden = self.decoder.policy.prefill(tokens, to_device(positions, self.device), cache)
        cache.begin_decode()
        return hidden[to_device(counts.cumsum(0) - 1, self.device)]

    def _step(self) -> None:
        """Draw the next token of every response that has a row."""
        size = bucket(len(self.running))
        if size < len(self.batch) or not self.running.keys() <= {*self.batch}:
            others = (row for row in range(self.decoder.rows) if row not in self.running)
            self.batch = sorted([*self.running, *others][:size])
            self.active = self.on_device(self.batch)
        self.decoder.step(self.active)
        self.unread += 1

    def take(self) -> None:
        """Take what is complete from its rows. Here alone the host waits for the device."""
        self.unread, decoder = 0, self.decoder
        state = torch.stack([decoder.complete.long(), decoder.ended.long(), decoder.counts])
        complete, ended, counts = state.tolist()
        rows = [row for row in self.running if complete[row]]
        if not rows:
            return
        at = self.on_device(rows)
        tokens, logprobs = (x[at].tolist() for x in (decoder.tokens, decoder.logprobs))
        self.completed(
            rows,
            [t[: counts[row]] for row, t in zip(rows, tokens, strict=True)],
            [p[: counts[row]] for row, p in zip(rows, logprobs, strict=True)],
            [bool(ended[row]) for row in rows],
        )


def space(prompts: Prompts, config: SamplingConfig) -> tuple[int, int]:
    """Rows, and positions of each, that these prompts and their responses need."""
    return bucket(min(len(prompts), config.settled_rows)), max(map(len, prompts.tokens)) + config.max_new_tokens
