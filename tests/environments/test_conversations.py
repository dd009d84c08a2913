"""Conversations of a scripted actor with functions: what is said, who wrote it, when it is over, and what it earns."""

import random
import threading
from operator import attrgetter

import chat_templates
import pytest
import scripted
import tiny
import torch

from fastppo.config import SamplingConfig
from fastppo.data import Prompts
from fastppo.environments import Conversations, conversation_seed
from fastppo.errors import log_once

TOKENIZER = tiny.tokenizer()


def texts(rollout, row=0):
    """The row's tokens as text, in pieces: what the policy wrote, and what it did not."""
    sequence = rollout.packed.cu_seqlens.tolist()[row : row + 2]
    tokens, mask = (x[slice(*sequence)].tolist() for x in (rollout.packed.tokens, rollout.packed.mask))
    pieces = []
    for token, written in zip(tokens, mask, strict=True):
        if not pieces or pieces[-1][0] != written:
            pieces.append((written, []))
        pieces[-1][1].append(token)
    return [(written, TOKENIZER.decode(ids)) for written, ids in pieces]


def have(called, data=None, actor=lambda i, turn: f"turn {turn}", max_new_tokens=200, **limits):
    data = scripted.plain("Ask") if data is None else data
    conversations = scripted.conversations(scripted.environment(called, **limits), data, max_new_tokens=max_new_tokens)
    return scripted.talk(conversations, len(data), actor), conversations


# What is said


def test_a_conversation_in_plain_text_is_turns_and_observations_behind_each_other():
    rollout, _ = have(lambda turn: f" [{turn}] " if turn < 2 else None)
    assert texts(rollout) == [
        *((False, "Ask"), (True, "turn 0<eos>"), (False, " [0] "), (True, "turn 1<eos>"), (False, " [1] ")),
        (True, "turn 2<eos>"),
    ]
    assert rollout.conversations == (
        [
            {"role": "user", "content": "Ask"},
            {"role": "assistant", "content": "turn 0"},
            {"role": "user", "content": " [0] "},
            {"role": "assistant", "content": "turn 1"},
            {"role": "user", "content": " [1] "},
            {"role": "assistant", "content": "turn 2"},
        ],
    )
    assert rollout.packed.turn_lengths.tolist() == [7, 7, 7]
    assert rollout.logprobs.tolist() == [-1.0] * 7 + [-2.0] * 7 + [-3.0] * 7
    assert rollout.ended.tolist() == [True]


def test_an_environment_that_has_nothing_to_say_leaves_one_turn():
    rollout, _ = have(lambda: None)
    assert texts(rollout) == [(False, "Ask"), (True, "turn 0<eos>")]
    assert rollout.packed.turn_counts.tolist() == [1] and rollout.ended.tolist() == [True]
    assert rollout.turn_rewards.tolist() == [0.0] * 7


@pytest.mark.parametrize(
    "observation",
    [
        "More?",
        {"role": "user", "content": "More?"},
        [{"role": "user", "content": "More?"}],
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "More?"}],
    ],
)
def test_in_chat_an_observation_is_written_by_the_template(observation):
    data = scripted.chats(TOKENIZER, "Ask")
    rollout, _ = have(lambda turn: observation if turn == 0 else None, data)
    messages = observation if isinstance(observation, list) else [{"role": "user", "content": "More?"}]
    between = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert texts(rollout) == [
        *((False, "<user>Ask<assistant>"), (True, "turn 0<eos>"), (False, between), (True, "turn 1<eos>"))
    ]
    turns = [{"role": "assistant", "content": f"turn {n}"} for n in range(2)]
    assert rollout.conversations == ([{"role": "user", "content": "Ask"}, turns[0], *messages, turns[1]],)


def test_prompts_without_their_data_have_their_tokens_text():
    prompts = Prompts.of([scripted.said("Ask", TOKENIZER, ends=False)], [0])
    conversations = Conversations(prompts, scripted.environment(lambda: None), SamplingConfig(), [0], seed=1)
    assert scripted.talk(conversations, 1).conversations[0][0] == {"role": "user", "content": "Ask"}


# What an environment is given


