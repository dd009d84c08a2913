"""Which responses a step learns from with `rollout.partial_tokens`, and what it leaves in flight.

By hand, with a sampler whose responses are as long as it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppo_step import config_of

from fastppo.config import Config
from fastppo.data.batch import Prompts, Rollout
from fastppo.data.packed import pack
from fastppo.data.prompts import PromptSet
from fastppo.distributed.world import World
from fastppo.online.partial_rollouts import Continued, InFlight, StepResponses
from fastppo.ppo.progress import PPOProgress

BATCH, SAMPLES, BY = 4, 2, 3
DATA = PromptSet(tuple((100 + row, 100) for row in range(50)), ("",) * 50, {})
WORLD = World(0, 1, torch.device("cpu"))


@cache
def config(by: int | None = BY) -> Config:
    arguments = ["--ppo.batch_size", str(BATCH), "--sampling.samples_per_prompt", str(SAMPLES)]
    return config_of("none", *arguments, *([] if by is None else ["--rollout.partial_tokens", str(by)]))


class Written:
    """A sampler whose response of stream s has `lengths[s]` tokens s, of logprob -v in version v of the policy."""

    def __init__(self, lengths: dict[int, int], longest: int = 10):
        self.lengths, self.longest, self.version = lengths, longest, 0
        self.asked: list[list[int]] = []  # the streams of each call

    def sample(self, prompts: Prompts) -> Rollout:
        streams = prompts.streams.tolist()
        self.asked.append(streams)
        sequences, counts, logprobs, ended = [], [], [], []
        for i, stream in enumerate(streams):
            begun = prompts.begun[i] if prompts.begun else None
            old = [] if begun is None else begun.logprobs.tolist()
            all_ = min(self.lengths.get(stream, 1), self.longest)
            count = all_ if prompts.extend_by is None else min(len(old) + prompts.extend_by, all_)
            assert count > len(old), "each call writes a token"
            sequences.append((*prompts.tokens[i], *[stream] * count))
            counts.append(count)
            logprobs += [*old, *[-float(self.version)] * (count - len(old))]
            ended.append(count == self.lengths.get(stream, 1))
        done = [count == min(self.lengths.get(s, 1), self.longest) for s, count in zip(streams, counts, strict=True)]
        packed = pack(sequences, counts)
        complete = torch.tensor(done) if prompts.extend_by is not None else None
        return Rollout(packed, torch.tensor(logprobs), torch.tensor(ended), prompts.sources, complete=complete)


def batches(start: int = 0) -> Iterator[Prompts]:
    count = BATCH // SAMPLES
    while True:
        rows = range(start * count, (start + 1) * count)
        yield Prompts.of(DATA.tokens, rows, first=start * count, samples=SAMPLES, data=DATA)
        start += 1


class Run:
    """Steps one after the other."""

    def __init__(self, lengths: dict[int, int], by: int | None = BY):
        self.sampler, self.by, self.prompts = Written(lengths), by, batches()
        self.in_flight: tuple[InFlight, ...] = ()
        self.done = 0

    def step(self) -> tuple[list[int], StepResponses]:
        """The streams that the step learns from."""
        self.sampler.version = self.done
        responses = StepResponses(config(self.by), self.in_flight, self.done, DATA, WORLD)
        self.rollout = responses.sample(self.sampler, self.prompts)
        self.in_flight, self.done = responses.in_flight, self.done + 1
        packed = self.rollout.packed
        streams = packed.responses[packed.last_response_tokens].tolist()
        assert packed.response_lengths.tolist() == [min(self.sampler.lengths.get(s, 1), 10) for s in streams]
        assert self.rollout.sources.tolist() == [s // SAMPLES for s in streams]
        assert packed.tokens[packed.cu_seqlens[:-1].long()].tolist() == [100 + s // SAMPLES for s in streams]
        assert self.rollout.complete is None
        return streams, responses


def test_a_step_learns_from_the_first_groups_that_are_complete_and_goes_on_with_the_others():
    run = Run({1: 8, 5: 4, 6: 3, 8: 2, 9: 7})
    streams, responses = run.step()
    # response 1 is not complete, so that the batch is not full and another one is drawn
    assert streams == [2, 3, 6, 7] and responses.batches == 2
    assert run.sampler.asked == [[0, 1, 2, 3], [1, 4, 5, 6, 7]]
    assert [(one.stream, one.written, one.complete) for one in run.in_flight] == [
        (0, 1, True),
        (1, 6, False),
        (4, 1, True),
        (5, 3, False),
    ]
    assert responses.continued == Continued(2, 4, (1 + 3 + 1 + 1) + (3 + 1 + 3 + 3 + 1), 0.0, 0.0)
    streams, responses = run.step()
    assert streams == [0, 1, 4, 5] and responses.batches == 1
    assert run.sampler.asked[2:] == [[1, 5, 8, 9, 10, 11]]
    assert [one.stream for one in run.in_flight] == [8, 9, 10, 11]
    assert run.rollout.logprobs.tolist() == [-0.0] + [-0.0] * 6 + [-1.0] * 2 + [-0.0] + [-0.0] * 3 + [-1.0]
    assert responses.continued == Continued(1, 4, 2 + 1 + 2 + 3 + 1 + 1, 11 / 14, 1.0)
    streams, responses = run.step()
    assert streams == [10, 11, 12, 13] and run.sampler.asked[3:] == [[9, 12, 13, 14, 15]]
    assert responses.continued.age == 0.5


def test_with_no_more_room_in_flight_a_step_goes_on_with_what_there_is():
    run = Run(dict.fromkeys(range(100), 10))
    streams, responses = run.step()
    assert streams == [0, 1, 2, 3] and responses.batches == 2
    assert run.sampler.asked == [[0, 1, 2, 3], *[[*range(8)]] * 3]
    assert {one.written for one in run.in_flight} == {9} and not any(one.complete for one in run.in_flight)
    assert run.rollout.ended.all()
    streams, responses = run.step()
    assert streams == [4, 5, 6, 7] and run.sampler.asked[4:] == [[*range(4, 12)]]


def test_a_step_may_find_its_batch_in_flight():
    lengths = {1: 9, 3: 9, 5: 9, 7: 9}
    run = Run(lengths)
    assert run.step()[0] == [0, 1, 2, 3] and all(one.written == 6 for one in run.in_flight if one.stream in (5, 7))
    assert run.step()[0] == [4, 5, 6, 7] and [one.complete for one in run.in_flight] == [True] * 4
    calls = len(run.sampler.asked)
    streams, responses = run.step()
    assert streams == [8, 9, 10, 11] and run.in_flight == () and responses.batches == 0
    assert len(run.sampler.asked) == calls and responses.continued == Continued(0, 0, 0, 1.0, 1.0)
    assert run.step()[0] == [12, 13, 14, 15]


def test_a_response_that_is_cut_at_its_longest_is_complete_and_has_not_ended():
    run = Run({0: 11, 2: 11})
    streams, _ = run.step()
    found = dict(zip(streams, run.rollout.ended.tolist(), strict=True))
    while 0 not in found:
        streams, _ = run.step()
        found |= dict(zip(streams, run.rollout.ended.tolist(), strict=True))
    assert not found[0] and found[1]


def test_without_the_setting_each_batch_is_sampled_once_and_nothing_is_in_flight():
    run = Run({1: 8}, by=None)
    streams, responses = run.step()
    assert streams == [0, 1, 2, 3] and run.in_flight == () and responses.batches == 1 and responses.continued is None
    assert run.sampler.asked == [[0, 1, 2, 3]]


@given(st.lists(st.integers(1, 12), min_size=80, max_size=80))
def test_any_run_learns_from_each_response_once_and_bounds_what_is_in_flight(lengths):
    run = Run(dict(enumerate(lengths)))
    learned: list[int] = []
    for step in range(5):
        drawn = len(learned) + len(run.in_flight)
        streams, responses = run.step()
        assert streams == sorted(streams) and len(streams) == BATCH
        assert all(streams[i] + 1 == streams[i + 1] for i in range(0, BATCH, SAMPLES))
        learned += streams
        assert len(run.in_flight) <= BATCH
        assert len(learned) + len(run.in_flight) == drawn + responses.batches * BATCH
        assert all(one.step <= step for one in run.in_flight)
    assert len({*learned}) == len(learned) and not {*learned} & {one.stream for one in run.in_flight}
    assert all(len(call) <= 2 * BATCH for call in run.sampler.asked)


def test_what_is_in_flight_is_saved_and_read_back():
    run = Run(dict.fromkeys(range(100), 7))
    _, responses = run.step()
    progress, other = PPOProgress(in_flight=responses.in_flight, continued=responses.continued), PPOProgress()
    other.restore(progress.state(), progress.random)
    assert other.continued == responses.continued and len(other.in_flight) == BATCH
    for one, again in zip(responses.in_flight, other.in_flight, strict=True):
        assert str(one) == str(again)
    state = progress.state()
    del state["in_flight"], state["continued"]  # of a checkpoint from before
    other.restore(state, progress.random)
    assert other.in_flight == () and other.continued is None


def test_speeds_are_those_of_what_the_step_sampled():
    metrics = Continued(2, 4, 100, 0.25, 1.5).metrics({"time/sampling": 2.0, "time/learning": 8.0})
    assert metrics["tokens_per_second"] == 10 and metrics["tokens_per_second/sampling"] == 50
    assert (metrics["in_flight"], metrics["earlier_tokens"], metrics["response_age"]) == (4, 0.25, 1.5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_the_ranks_are_the_batch(ranks):
    """What is in flight is the same on every rank, here a whole batch."""
    whole = tuple(in_flight(stream) for stream in range(BATCH))
    parts = []
    for rank in range(ranks):
        responses = StepResponses(config(), whole, 1, DATA, World(rank, ranks, torch.device("cpu")))
        parts.append(responses.sample(Written({}), batches()))
    assert [int(s) for part in parts for s in part.packed.responses] == [0, 1, 2, 3]


def in_flight(stream: int) -> InFlight:
    """One that is complete."""
    rollout = Written({}).sample(Prompts(((100,),), torch.tensor([stream]), torch.tensor([stream // SAMPLES])))
    return InFlight(stream // SAMPLES, stream, 0, rollout.begun()[0], complete=True, ended=True)
