"""Decoding in which an environment answers each turn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.config import SamplingConfig
from fastppo.data import Prompts
from fastppo.environments import Conversations
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.decoding import FEWEST_TOKENS, Decoding

LONGEST_WAIT = 0.1  # seconds for an environment, until the run is asked again whether to stop


class _Waiting(NamedTuple):
    """A response whose environment is asked."""

    row: int  # of the cache, which it keeps
    cached: int  # positions of this row that are valid
    unread: tuple[int, ...]  # the newest tokens, which these do not hold


class _Observed(NamedTuple):
    """A response that goes on behind an observation."""

    response: int
    row: int
    cached: int
    tokens: tuple[int, ...]  # behind the valid positions of the row


class Conversing(Decoding):
    """Prompts on their way to conversations, through a fixed number of rows.

    A row whose turn is complete waits with its cache until the environment has answered, while others are decoded. What
    the row computes meanwhile, where it fills a bucket, lies behind its valid positions and is written over.
    """

    def __init__(
        self, decoder: Decoder, prompts: Prompts, config: SamplingConfig, seed: int, conversations: Conversations
    ):
        super().__init__(decoder, prompts, config, seed)
        self.conversations = conversations
        self.waiting: dict[int, _Waiting] = {}  # by response
        # Tokens that the policy may still write on each response in this call.
        self.left = [config.max_new_tokens if prompts.extend_by is None else prompts.extend_by] * len(prompts)

    def advance(self) -> bool:
        busy = bool(self.running or (self.free and self.due < len(self.prompts)))
        self._go_on(0.0 if busy else LONGEST_WAIT)
        return super().advance() or bool(self.waiting)

    def limit(self, response: int) -> int:
        return self.before[response] + min(self.conversations.limit(response), self.left[response])

    def completed(
        self, rows: list[int], tokens: list[list[int]], logprobs: list[list[float]], ended: list[bool]
    ) -> None:
        """Let the environment answer the turns that these rows have written; one that is not complete goes on at
        another time."""
        lengths, paused = self.decoder.cache.lengths[self.on_device(rows)].tolist(), []
        for row, written, of_written, has_ended, cached in zip(rows, tokens, logprobs, ended, lengths, strict=True):
            response = self.running.pop(row)
            new = slice(self.before[response], None)
            turn = written[new], of_written[new]
            self.left[response] -= len(turn[0])
            if has_ended or len(turn[0]) == self.conversations.limit(response):
                unread = written[cached - len(self.prompts.tokens[response]) :]
                self.waiting[response] = _Waiting(row, cached, tuple(unread))
                self.conversations.end_turn(response, *turn)
            else:
                self.conversations.pause(response, *turn)
                paused.append(row)
        if paused:
            self.release(paused)

    def _go_on(self, wait: float) -> None:
        """Begin the next turn where the environment has answered; wait: seconds for the first answer."""
        over, observed = [], []
        for response, observation in self.conversations.answered(wait) if self.waiting else ():
            row, cached, unread = self.waiting.pop(response)
            if observation is None:
                over.append(row)
            elif not self.left[response]:
                self.conversations.pause(response)
                over.append(row)
            else:
                observed.append(_Observed(response, row, cached, (*unread, *observation)))
        if over:
            self.release(over)
        if not observed:
            return
        parts = self.passes(observed, lambda one: len(one.tokens))
        states = torch.cat([self._extend(part) for part in parts])
        for one in observed:
            self.before[one.response] = one.cached + len(one.tokens) - len(self.prompts.tokens[one.response])
            self.running[one.row] = one.response
        responses = [one.response for one in observed]
        counts, limits = [self.before[i] for i in responses], [self.limit(i) for i in responses]
        self.begin([one.row for one in observed], responses, states, counts, limits)
        self.take()

    def _extend(self, observed: list[_Observed]) -> Tensor:
        """Write tokens behind what their rows hold; hidden states (R, H) of the last of each."""
        missing = FEWEST_TOKENS - sum(len(one.tokens) for one in observed)
        computed = observed + observed[-1:] * max(0, -(-missing // len(observed[-1].tokens)))
        tokens, before = [one.tokens for one in computed], [one.cached for one in computed]
        lengths, rows = [len(each) for each in tokens], [one.row for one in computed]
        self.decoder.cache.begin_extension(lengths, rows, before, len(observed))
        return self.prefill(tokens, before)[: len(observed)]