def test_a_function_is_given_what_it_has_as_parameters():
    given = []

    def some(turn, answer):
        given.append((turn, answer))
        return "x" if turn == 0 else None

    def all_of_it(**kwargs):
        given.append(sorted(kwargs))

    data = scripted.plain("Ask", answer=["42"], turn=["not this one"])
    have(some, data)
    have(all_of_it, data)
    assert given == [(0, "42"), (1, "42"), ["answer", "calls", "conversation", "ended", "seed", "turn"]]


def test_a_turn_that_is_cut_is_said_to_be_and_has_not_ended():
    ends = []
    rollout, _ = have(lambda ended: ends.append(ended), actor=lambda i, turn: "turn", turn_tokens=4)
    assert ends == [False] and rollout.ended.tolist() == [False]


def test_what_an_environment_does_to_its_arguments_changes_nothing():
    def spoils(conversation, turn, answer):
        assert answer == ["42"] and [m["role"] for m in conversation[:2]] == ["user", "assistant"]
        conversation[0]["content"] = "spoilt"
        answer.append("spoilt")
        return "x" if turn < 2 else None

    data = scripted.plain("Ask", answer=[["42"]])
    rollout, _ = have(spoils, data)
    assert rollout.conversations[0][0]["content"] == "Ask" and data.columns == {"answer": [["42"]]}


def test_each_conversation_has_a_seed_of_its_own_and_the_same_one_in_each_turn():
    seeds = {}

    def remembers(conversation, turn, seed):
        seeds.setdefault(conversation[1]["content"], []).append(seed)
        return "x" if turn == 0 else None

    environment, data = scripted.environment(remembers), scripted.plain("Ask", "Tell")
    for run in (1, 1, 2):
        scripted.talk(scripted.conversations(environment, data, samples=2, seed=run), 4, lambda i, turn: f"by {i}")
    expected = {f"by {i}": [conversation_seed(run, i) for run in (1, 1, 2) for _ in range(2)] for i in range(4)}
    assert seeds == expected
    assert len({seed for each in seeds.values() for seed in each}) == 8
    assert all(0 <= seed < 2**31 for each in seeds.values() for seed in each)


# Rewards


def test_a_reward_lies_on_the_last_token_of_its_turn():
    amounts = [0.5, True, -2]
    rollout, _ = have(lambda turn: ("x" if turn < 2 else None, amounts[turn]))
    expected = torch.zeros(21)
    expected[[6, 13, 20]] = torch.tensor([0.5, 1.0, -2.0])
    assert rollout.turn_rewards.dtype == torch.float32 and rollout.turn_rewards.equal(expected)
    assert rollout.rewards_of_turns.tolist() == [-0.5]


# Limits


def test_the_last_turn_is_rewarded_and_what_is_said_to_it_is_dropped(caplog):
    log_once.cache_clear()
    caplog.set_level("INFO", "fastppo")
    rollout, _ = have(lambda turn: (f"[{turn}]", 1.0), max_turns=2)
    assert [text for _, text in texts(rollout)] == ["Ask", "turn 0<eos>", "[0]", "turn 1<eos>"]
    assert len(rollout.conversations[0]) == 4 and rollout.ended.tolist() == [False]
    assert rollout.rewards_of_turns.tolist() == [2.0]
    assert [message.split(" cuts ")[0] for message in caplog.messages] == ["rollout.max_turns = 2"]


def test_an_environment_that_is_done_at_the_last_turn_ends_the_conversation(caplog):
    log_once.cache_clear()
    caplog.set_level("INFO", "fastppo")
    rollout, _ = have(lambda turn: "x" if turn == 0 else None, max_turns=2)
    assert rollout.ended.tolist() == [True] and not caplog.messages


@pytest.mark.parametrize(("left", "goes_on"), [(4, True), (3, False)])
def test_an_observation_that_leaves_no_room_for_a_turn_is_dropped(caplog, left, goes_on):
    log_once.cache_clear()
    caplog.set_level("INFO", "fastppo")
    rollout, _ = have(lambda turn: ("ooo", 1.0) if turn == 0 else None, max_new_tokens=7 + left)
    assert rollout.ended.tolist() == [False]
    assert rollout.packed.turn_counts.tolist() == [2 if goes_on else 1]
    said = [message.split(" cuts ")[0] for message in caplog.messages]
    assert said == ([] if goes_on else [f"sampling.max_new_tokens = {7 + left}"])
    assert rollout.rewards_of_turns.tolist() == [1.0]
    assert len(rollout.packed.tokens) == 3 + 7 + (left if goes_on else 0)


