"""Classes as environments, after Gymnasium: an instance for each conversation, from its first turn to its end."""

import logging
import threading
import time

import pytest
import scripted
import tiny


class Game:
    """Counts to three, as Gymnasium would have it."""

    made = 0
    closed = 0

    def __init__(self):
        Game.made += 1
        self.steps = []

    def reset(self, *, seed=None, options=None):
        self.seed, self.options = seed, options
        return "", {}

    def step(self, action):
        self.steps.append(action)
        done = len(self.steps) == 3
        return f"[{self.options['answer']} {self.seed} {len(self.steps)}]", 0.5, done, False, {}

    def close(self):
        Game.closed += 1


@pytest.fixture
def game():
    Game.made = Game.closed = 0
    return Game


class AsyncGame(Game):
    async def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)

    async def step(self, action):
        return super().step(action)

    async def close(self):
        super().close()


@pytest.mark.parametrize("kind", [Game, AsyncGame])
def test_a_class_has_an_instance_for_each_conversation_until_its_end(game, kind):
    conversations = scripted.conversations(scripted.environment(kind), scripted.plain("Ask", "Tell", answer=["a", "b"]))
    rollout = scripted.talk(conversations, 2)
    for letter, said in zip("ab", rollout.conversations, strict=True):
        observations = [message["content"] for message in said[2::2]]
        seeds = {text.split()[1] for text in observations}
        assert len(said) == 6 and len(seeds) == 1  # what a last step observes is not said
        assert [text.split()[::2] for text in observations] == [[f"[{letter}", f"{n}]"] for n in (1, 2)]
    assert rollout.ended.all() and rollout.rewards_of_turns.tolist() == [1.5, 1.5]
    assert game.made == game.closed == 2


def test_a_conversation_that_is_cut_closes_its_instance(game):
    environment = scripted.environment(Game, max_turns=2)
    rollout = scripted.talk(scripted.conversations(environment, scripted.plain("Ask", answer=["a"])), 1)
    assert rollout.ended.tolist() == [False] and rollout.packed.turn_counts.tolist() == [2] and game.closed == 1


def test_a_conversation_that_the_class_truncates_has_not_ended():
    class Truncates(Game):
        def step(self, action):
            return "x", 1.0, False, True, {}

    rollout = scripted.talk(scripted.conversations(scripted.environment(Truncates), scripted.plain("Ask")), 1)
    assert rollout.ended.tolist() == [False] and rollout.rewards_of_turns.tolist() == [1.0]


def stepping(value):
    class Steps(Game):
        def step(self, action):
            return value

    return Steps


def resetting(value):
    class Resets(Game):
        def reset(self, *, seed=None, options=None):
            if isinstance(value, Exception):
                raise value
            return value

    return Resets


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (stepping("x"), "step returned 'x' (str) for turn 0"),
        (stepping(("x", 1.0)), "a tuple of five: observation, reward, terminated, truncated and info"),
        (stepping((None, 1.0, False, False, {})), "step returned None as observation"),
        (stepping(("x", 1.0, "no", False, {})), "step returned 'no' (str) as terminated"),
        (stepping(("x", 1.0, False, None, {})), "as truncated"),
        (stepping((5, 1.0, False, False, {})), "returned 5 (int)"),
        (stepping(("", 1.0, False, False, {})), "the empty observation"),
        (stepping(("x", "a lot", True, False, {})), "returned the reward 'a lot' (str)"),
        (resetting(("Hello", {})), "reset returned the observation 'Hello' (str)"),
        (resetting("Hello"), "put what the actor shall read first into data.path"),
        (resetting(OSError("no display")), ": reset raised OSError: no display (test_classes.py:"),
    ],
)
def test_what_is_not_gymnasiums_is_refused(kind, words):
    assert words in scripted.failure(kind)


@pytest.mark.parametrize("first", [None, "", ("", {}), (None, {})])
def test_a_reset_without_an_observation_is_right(first):
    class Resets(Game):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed, options=options)
            return first

    environment = scripted.environment(Resets, max_turns=1)
    rollout = scripted.talk(scripted.conversations(environment, scripted.plain("Ask", answer=["a"])), 1)
    assert rollout.rewards_of_turns.tolist() == [0.5]


def test_conversations_that_are_closed_when_all_are_over_have_closed_their_instances(game):
    class Slow(Game):
        def close(self):
            time.sleep(0.05)
            super().close()

    data = scripted.plain(*["Ask"] * 4, answer=["a"] * 4)
    conversations = scripted.conversations(scripted.environment(Slow, max_turns=1, concurrency=1), data)
    for i in range(4):
        conversations.end_turn(i, [5, 0], [-1.0, -1.0])
    while conversations.waiting:
        conversations.answered(scripted.PATIENCE)
    conversations.close()
    assert game.closed == 4
    assert conversations.rollout().packed.turn_counts.tolist() == [1] * 4


def test_instances_that_wait_for_room_to_close_are_closed_when_conversations_are_left(game):
    begun, free = threading.Event(), threading.Event()

    class Slow(Game):
        def close(self):
            if not begun.is_set():
                begun.set()
                free.wait(scripted.PATIENCE)
            super().close()

    data = scripted.plain(*["Ask"] * 3, answer=["a"] * 3)  # of which the third has no turn
    conversations = scripted.conversations(scripted.environment(Slow, max_turns=1, concurrency=1), data)
    for i in range(2):
        conversations.end_turn(i, [5, 0], [-1.0, -1.0])
    while conversations.waiting:
        conversations.answered(scripted.PATIENCE)
    assert begun.wait(scripted.PATIENCE) and game.closed == 0
    conversations.close()
    assert game.closed == 1
    free.set()
    scripted.wait_until(lambda: game.closed == 2)


def test_an_instance_that_cannot_be_closed_is_an_error():
    class Stuck(Game):
        def close(self):
            raise OSError("still open")

    message = scripted.failure(Stuck, data=scripted.plain("Ask", answer=["a"]))
    assert ": close raised OSError: still open" in message


def test_leaving_early_closes_instances_also_the_one_that_is_in_a_call(game, caplog):
    free, begun = threading.Event(), threading.Event()

    class Waits(Game):
        def step(self, action):
            if action == "wait":
                begun.set()
                free.wait(scripted.PATIENCE)
            return super().step(action)

    class Broken(Game):
        def close(self):
            super().close()
            raise OSError("still open")

    conversations = scripted.conversations(
        scripted.environment(Waits), scripted.plain("Ask", "Tell", answer=["a", "b"])
    )
    for i, text in enumerate(("wait", "go")):
        tokens = scripted.said(text, tiny.tokenizer())
        conversations.end_turn(i, tokens, [-1.0] * len(tokens))
    assert begun.wait(scripted.PATIENCE) and [i for i, _ in conversations.answered(scripted.PATIENCE)] == [1]
    conversations.close()
    assert game.closed == 1
    free.set()
    scripted.wait_until(lambda: game.closed == 2)

    conversations = scripted.conversations(scripted.environment(Broken), scripted.plain("Ask", answer=["a"]))
    conversations.end_turn(0, [5, 0], [-1.0, -1.0])
    assert conversations.answered(scripted.PATIENCE)[0][1]
    with caplog.at_level(logging.WARNING, "fastppo"):
        conversations.close()
    assert "close raised OSError: still open" in caplog.text
