"""Drawing in which an environment answers each turn."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastppo.environments import Conversations
from fastppo.errors import FastPPOError
from fastppo.rollout.turns import LONGEST_WAIT
from fastppo.rollout.vllm.drawing import Drawing, Order


class _Answered(NamedTuple):
    """What one rank knows, and those that sample with it must know before they go on."""

    response: int
    observation: tuple[int, ...] | None  # its tokens; None: the conversation is over
    limit: int  # of tokens in the next turn


class Conversing(Drawing):
    """Prompts on their way to conversations.

    A turn that is complete leaves vLLM, which draws others meanwhile. When the environment has answered, all tokens of
    the conversation so far are the prompt of a new request: their keys and values are in vLLM's prefix cache, unless
    others have taken the space. Each rank talks to the environment for its own prompts.
    """

    def __init__(self, vllm: Any, llm: Any, order: Order, conversations: Conversations, own: range):
        """conversations: of this rank's prompts; own: which of the requests these are."""
        super().__init__(vllm, llm, order)
        self.conversations, self.own = conversations, own
        self.waiting: set[int] = set()  # responses whose environment is asked, by whichever rank

    @property
    def is_over(self) -> bool:
        return super().is_over and not self.waiting

    def completed(self, response: int, tokens: list[int], logprobs: list[float]) -> None:
        """Let the environment answer a turn."""
        self.waiting.add(response)
        if response in self.own:
            self.conversations.end_turn(self.own.index(response), tokens, logprobs)

    def go_on(self) -> None:
        """Begin the next turns where the environment has answered. If nothing is drawn, it is waited for a little."""
        for response, observation, limit in self._answered() if self.waiting else ():
            self.waiting.remove(response)
            if observation is not None:
                self.sequences[response] += observation
                self.begin(response, limit)

    def _answered(self) -> list[_Answered]:
        """What has been answered on each of the ranks that sample together, the same on all of them.

        Raises on all what the environment raises on one.
        """
        answers, error = [], None
        try:
            answers = self._own_answers(0.0 if self.running else LONGEST_WAIT)
        except FastPPOError as raised:
            error = raised
        parts = self.together.gather((answers, error))
        errors = [of_rank for _, of_rank in parts if of_rank is not None]
        if errors:
            raise error or errors[0]
        return [answer for of_rank, _ in parts for answer in of_rank]

    def _own_answers(self, wait: float) -> list[_Answered]:
        if not self.conversations.waiting:
            return []
        limit = self.conversations.limit
        return [
            _Answered(self.own[i], tokens, 0 if tokens is None else limit(i))
            for i, tokens in self.conversations.answered(wait)
        ]
