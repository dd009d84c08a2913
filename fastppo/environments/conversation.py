"""One conversation of the actor with an environment, as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastppo.data import Begun, Messages
from fastppo.environments.partner import Partner


@dataclass
class Conversation:
    """What was said so far."""

    place: str  # in the data, for errors
    tokens: list[int]  # from the prompt on
    written: list[bool]  # as long; by the actor
    messages: Messages
    is_chat: bool
    partner: Partner
    prompt_length: int
    logprobs: list[float] = field(default_factory=list)  # of the written tokens, as are the rewards
    rewards: list[float] = field(default_factory=list)
    turns: int = 0
    unfinished: list[int] = field(default_factory=list)  # what there is of a turn that has not ended, and its logprobs
    of_unfinished: list[float] = field(default_factory=list)
    turn: Sequence[int] = ()  # tokens of the newest one
    turn_ended: bool = False  # with a stop token
    calls_tools: bool = False  # that turn does
    ended: bool = False
    over: bool = False
    paused: bool = False

    @property
    def length(self) -> int:  # tokens behind the prompt
        return len(self.tokens) - self.prompt_length

    @property
    def turn_place(self) -> str:
        return f"turn {self.turns - 1} of the conversation of {self.place}"

    def go_on(self, begun: Begun) -> None:
        """Be where a conversation with this prompt has paused."""
        assert begun.turn_rewards is not None and begun.conversation is not None, "begun with an environment"
        tokens, written, logprobs = begun.tokens.tolist(), begun.written.tolist(), begun.logprobs.tolist()
        ended, own = len(tokens) - begun.unfinished, len(logprobs) - begun.unfinished
        self.tokens += tokens[:ended]
        self.written += written[:ended]
        self.unfinished, self.of_unfinished = tokens[ended:], logprobs[own:]
        self.logprobs, self.rewards = logprobs[:own], begun.turn_rewards[:own].tolist()
        self.messages = list(begun.conversation)
        self.turns = sum(now and not next_ for now, next_ in pairwise(written[:ended]))
