"""Partial rollouts (Kimi Team, 2025, section 2.6): responses that go on from step to step.

With `rollout.partial_tokens` responses are extended in rounds, each by at most so many tokens of the policy, and a step
learns from the first of them that are complete; its longest response then no longer decides how long all of it takes.
The others are in flight: the next step goes on with them, with its own policy. Their tokens and logprobs stay as they
were sampled, so that rho of `ppo.importance` is that of each token.

A round goes on with all that is not complete, and a batch of further prompts is drawn before it while no more than a
batch is in flight. So a step begins with at most one batch in flight, and samples at most two together. Each round
extends each response, and there is a batch of them at least: a step ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from fastppo.checkpoint import State
from fastppo.config import Config
from fastppo.data import Begun, Prompts, PromptSet, Rollout, concatenate, responses_of
from fastppo.distributed import World, all_gather, together
from fastppo.rollout import ActorSampler


@dataclass(frozen=True)
class InFlight:
    """A response that is drawn and not learned from; the same on every rank."""

    source: int  # the row of its prompt in the prompt set
    stream: int  # as in `Prompts`
    step: int  # that drew its prompt, from 0
    begun: Begun | None = None  # None before its first round
    complete: bool = False  # it waits for the others of its group, or for the next step
    ended: bool = False  # as in `Rollout`

    @property
    def written(self) -> int:
        """The number of tokens that the policy has written."""
        return 0 if self.begun is None else len(self.begun.logprobs)

    def state(self) -> State:
        """Plain values and tensors."""
        begun = self.begun and {f.name: getattr(self.begun, f.name) for f in fields(Begun)}
        return {f.name: getattr(self, f.name) for f in fields(InFlight)} | {"begun": begun}

    @staticmethod
    def from_state(state: State) -> InFlight:
        begun = state["begun"]
        return InFlight(**state | {"begun": begun and Begun(**begun)})


@dataclass(frozen=True)
class Continued:
    """What a step with `rollout.partial_tokens` has sampled and taken, over all ranks."""

    rounds: int  # of sampling
    in_flight: int  # responses that are left for the next steps
    sampled: int  # tokens that the policy of this step wrote, in responses that are in flight too
    earlier: float  # share of the written tokens of the responses taken that policies of earlier steps wrote
    age: float  # steps since the prompts of these responses were drawn, their mean

    def metrics(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """The counts, and speeds of what the step sampled. seconds: `time/PHASE` of the step's phases."""
        metrics = {
            "sampling_rounds": self.rounds,
            "in_flight": self.in_flight,
            "tokens_sampled": self.sampled,
            "earlier_tokens": self.earlier,
            "response_age": self.age,
            "tokens_per_second": self.sampled / sum(seconds.values()),
        }
        if "time/sampling" in seconds:  # with `ppo.steps_ahead` the last step samples nothing
            metrics["tokens_per_second/sampling"] = self.sampled / seconds["time/sampling"]
        return metrics


class StepResponses:
    """The responses that a step learns from, in batches of `ppo.batch_size`: each time the next prompts' or, with
    `rollout.partial_tokens`, the first of those in flight that are complete."""

    def __init__(self, config: Config, in_flight: Sequence[InFlight], step: int, data: PromptSet, world: World):
        """in_flight: what earlier steps have left; step: the step's number, from 0; data: where prompts are from."""
        self._extend_by, self._size = config.rollout.partial_tokens, config.ppo.batch_size
        self._samples = config.sampling.samples_per_prompt
        self._step, self._data, self._world = step, data, world
        self._pool = list(in_flight)  # group by group, in the order drawn
        self._earlier = {one.stream: one.written for one in in_flight}  # tokens
        self._taken: list[InFlight] = []
        self._rounds = self._sampled = 0
        self.batches = 0  # of prompts, drawn in this step

    def sample(self, sampler: ActorSampler, prompts: Iterator[Prompts]) -> Rollout:
        """This rank's part of a batch of complete responses, in the order drawn; the groups of samples are whole.

        prompts: batches of prompts that nobody has drawn. All ranks call it, within the phase `sampling`.
        """
        if self._extend_by is None:
            self.batches += 1
            return self._asked(sampler, next(prompts))
        while len(complete := self._complete()) < self._size:
            if len(self._pool) <= self._size:
                self._add(next(prompts))
            self._go_on(sampler)
        taken = complete[: self._size]
        self._taken += taken
        streams = {one.stream for one in taken}
        self._pool = [one for one in self._pool if one.stream not in streams]
        mine = torch.arange(len(taken)).tensor_split(self._world.ranks)[self._world.rank].tolist()
        own = [taken[i] for i in mine]
        return responses_of(self._prompts(own), torch.tensor([one.ended for one in own], dtype=torch.bool))

    @property
    def in_flight(self) -> tuple[InFlight, ...]:
        """What is drawn and not taken."""
        return tuple(self._pool)

    @property
    def continued(self) -> Continued | None:
        """What became of it; None without `rollout.partial_tokens`."""
        if self._extend_by is None:
            return None
        earlier = sum(self._earlier.get(one.stream, 0) for one in self._taken)
        age = sum(self._step - one.step for one in self._taken) / len(self._taken)
        share = earlier / sum(one.written for one in self._taken)
        return Continued(self._rounds, len(self._pool), self._sampled, share, age)

    def _complete(self) -> list[InFlight]:
        """The responses of the groups that are complete, in the order drawn."""
        groups = [self._pool[i : i + self._samples] for i in range(0, len(self._pool), self._samples)]
        return [one for group in groups if all(each.complete for each in group) for one in group]

    def _add(self, prompts: Prompts) -> None:
        self.batches += 1
        rows, streams = prompts.sources.tolist(), prompts.streams.tolist()
        self._pool += [InFlight(row, stream, self._step) for row, stream in zip(rows, streams, strict=True)]

    def _go_on(self, sampler: ActorSampler) -> None:
        """Extend each response that is not complete; those of all ranks are then known to each."""
        self._rounds += 1
        incomplete = [i for i, one in enumerate(self._pool) if not one.complete]
        asked = replace(self._prompts([self._pool[i] for i in incomplete]), extend_by=self._extend_by)
        rollout = concatenate(all_gather(self._asked(sampler, asked), self._world))
        assert rollout.complete is not None
        found = zip(rollout.begun(), rollout.complete.tolist(), rollout.ended.tolist(), strict=True)
        for i, (begun, complete, ended) in zip(incomplete, found, strict=True):
            extended = replace(self._pool[i], begun=begun, complete=complete, ended=ended)
            self._sampled += extended.written - self._pool[i].written
            self._pool[i] = extended

    def _asked(self, sampler: ActorSampler, prompts: Prompts) -> Rollout:
        """What the sampler makes of this rank's part of prompts."""
        with together(self._world):
            return sampler.sample(prompts.of_rank(self._world.rank, self._world.ranks))

    def _prompts(self, responses: Sequence[InFlight]) -> Prompts:
        return Prompts(
            tuple(self._data.tokens[one.source] for one in responses),
            torch.tensor([one.stream for one in responses], dtype=torch.int64),
            torch.tensor([one.source for one in responses], dtype=torch.int64),
            self._data,
            tuple(one.begun for one in responses),
        )
