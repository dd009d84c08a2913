"""Requests on their way to responses, through vLLM's engine.

Ranks that hold one copy of the model have the same requests, and must ask the same of it at the same step. They agree
on what only one of them knows, whether to stop and what an environment has answered, at fixed places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from fastppo.config import SamplingConfig
from fastppo.distributed import Neighbours, Stopped, stop
from fastppo.errors import FastPPOError
from fastppo.rollout.decoding import Response
from fastppo.rollout.vllm.refusals import explained

STEPS = 8  # tokens of each response between two times that ranks that sample together agree


class Request(NamedTuple):
    """A response that is wanted."""

    prompt: tuple[int, ...]
    stream: int
    limit: int  # of tokens in its first turn


@dataclass(frozen=True)
class Order:
    """What ranks that sample together want, and how it is drawn."""

    requests: Sequence[Request]  # of all of these ranks
    sampling: SamplingConfig  # at the temperature of this order
    stop_ids: Sequence[int]
    seed: int
    together: Neighbours


class Drawing:
    """Responses of one turn, all of which are asked for at once."""

    def __init__(self, vllm: Any, llm: Any, order: Order):
        """vllm: the module; llm: a `vllm.LLM` with the actor's weights."""
        self._vllm, self._llm, self._engine, self.order = vllm, llm, llm.llm_engine, order
        self.together = order.together
        self.sequences = [list(request.prompt) for request in order.requests]  # of each response all tokens so far
        self.turns = [0] * len(order.requests)  # that each has begun
        self.running: dict[str, int] = {}  # a request of vLLM's -> its response
        self.responses: list[Response] = [([], [], False)] * len(order.requests)
        self._stop_ids, self._names = sorted(set(order.stop_ids)), count()

    def run(self) -> list[Response]:
        """Draw all responses. Raises Stopped, and what an environment raises, on all ranks that sample together."""
        with self._explained("does not take the prompts"):
            self._llm.reset_prefix_cache()  # what was computed before would change how this is computed
        for response, request in enumerate(self.order.requests):
            self.begin(response, request.limit)
        steps = 0
        while not self.is_over:
            if self.together.size == 1 or not self.running or steps % STEPS == 0:
                self._agree()
            if self.running:
                self._step()
                steps += 1
        return self.responses

    @property
    def is_over(self) -> bool:
        return not self.running

    def begin(self, response: int, limit: int) -> None:
        """Ask for a turn of 1 to `limit` tokens behind all tokens so far, which vLLM's prefix cache may hold."""
        name, turn = f"{next(self._names)}", self.turns[response]
        params = self._params(request_seed(self.order.seed, self.order.requests[response].stream, turn), limit)
        with self._explained("does not take the prompts"):
            self._engine.add_request(name, {"prompt_token_ids": list(self.sequences[response])}, params)
        self.running[name] = response
        self.turns[response] += 1

    def completed(self, response: int, tokens: list[int], logprobs: list[float]) -> None:
        """Take what was written; nothing is asked for this response any more."""
        self.responses[response] = (tokens, logprobs, tokens[-1] in self._stop_ids)

    def go_on(self) -> None:
        """Ask for what has become possible to ask. Ranks that sample together call it at the same place."""

    def _agree(self) -> None:
        try:
            if self.together.size == 1:
                stop.check_alone()
            else:
                stop.check_among(self.together)
            self.go_on()
        except (Stopped, FastPPOError):
            self._engine.abort_request([*self.running])
            raise

    def _step(self) -> None:
        """Let vLLM compute once: a token of each response that is running, or a part of a prompt."""
        with self._explained("cannot compute this model's responses"):
            outputs = [output for output in self._engine.step() if output.finished]
        for output in outputs:
            response, written = self.running.pop(output.request_id), output.outputs[0]
            tokens = list(written.token_ids)
            self.sequences[response] += tokens
            self.completed(response, tokens, list(written.logprobs.logprobs))

    def _explained(self, refusal: str) -> AbstractContextManager[None]:
        return explained(self._vllm.__version__, refusal)

    def _params(self, seed: int, limit: int) -> Any:
        sampling = self.order.sampling
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=limit,
            min_tokens=sampling.min_new_tokens,
            stop_token_ids=self._stop_ids,  # one that ends a response is part of it
            ignore_eos=True,  # the EOS tokens are among these, unless they shall not end a response
            seed=seed,
            logprobs=0,  # that of the token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )


def request_seed(seed: int, stream: int, turn: int = 0) -> int:
    """The seed of one turn, in [0, 2^63): of a run's or an evaluation's seed, the response's stream, and its number."""
    text = f"{seed}/{stream}/{turn}" if turn else f"{seed}/{stream}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
