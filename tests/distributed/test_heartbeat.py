"""Heartbeats of several ranks on one store, with a clock of the test."""

import logging

import pytest
import torch.distributed as dist

from fastppo.distributed import heartbeat


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def ranks(count):
    store = dist.HashStore()
    return [heartbeat.Heartbeats(store, rank, count) for rank in range(count)]


def live(clock, beats, seconds, begun):
    """So many seconds in which these ranks send their heartbeats. begun: collectives by rank; None: it is dead."""
    for _ in range(round(seconds / heartbeat.POLL)):
        clock.seconds += heartbeat.POLL
        for rank, count in begun.items():
            if count is not None:
                beats[rank].beat(count)


def test_a_rank_without_a_heartbeat_is_silent_and_one_that_has_left_is_not(clock):
    beats = ranks(3)
    live(clock, beats, 5, {0: 1, 1: 1, 2: 1})
    assert beats[0].silent(heartbeat.SILENCE) == []
    live(clock, beats, 44, {0: 1, 1: 1, 2: None})
    assert beats[0].silent(heartbeat.SILENCE) == []
    live(clock, beats, 2, {0: 1, 1: 1, 2: None})
    assert beats[0].silent(heartbeat.SILENCE) == beats[1].silent(heartbeat.SILENCE) == [2]
    beats[2].leave()
    assert beats[0].silent(heartbeat.SILENCE) == []


def test_time_in_which_all_ranks_were_suspended_is_no_silence(clock):
    beats = ranks(2)
    live(clock, beats, 5, {0: 1, 1: 1})
    clock.seconds += 3600
    beats[0].beat(1)
    assert beats[0].silent(heartbeat.SILENCE) == []


def test_the_rank_that_others_wait_for_is_named_less_and_less_often(clock, caplog):
    caplog.set_level(logging.WARNING, "fastppo")
    beats = ranks(3)
    with heartbeat.in_phase("sampling"):
        live(clock, beats, 250, {0: 8, 1: 8, 2: 7})
        assert [record.getMessage() for record in caplog.records] == [
            "waiting 60 s for rank 2, which is in sampling for 60 s",
            "waiting 120 s for rank 2, which is in sampling for 120 s",
            "waiting 240 s for rank 2, which is in sampling for 240 s",
        ]
        caplog.clear()
        live(clock, beats, 59, {0: 9, 1: 9, 2: 8})  # it came, and is late again
        assert not caplog.records
        live(clock, beats, 61, {0: 9, 1: 8, 2: 9})
        assert [record.getMessage() for record in caplog.records] == [
            "waiting 60 s for rank 1, which is in sampling for 370 s"
        ]


def test_no_rank_is_waited_for_where_all_are_as_far_and_a_dead_one_is_not_called_slow(clock, caplog):
    caplog.set_level(logging.WARNING, "fastppo")
    beats = ranks(2)
    live(clock, beats, 300, {0: 4, 1: 4})
    live(clock, beats, 300, {0: 5, 1: None})
    assert not caplog.records


def test_a_phase_ends_with_its_block(clock):
    beats = ranks(2)
    with heartbeat.in_phase("evaluation"):
        clock.seconds += 3
        beats[1].beat(2)
        assert beats[0].place(1) == ("evaluation", 3.0, 2) and str(beats[0].place(1)) == "in evaluation for 3 s"
    beats[1].beat(2)
    assert beats[0].place(1) == ("no phase", 0.0, 2)
