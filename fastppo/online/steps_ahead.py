"""Sampling one step ahead (`ppo.steps_ahead: 1`): feedback on the next batch runs beside the learning from this one.

A step samples the responses of the next step before it updates the policy. Functions and services score them in a
thread of each rank while the trainer computes; reward models of the run score in the step that learns from them, since
they need the GPU and the other ranks. So responses are from the policy one step back, as in the one-step off-policy
training of Noukhovitch et al. (2024, "Asynchronous RLHF"), and `ppo.importance` corrects for it.

No collective runs in the thread: what ranks have to agree on, they do in the main thread, before it begins and after it
has ended. One batch is scored at a time, and nothing else uses the sources meanwhile: functions need not be safe to be
called from two threads, and the order in which they draw random numbers is that of the batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from threading import Event, Thread

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import State
from fastppo.config import Config
from fastppo.data import Packed, Prompts, PromptSet, Rollout, Scored, concatenate
from fastppo.distributed import World, all_gather, leave_without_cleanup, stop
from fastppo.online.partial_rollouts import Continued, InFlight, StepResponses
from fastppo.rewards import Answered, RewardError, Source, ask, responses_of_rank, score
from fastppo.rollout import ActorSampler

log = logging.getLogger("fastppo")

POLL = 0.1  # seconds between two looks at whether the run was told to stop
GRACE = 5.0  # seconds that a thread has to end at the end of the run


@dataclass(frozen=True)
class Ahead:
    """The batch of the next step, as it was sampled; the same on every rank."""

    rollout: Rollout  # of all ranks
    batches: int  # of prompts, drawn for it
    in_flight: tuple[InFlight, ...] = ()  # with `rollout.partial_tokens` what is drawn, and neither in it nor before it
    continued: Continued | None = None  # with `rollout.partial_tokens`

    def state(self) -> State:
        """Plain values and tensors."""
        rollout = {f.name: getattr(self.rollout, f.name) for f in fields(Rollout)}
        rollout["packed"] = {f.name: getattr(self.rollout.packed, f.name) for f in fields(Packed)}
        return {
            "rollout": rollout,
            "batches": self.batches,
            "in_flight": [one.state() for one in self.in_flight],
            "continued": self.continued and asdict(self.continued),
        }

    @staticmethod
    def from_state(state: State) -> Ahead:
        rollout, continued = state["rollout"], state["continued"]
        return Ahead(
            Rollout(**rollout | {"packed": Packed(**rollout["packed"])}),
            state["batches"],
            tuple(InFlight.from_state(one) for one in state["in_flight"]),
            continued and Continued(**continued),
        )


def sample_ahead(
    sampler: ActorSampler,
    prompts: Iterator[Prompts],
    step: int,
    in_flight: Sequence[InFlight],
    data: PromptSet,
    config: Config,
    world: World,
) -> Ahead:
    """The batch of a step. All ranks call it, within the phase `sampling`.

    prompts: batches of prompts that nobody has drawn; in_flight: what the batch before has left; data: where prompts
    are from.
    """
    responses = StepResponses(config, in_flight, step, data, world)
    rollout = concatenate(all_gather(responses.sample(sampler, prompts), world))
    return Ahead(rollout, responses.batches, responses.in_flight, responses.continued)


@dataclass
class _Scoring:
    """The responses of this rank that are being scored."""

    rollout: Rollout
    asked: Future[Answered] = field(default_factory=Future)
    ended: Event = field(default_factory=Event)


class FeedbackAhead:
    """Scores the batch of the next step. All ranks call each method at the same place."""

    def __init__(
        self,
        data: PromptSet,
        sources: Sequence[tuple[Source, float]],
        judge: Sequence[tuple[Source, float]],
        tokenizer: PreTrainedTokenizerBase,
        world: World,
    ):
        """data: where prompts are from; sources, judge: as `score` has them; tokenizer: the actor's."""
        self._data, self._sources, self._judge = data, sources, judge
        self._tokenizer, self._world = tokenizer, world
        self._scoring: _Scoring | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a batch that is not taken."""
        return self._scoring is not None

    def begin(self, rollout: Rollout) -> None:
        """Let functions and services score this rank's part of a batch, beside what this thread does next.

        rollout: of all ranks; the batch before it was taken or dropped.
        """
        assert self._scoring is None, "one batch is scored at a time"
        parts = torch.arange(len(rollout.packed)).tensor_split(self._world.ranks)
        own = rollout.select(parts[self._world.rank])
        responses = responses_of_rank(own, self._data, self._tokenizer)  # here: a tokenizer is not safe in two threads
        self._scoring = scoring = _Scoring(own)

        def work() -> None:
            try:
                if self._world.device.type == "cuda":  # a new thread begins on the first GPU
                    torch.cuda.set_device(self._world.device)
                scoring.asked.set_result(ask(responses, self._sources, self._judge))
            except BaseException as error:  # the main thread raises it
                scoring.asked.set_exception(error)
            finally:
                scoring.ended.set()

        Thread(target=work, name="fastppo-feedback", daemon=True).start()

    def settle(self) -> None:
        """Wait until no source is asked any more. Raises Stopped on all ranks."""
        if self._scoring is None:
            return
        with stop.together(self._world):
            while not self._scoring.ended.wait(POLL):
                stop.check_alone()

    def take(self) -> Scored:
        """The scores of the batch, those of reward models included, as `score` returns them. Raises what it does."""
        self.settle()
        scoring, self._scoring = self._scoring, None
        assert scoring is not None, "a batch is begun before it is taken"
        sources = (self._sources, self._tokenizer, self._world, self._judge)
        return score(scoring.rollout, self._data, *sources, asked=scoring.asked.result())

    def drop(self) -> None:
        """Forget the batch, if there is one: the run goes on from elsewhere. What went wrong with it is logged."""
        self.settle()
        scoring, self._scoring = self._scoring, None
        if scoring is None:
            return
        asked = scoring.asked.result()
        try:
            for answer in asked.answers.values():
                answer(asked.responses)
        except RewardError as error:
            log.warning("a batch that was sampled ahead is dropped, and an error of its feedback with it: %s", error)

    def close(self) -> None:
        """At the end of the run, however it ends: a thread that still runs has `GRACE` seconds."""
        scoring, self._scoring = self._scoring, None
        if scoring is not None and not scoring.ended.wait(GRACE):
            leave_without_cleanup()  # Python would end the thread at any place, within the code of a library too