def test_the_limit_of_a_turn_is_what_is_left_and_no_more_than_that_of_turns():
    environment = scripted.environment(lambda: "12345", turn_tokens=6)
    conversations = scripted.conversations(environment, scripted.plain("Ask"), max_new_tokens=20)
    limits, observation = [conversations.limit(0)], ()
    while observation is not None:
        conversations.end_turn(0, [5] * limits[-1], [-1.0] * limits[-1])
        ((_, observation),) = conversations.answered(scripted.PATIENCE)
        limits.append(conversations.limit(0))
    assert limits == [6, 6, 3]  # 20 - 6 - 5 - 6 = 3: no room for the second observation


# Order


def test_the_order_of_the_answers_changes_nothing():
    count, orders = 6, []

    def rollout(order):
        gates, returned = [threading.Event() for _ in range(count)], []

        def waits(conversation, turn, seed):
            i = int(conversation[0]["content"])
            if turn == 0:
                assert gates[i].wait(scripted.PATIENCE)
            return (f"[{random.Random(seed + turn).random()}]", seed / 2**31) if turn < 2 else None

        def opens(i, tokens):
            returned.append(i)
            later = order[order.index(i) + 1 :][:1]
            for j in later:
                gates[j].set()

        gates[order[0]].set()
        data = scripted.plain(*map(str, range(count)))
        conversations = scripted.conversations(scripted.environment(waits), data)
        result = scripted.talk(conversations, count, lambda i, turn: f"{i} {turn}", answered=opens)
        orders.append(list(dict.fromkeys(returned)))
        return result

    one, other = rollout([0, 1, 2, 3, 4, 5]), rollout([5, 4, 3, 2, 1, 0])
    assert orders[0] == orders[1][::-1]
    assert one.conversations == other.conversations
    for name in ("packed.tokens", "packed.mask", "packed.cu_seqlens", "logprobs", "ended", "sources", "turn_rewards"):
        assert attrgetter(name)(one).equal(attrgetter(name)(other)), name


def test_no_prompts_are_a_rollout_of_none():
    rollout, conversations = have(lambda: None, scripted.plain())
    assert len(rollout.packed) == 0 and rollout.conversations == () and len(rollout.turn_rewards) == 0
    assert conversations.waiting == 0


# Tools

ADD = chat_templates.tool("add", "a", "b")


def call(arguments):
    return f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("kind", ["qwen2.5", "hermes"])
def test_tool_calls_reach_the_environment_and_its_text_is_the_tools_message(kind):
    tokenizer, given = chat_templates.tokenizer(kind), []

    def adds(calls, conversation):
        given.append(calls)
        assert ("tool_calls" in conversation[-1]) == bool(calls)
        return str(sum(calls[0]["arguments"].values())) if calls else None

    environment = scripted.environment(adds, tokenizer, (ADD,))
    conversations = scripted.conversations(environment, scripted.chats(tokenizer, "2 + 3?"), max_new_tokens=400)
    turns = ["I add. " + call('{"a": 2, "b": 3}'), "It is 5."]
    rollout = scripted.talk(conversations, 1, lambda i, turn: turns[turn], tokenizer=tokenizer)
    calls = [{"name": "add", "arguments": {"a": 2, "b": 3}}]
    assert given == [calls, []]
    assert rollout.conversations[0][1:] == [
        {"role": "assistant", "content": "I add.", "tool_calls": [{"type": "function", "function": calls[0]}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    whole = tokenizer.decode(rollout.packed.tokens)
    assert "<tool_response>\n5\n</tool_response>" in whole and rollout.ended.tolist() == [True]


def test_a_malformed_call_is_answered_without_the_environment():
    tokenizer, asked = chat_templates.tokenizer("qwen2.5"), []
    environment = scripted.environment(lambda turn: asked.append(turn), tokenizer, (ADD,))
    conversations = scripted.conversations(environment, scripted.chats(tokenizer, "2 + 3?"), max_new_tokens=600)
    turns = [call('{"a": 2}'), "<tool_call>add", "I cannot."]
    rollout = scripted.talk(conversations, 1, lambda i, turn: turns[turn], tokenizer=tokenizer)
    first, second = (rollout.conversations[0][i] for i in (2, 4))
    assert first["role"] == second["role"] == "tool" and "b" in first["content"] and first != second
    assert asked == [2] and rollout.packed.turn_counts.tolist() == [3]
