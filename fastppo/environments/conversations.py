"""Conversations of the actor with an environment, whichever engine writes the actor's turns.

An engine ends a turn here, draws other rows while the environment is called, and asks what has been answered. What a
conversation consists of depends on its prompt, its seed and the environment's answers alone, and not on the order in
which these come.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from operator import itemgetter

import torch

from fastppo.config import SamplingConfig
from fastppo.data import Prompts, Rollout, decode_after, pack_turns
from fastppo.distributed import stop
from fastppo.environments.answers import Answer, ConversationError, messages_of
from fastppo.environments.calls import Calls, Outcome, call_here
from fastppo.environments.conversation import Conversation
from fastppo.environments.environment import Environment
from fastppo.environments.partner import FunctionPartner, InstancePartner, Turn
from fastppo.environments.turns import observed, read_turn
from fastppo.errors import line_of, log_once
from fastppo.user_code import restore, shared_settings

log = logging.getLogger("fastppo")

POLL = 0.2  # seconds between two looks at whether the run was told to stop
CLOSING = 5.0  # seconds that instances have to close when conversations are left early


class Conversations:
    """The conversations of one call of a sampler: what was said, and the calls of the environment under way."""

    def __init__(
        self,
        prompts: Prompts,
        environment: Environment,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        *,
        seed: int,
    ):
        """stop_ids: the tokens that end a turn; seed: the sampler's, of which each conversation has one of its own."""
        self._prompts, self._environment, self._sampling = prompts, environment, sampling
        self._stop_ids, self._limits = frozenset(stop_ids), environment.limits
        self._said = [self._begin(i, seed) for i in range(len(prompts))]
        self._calls = Calls(self._limits.concurrency, self._limits.time_limit, self._close_partner)
        self._asked: set[int] = set()  # whose newest turn has not been answered
        self._malformed: dict[int, str] = {}  # of these, with the problem of their tool calls
        self._closings = 0
        self._left = False
        self._settings = shared_settings()

    def limit(self, i: int) -> int:
        """The most tokens that the next turn of conversation i may have, or the rest of the one that it is in, its stop
        token included; 1 or more."""
        said, longest = self._said[i], self._limits.turn_tokens
        left = self._sampling.max_new_tokens - said.length
        return (left if longest is None else min(left, longest)) - len(said.unfinished)

    def end_turn(self, i: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """The actor has written a turn in conversation i, or the rest of one, the stop token included if there is one.

        The environment's call begins, or waits for others to end. logprobs: one of each token.
        """
        said = self._said[i]
        assert not said.over and i not in self._asked, "a conversation waits for its answer before its next turn"
        assert 1 <= len(tokens) == len(logprobs) and len(tokens) <= self.limit(i), "a turn within its limit"
        tokens, logprobs = [*said.unfinished, *tokens], [*said.of_unfinished, *logprobs]
        said.unfinished, said.of_unfinished = [], []
        ended = tokens[-1] in self._stop_ids
        read = read_turn(self._environment, said.tokens, tokens, is_chat=said.is_chat)
        said.tokens += tokens
        said.written += [True] * len(tokens)
        said.logprobs += logprobs
        said.rewards += [0.0] * len(tokens)
        said.messages.append(read.message)
        said.turns += 1
        said.turn, said.turn_ended, said.calls_tools = list(tokens), ended, bool(read.calls)
        self._asked.add(i)
        if read.problem is not None:
            self._malformed[i] = read.problem
            return
        turn = Turn(said.turns - 1, read.text, read.calls, ended, said.messages)
        self._calls.begin(i, said.partner.calls(turn, said.turn_place))

    def pause(self, i: int, tokens: Sequence[int] = (), logprobs: Sequence[float] = ()) -> None:
        """Conversation i goes on at another time, behind these tokens of a turn that has not ended, and those that it
        had of it before."""
        said = self._said[i]
        assert not said.over and i not in self._asked, "a conversation waits for its answer before it pauses"
        assert len(tokens) == len(logprobs) and len(tokens) < self.limit(i), "a turn that may go on"
        said.unfinished += tokens
        said.of_unfinished += logprobs
        said.paused = True

    def answered(self, wait: float = 0.0) -> list[tuple[int, tuple[int, ...] | None]]:
        """The conversations whose calls have returned since this was last asked, in ascending order.

        With each the tokens of its observation, to go on behind, or None where it is over. Waits up to `wait` seconds
        for the first. Raises ConversationError if a call has failed, or takes too long; all others are abandoned then.
        """
        malformed, self._malformed = self._malformed, {}
        try:
            answers = [(i, Answer([{"role": "tool", "content": problem}])) for i, problem in malformed.items()]
            for outcome in self._take(0.0 if answers else wait):
                said = self._said[outcome.key]
                answers.append((outcome.key, said.partner.read(outcome.value, said.turn_place)))
            self._asked.difference_update(i for i, _ in answers)
            return [(i, self._go_on(i, answer)) for i, answer in sorted(answers, key=itemgetter(0))]
        except BaseException:
            self._leave()
            raise

    @property
    def waiting(self) -> int:
        """The number of conversations whose newest turn has not been answered."""
        return len(self._asked)

    def rollout(self) -> Rollout:
        """What was said, when all conversations are over or pause; on the CPU, in the order of the prompts.

        Closes them.
        """
        assert all(said.over or said.paused for said in self._said), "conversations that are not over"
        self.close()
        all_said = self._said
        logprobs = [x for said in all_said for x in (*said.logprobs, *said.of_unfinished)]
        rewards = [x for said in all_said for x in (*said.rewards, *[0.0] * len(said.unfinished))]
        complete = torch.tensor([said.over for said in all_said], dtype=torch.bool)
        return Rollout(
            pack_turns(
                [[*said.tokens, *said.unfinished] for said in all_said],
                [[*said.written, *[True] * len(said.unfinished)] for said in all_said],
            ),
            torch.tensor(logprobs, dtype=torch.float32),
            torch.tensor([said.ended for said in all_said], dtype=torch.bool),
            self._prompts.sources,
            torch.tensor(rewards, dtype=torch.float32),
            tuple(said.messages for said in all_said),
            complete if self._prompts.extend_by is not None else None,
        )

    def close(self) -> None:
        """Let instances of a class that is done with close; raises ConversationError if one cannot.

        Before all conversations are over they are left: no more calls begin, and running ones are abandoned. Instances
        have a few seconds to close then; one that is in a call is closed when that returns. Later calls do nothing.
        """
        try:
            while self._closings and not self._left and all(said.over for said in self._said):
                stop.check_alone()
                self._take(POLL)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._left:
            return
        self._left = True
        running, waiting = self._calls.close()
        closings = Calls(self._limits.concurrency, self._limits.time_limit)
        open_ones = [(i, said.partner.closing()) for i, said in enumerate(self._said) if i not in running]
        begun = [(i, calls) for i, calls in (*waiting, *open_ones) if calls and calls[0].name == "close"]
        for i, calls in begun:
            closings.begin(i, calls)
        under_way, end = len(begun), time.monotonic() + CLOSING
        while under_way and (left := end - time.monotonic()) > 0:
            for outcome in closings.take(left):
                under_way -= 1
                if outcome.late or outcome.error is not None:
                    log.warning("%s", self._failed(outcome))
        if under_way:
            log.warning("%s: %d instances have not been closed", self._environment.setting, under_way)
        closings.close()

    def _begin(self, i: int, seed: int) -> Conversation:
        prompts, row = self._prompts, int(self._prompts.sources[i])
        tokens, data, messages = list(prompts.tokens[i]), prompts.data, None
        if data is None:
            text, columns, place = decode_after([()], [tokens], self._environment.tokenizer)[0], {}, f"prompt {row}"
        else:
            text, columns, place = data.texts[row], {k: v[row] for k, v in data.columns.items()}, data.where(row)
            messages = data.messages_of([row])[0]
        kind = InstancePartner if self._environment.is_class else FunctionPartner
        said = Conversation(
            place=place,
            tokens=tokens,
            written=[False] * len(tokens),
            messages=list(messages) if messages is not None else [{"role": "user", "content": text}],
            is_chat=messages is not None,
            partner=kind(self._environment, conversation_seed(seed, int(prompts.streams[i])), columns),
            prompt_length=len(tokens),
        )
        begun = prompts.begun and prompts.begun[i]
        if begun:
            said.go_on(begun)
        return said

    def _take(self, wait: float) -> list[Outcome]:
        """The calls that have answered turns; those that have closed instances are counted.

        Raises ConversationError.
        """
        outcomes = self._calls.take(wait)
        if outcomes and (changed := restore(self._settings)):
            raise ConversationError(
                f"{self._environment.setting} has changed the {' and the '.join(changed)} of the whole process, in"
                " which responses are drawn meanwhile. Let it leave these as they are, or run in a process of its own."
            )
        for outcome in outcomes:
            if outcome.late or outcome.error is not None:
                raise self._failed(outcome) from outcome.error
        closed = [outcome for outcome in outcomes if outcome.call.name == "close"]
        self._closings -= len(closed)
        return [outcome for outcome in outcomes if outcome.call.name != "close"]

    def _go_on(self, i: int, answer: Answer) -> tuple[int, ...] | None:
        """Append what was answered; returns its tokens, or None if the conversation is over."""
        said = self._said[i]
        said.rewards[-1] = answer.reward
        if not said.is_chat and not isinstance(answer.observation, str | None):
            raise ConversationError(
                f"{self._environment.setting} returned chat messages for {said.turn_place}, whose prompt is plain text."
                " Return a text, or set data.chat to always."
            )
        if answer.observation is None:
            self._finish(i, ended=said.turn_ended and not answer.cut)
            return None
        if said.turns == self._limits.max_turns:
            log_once(
                f"rollout.max_turns = {self._limits.max_turns} cuts conversations that the environment would go on with"
            )
            self._finish(i, ended=False)
            return None
        role = "tool" if said.calls_tools and said.is_chat else "user"
        messages, where = messages_of(answer.observation, role), f"{self._environment.setting}: {said.turn_place}"
        tokens = observed(self._environment, said.messages, messages, said.turn, where, is_chat=said.is_chat)
        if said.length + len(tokens) + 1 > self._sampling.max_new_tokens:
            log_once(
                f"sampling.max_new_tokens = {self._sampling.max_new_tokens} cuts conversations: there is no room for an"
                " observation and a token behind it"
            )
            self._finish(i, ended=False)
            return None
        said.tokens += tokens
        said.written += [False] * len(tokens)
        said.messages += messages
        return tokens

    def _finish(self, i: int, *, ended: bool) -> None:
        said = self._said[i]
        said.over, said.ended = True, ended
        if calls := said.partner.closing():
            self._closings += 1
            self._calls.begin(i, calls)

    def _close_partner(self, i: int) -> None:
        """Close an instance whose call has been abandoned; in the thread of that call."""
        for call in self._said[i].partner.closing():
            try:
                call_here(call)
            except BaseException as error:  # in a thread of its own, where it ends nothing
                log.warning("%s: close raised %s: %s", self._environment.setting, type(error).__name__, error)

    def _failed(self, outcome: Outcome) -> ConversationError:
        setting, place = self._environment.setting, self._said[outcome.key].turn_place
        name = f": {outcome.call.name}" if outcome.call.name else ""
        error = outcome.error
        if isinstance(error, ConversationError):
            return error
        if outcome.late:
            limit = self._limits.time_limit
            return ConversationError(
                f"{setting}{name} has not answered {place} within rollout.time_limit = {limit:g} seconds. Raise"
                " rollout.time_limit, or let the environment limit what it waits for and return an observation that"
                " says so."
            )
        assert error is not None
        line = line_of(error, self._environment.folder)
        return ConversationError(
            f"{setting}{name} raised {type(error).__name__}: {error} ({line}) for {place}. Correct it, or let it return"
            " what went wrong as an observation."
        )


def conversation_seed(seed: int, stream: int) -> int:
    """The seed that an environment is given in a conversation, the same in each turn: 0 to 2**31 - 1.

    seed: the sampler's; stream: the conversation's number in the run, as in `Prompts.streams`.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31
