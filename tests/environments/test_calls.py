"""Calls of an environment: several at once, each within its time, and what becomes of those that fail or hang."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import scripted
import tiny
import torch

from fastppo.data import DataError
from fastppo.environments import ConversationError


class Together:
    """How many are inside at once, the most of which it remembers; `expected` of them let each other go."""

    def __init__(self, expected):
        self.inside = self.most = 0
        self._expected, self._full = expected, threading.Condition()

    def enter(self):
        with self._full:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._full.notify_all()
            assert self._full.wait_for(lambda: self.most >= self._expected, scripted.PATIENCE)
            self.inside -= 1


def sleeper(together):
    return lambda: together.enter()


def coroutine(together):
    async def sleeps():
        together.inside += 1
        together.most = max(together.most, together.inside)
        while together.most < together._expected:
            await asyncio.sleep(0.01)
        together.inside -= 1

    return sleeps


def decorated(together):
    return lambda: coroutine(together)()  # hides that it is a coroutine function


class Callable:
    def __init__(self, together):
        self.together = together

    def __call__(self, turn):
        self.together.enter()


def stateful(together):
    class Game:
        def reset(self, *, seed=None, options=None):
            return "", {}

        def step(self, action):
            together.enter()
            return None, 0.0, True, False, {}

    return Game


@pytest.mark.parametrize("kind", [sleeper, coroutine, decorated, Callable, stateful])
def test_32_rows_wait_at_the_same_time(kind):
    together = Together(32)
    conversations = scripted.conversations(scripted.environment(kind(together)), scripted.plain(*["Ask"] * 32))
    rollout = scripted.talk(conversations, 32)
    assert together.most == 32 and rollout.ended.all()


@pytest.mark.parametrize("kind", [sleeper, coroutine, stateful])
def test_no_more_run_at_once_than_may(kind):
    together = Together(3)
    environment = scripted.environment(kind(together), concurrency=3)
    rollout = scripted.talk(scripted.conversations(environment, scripted.plain(*["Ask"] * 12)), 12)
    assert together.most == 3 and rollout.ended.all()


def test_the_time_limit_counts_from_the_start_of_a_call_and_not_while_it_waits_for_others():
    environment = scripted.environment(lambda: time.sleep(0.2), concurrency=1, time_limit=0.9)
    assert scripted.talk(scripted.conversations(environment, scripted.plain(*["Ask"] * 8)), 8).ended.all()


def test_rows_that_have_been_answered_go_on_while_others_wait():
    free = threading.Event()

    def first_waits(conversation):
        if conversation[0]["content"] == "0":
            assert free.wait(scripted.PATIENCE)

    conversations = scripted.conversations(scripted.environment(first_waits), scripted.plain("0", "1"))
    for i in range(2):
        conversations.end_turn(i, [5, 0], [-1.0, -1.0])
    assert conversations.answered(scripted.PATIENCE) == [(1, None)]
    assert conversations.answered() == [] and conversations.waiting == 1
    free.set()
    assert conversations.answered(scripted.PATIENCE) == [(0, None)]
    assert conversations.rollout().ended.tolist() == [True, True]


# Failures


def raising(turn):
    if turn == 1:
        raise LookupError("no such page")
    return "x"


async def raising_later(turn):
    await asyncio.sleep(0)
    return raising(turn)


def leaving(turn):
    sys.exit("enough")


async def cancelled(turn):
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("called", "words"),
    [
        (raising, "raised LookupError: no such page (test_calls.py:"),
        (raising_later, "raised LookupError: no such page (test_calls.py:"),
        (leaving, "raised SystemExit: enough (test_calls.py:"),
        (cancelled, "raised CancelledError"),
        (lambda: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_what_an_environment_raises_is_told_with_its_place(called, words):
    message = scripted.failure(called)
    turn = 1 if called in (raising, raising_later) else 0
    assert message.startswith(scripted.SETTING) and words in message
    assert f"for turn {turn} of the conversation of prompt 0" in message and "as an observation" in message


def test_one_of_32_that_raises_is_the_one_that_is_told():
    def raises_in_one(conversation):
        if conversation[0]["content"] == "17":
            raise ValueError("not this one")
        return "x"

    message = scripted.failure(raises_in_one, 32, scripted.plain(*map(str, range(32))))
    assert "raised ValueError: not this one" in message and "turn 0 of the conversation of prompt 17" in message


def hangs():
    time.sleep(60)


async def hangs_without_blocking():
    await asyncio.sleep(60)


async def will_not_be_cancelled():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


@pytest.mark.parametrize("called", [hangs, hangs_without_blocking, will_not_be_cancelled])
def test_a_call_that_hangs_is_an_error_after_its_time(called):
    message = scripted.failure(called, 2, time_limit=0.2)
    assert "has not answered turn 0 of the conversation of prompt" in message
    assert "within rollout.time_limit = 0.2 seconds. Raise rollout.time_limit" in message


def test_a_call_that_has_returned_too_late_is_the_same_error():
    conversations = scripted.conversations(
        scripted.environment(lambda: time.sleep(0.3), time_limit=0.2), scripted.plain("Ask")
    )
    conversations.end_turn(0, [5, 0], [-1.0, -1.0])
    time.sleep(1.0)  # as an engine that is busy does
    with pytest.raises(ConversationError, match=r"within rollout\.time_limit = 0\.2 seconds"):
        conversations.answered()


def test_a_coroutine_is_cancelled_with_the_others():
    begun, ends = [], []

    async def says_when_it_ends(conversation):
        if conversation[0]["content"] == "1":
            while not begun:
                await asyncio.sleep(0.01)
            raise ValueError
        try:
            begun.append(True)
            await asyncio.sleep(60)
        finally:
            ends.append(conversation[0]["content"])

    scripted.failure(says_when_it_ends, 2, scripted.plain("0", "1"))
    scripted.wait_until(lambda: ends == ["0"])


@pytest.mark.slow
def test_a_process_ends_though_a_call_hangs():
    code = """
        import time, scripted
        from fastppo.environments import ConversationError

        environment = scripted.environment(lambda: time.sleep(600), time_limit=0.2)
        conversations = scripted.conversations(environment, scripted.plain("Ask"))
        conversations.end_turn(0, [5, 0], [-1.0, -1.0])
        try:
            conversations.answered(60.0)
        except ConversationError:
            print("told")
    """
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "told\n"), run.stderr


def test_leaving_early_begins_no_more_calls_and_waits_for_none():
    threads, free = [], threading.Event()

    def waits():
        threads.append(threading.current_thread())
        free.wait(scripted.PATIENCE)

    conversations = scripted.conversations(scripted.environment(waits, concurrency=2), scripted.plain(*["Ask"] * 6))
    for i in range(6):
        conversations.end_turn(i, [5, 0], [-1.0, -1.0])
    scripted.wait_until(lambda: len(threads) == 2)
    conversations.close()
    conversations.close()  # again does nothing
    free.set()
    for thread in [*threads]:
        thread.join(scripted.PATIENCE)
    time.sleep(0.05)  # in which a third would have begun
    assert len(threads) == 2


# Answers that are none

CHAT = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (5, "returned 5 (int) for turn 0"),
        (b"x", "returned b'x' (bytes)"),
        (["x"], "returned ['x'] (list)"),
        ({"content": "x"}, "returned [{'content': 'x'}] (list)"),
        ([{"role": "user", "content": 5}], "it must return None, a text, a chat message"),
        (("x", 1.0, 2.0), "returned a tuple of 3"),
        ((), "returned a tuple of 0"),
        ("", "returned the empty observation '' (str) for turn 0 of the conversation of prompt 0. Return None to end"),
        (" \n", "the empty observation"),
        ([], "the empty observation [] (list)"),
        (("", 1.0), "the empty observation"),
        ([{"role": "tool", "content": ""}], "the empty observation"),
        ([{"role": "assistant", "content": "x"}], "that role is the actor's"),
        (("x", "1"), "returned the reward '1' (str)"),
        (("x", None), "returned the reward None (NoneType)"),
        ((None, float("nan")), "returned the reward nan (float)"),
        ((None, float("-inf")), "must be a finite number"),
        ((None, 1e39), "must be a finite number"),
        ((None, [1.0]), "returned the reward [1.0] (list)"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_what_it_must_be(answer, words):
    message = scripted.failure(lambda: answer, data=scripted.chats(tiny.tokenizer(), "Ask"))
    assert message.startswith(scripted.SETTING) and words in message


def test_an_observation_in_plain_text_must_be_text():
    message = scripted.failure(lambda: CHAT)
    assert "returned chat messages for turn 0" in message and "set data.chat to always" in message


def test_an_asynchronous_generator_is_no_answer():
    async def streams():
        yield "x"

    assert "(async_generator) for turn 0" in scripted.failure(streams)


def test_an_observation_that_the_template_refuses_is_told_with_its_turn():
    tokenizer = tiny.tokenizer()
    data = scripted.chats(tokenizer, "Ask")
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + tiny.CHAT
    conversations = scripted.conversations(scripted.environment(lambda: "x", tokenizer), data)
    with pytest.raises(DataError, match=r"talk: turn 0 of the conversation of prompt 0 is refused .*too many"):
        scripted.talk(conversations, 1)


# The process


def test_an_environment_that_changes_the_whole_process_is_told_and_undone():
    def doubles():
        torch.set_default_dtype(torch.float64)

    message = scripted.failure(doubles)
    assert torch.get_default_dtype() == torch.float32
    assert f"{scripted.SETTING} has changed the default dtype of the whole process" in message


def test_a_call_cannot_turn_gradients_off_for_the_next_one():
    seen = []

    def turns_off(turn):
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)
        return "x" if turn < 2 else None

    async def turns_off_later(turn):
        return turns_off(turn)

    for called in (turns_off, turns_off_later):
        scripted.talk(
            scripted.conversations(scripted.environment(called, concurrency=1), scripted.plain("Ask", "Tell")), 2
        )
    assert seen == [True] * 12 and torch.is_grad_enabled()
