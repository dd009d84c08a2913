"""Conversations in the engine `vllm` with a stand-in for vLLM; in `test_vllm.py` they are with vLLM itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from test_vllm_engine import made, vllm, world  # noqa: F401 - fixtures
from vllm_ranks import PARTNER, TALKS

from fastppo.data.batch import Prompts, Rollout
from fastppo.distributed import Neighbours, Stopped, stop
from fastppo.environments import ConversationError
from fastppo.models import token_stats
from fastppo.rollout.vllm.drawing import request_seed

PROMPTS = Prompts.of([(75, 76, 77, 78), (79, 80, 81), (90,)], [0, 1, 2, 1], samples=2, first=7)
ENVIRONMENT = """
def silent():
    return None

def hangs():
    time.sleep(30)

def fails(conversation, turn):
    if turn == 1 and "z" in conversation[0]["content"]:
        raise LookupError("no such file")
    return "go on"

class Closing:
    closed = 0

    def reset(self, seed, options):
        return "", {}

    def step(self, action):
        return "", 0.5, True, False, {}

    def close(self):
        time.sleep(0.3)
        Closing.closed += 1
"""


@pytest.fixture
def talking(vllm, made, tmp_path):  # noqa: F811
    """A sampler whose environment is the named one."""
    (tmp_path / "partner.py").write_text(PARTNER + ENVIRONMENT)

    def talking(name: str, **changes: Any) -> tuple[Any, Any]:
        settings = TALKS | {"rollout.environment": f"{tmp_path}/partner.py:{name}"} | changes
        roles, sampler = made(*[part for key, value in settings.items() for part in (f"--{key}", str(value))])
        sampler.sync()
        return roles, sampler

    return talking


def asked(sampler: Any) -> list[Any]:
    return sampler._engine._llm.llm_engine.asked


def parts(rollout: Rollout) -> list[Any]:
    """Of each conversation, by its place."""
    packed = rollout.packed
    lengths, written = packed.lengths.tolist(), packed.response_lengths.tolist()
    columns = [
        *((x.tolist() for x in tensor.split(lengths)) for tensor in (packed.tokens, packed.mask)),
        *((x.tolist() for x in tensor.split(written)) for tensor in (rollout.logprobs, rollout.turn_rewards)),
        rollout.ended.tolist(),
        rollout.conversations,
    ]
    return list(zip(*columns, strict=True))


# What is drawn


def test_conversations_have_the_trainers_logprobs_and_the_environments_observations_and_rewards(talking):
    roles, sampler = talking("answer")
    rollout = sampler.sample(PROMPTS)
    packed = rollout.packed
    with torch.no_grad():
        stats = roles.policy(packed, partial(token_stats, packed.responses, 1.0))
    torch.testing.assert_close(rollout.logprobs, stats.logprobs, atol=1e-5, rtol=0)
    assert packed.turn_counts.max() > 2 and packed.turn_lengths.max() <= 7
    assert rollout.ended.any() and not rollout.ended.all()
    for (tokens, mask, _, rewards, _, said), prompt in zip(parts(rollout), PROMPTS.tokens, strict=True):
        turns = [message["content"] for message in said if message["role"] == "assistant"]
        observed = "".join(message["content"] for message in said[1:] if message["role"] == "user")
        behind = list(zip(tokens, mask, strict=True))[len(prompt) :]
        assert tiny.tokenizer().decode([token for token, wrote in behind if not wrote]) == observed
        assert sum(reward > 0 for reward in rewards) in (len(turns) - 1, len(turns))


def test_each_turn_is_a_request_of_all_tokens_before_it_with_a_seed_and_a_limit_of_its_own(talking):
    _, sampler = talking("answer", seed=3)
    rollout = sampler.sample(PROMPTS)
    expected = []
    for (tokens, mask, *_), prompt, stream in zip(
        parts(rollout), PROMPTS.tokens, PROMPTS.streams.tolist(), strict=True
    ):
        starts = [i for i in range(len(prompt), len(tokens)) if mask[i] and not (i > len(prompt) and mask[i - 1])]
        expected += [
            (tuple(tokens[:start]), request_seed(3, stream, turn), min(7, 30 - (start - len(prompt))))
            for turn, start in enumerate(starts)
        ]
    assert sorted(request[1:] for request in asked(sampler)) == sorted(expected)
    assert len({name for name, *_ in asked(sampler)}) == len(expected) > len(PROMPTS)


def test_seeds_of_turns_fit_and_differ():
    seeds = {request_seed(seed, stream, turn) for seed in range(20) for stream in range(100) for turn in range(10)}
    assert len(seeds) == 20_000 and all(0 <= seed < 2**63 for seed in seeds)


def test_with_an_environment_that_ends_each_conversation_at_once_responses_are_as_without(talking):
    _, sampler = talking("silent", **{"rollout.turn_tokens": 30})
    one = sampler.sample(PROMPTS)
    sampler._engine._environment = None
    other = sampler.sample(PROMPTS)
    for name in ("tokens", "cu_seqlens", "response_cu_seqlens"):
        assert getattr(one.packed, name).equal(getattr(other.packed, name)), name
    assert one.logprobs.equal(other.logprobs) and one.ended.equal(other.ended)
    assert one.conversations and other.conversations is None


def test_a_conversation_does_not_depend_on_when_answers_come(talking):
    """The stand-in computes each response alone; vLLM would round otherwise."""
    quick, slow = (talking(name)[1].sample(PROMPTS) for name in ("answer", "slow"))
    assert parts(quick) == parts(slow)


def test_there_may_be_no_prompts(talking):
    rollout = talking("answer")[1].sample(PROMPTS.select([]))
    assert len(rollout.packed) == 0 and len(rollout.packed.mask) == 0 and rollout.conversations == ()


# Calls of the environment


def test_others_are_drawn_and_asked_while_an_environment_answers(talking, tmp_path):
    """The first call returns only after all others, of which some are of turns that end later."""
    (tmp_path / "patient.py").write_text(
        "import threading\n"
        "calls, first = threading.Semaphore(0), threading.Lock()\n"
        "def patient():\n"
        "    if not first.acquire(blocking=False):\n"
        "        return calls.release()\n"
        f"    assert all(calls.acquire(timeout=60) for _ in range({len(PROMPTS) - 1}))\n"
    )
    _, sampler = talking("silent", **{"rollout.environment": f"{tmp_path}/patient.py:patient"})
    packed = sampler.sample(PROMPTS).packed
    assert packed.turn_counts.tolist() == [1] * len(PROMPTS) and len(set(packed.response_lengths.tolist())) > 1


def test_an_environment_that_fails_in_one_conversation_ends_sampling_with_its_reason(talking, vllm):  # noqa: F811
    _, sampler = talking("fails")
    with pytest.raises(
        ConversationError, match=r"partner.py:fails raised LookupError: no such file \(partner.py:\d+\)"
    ):
        sampler.sample(PROMPTS)
    assert vllm.events[-1][0] == "abort" and not sampler._engine._llm.llm_engine.running


def test_instances_that_take_time_to_close_are_waited_for(talking):
    _, sampler = talking("Closing")
    rollout = sampler.sample(PROMPTS)
    kind = sampler._engine._environment.called
    assert kind.closed == len(PROMPTS) and rollout.rewards_of_turns.tolist() == [0.5] * len(PROMPTS)


def test_sampling_that_is_told_to_stop_leaves_while_an_environment_answers(talking, monkeypatch):
    _, sampler = talking("hangs")
    asked_to = threading.Event()
    threading.Timer(1.0, asked_to.set).start()
    monkeypatch.setattr(stop, "check_alone", partial(raise_if, asked_to))
    start = time.monotonic()
    with pytest.raises(Stopped):
        sampler.sample(PROMPTS)
    assert time.monotonic() - start < 25  # before the call returns


def raise_if(asked_to: threading.Event, *_: Any) -> None:
    if asked_to.is_set():
        raise Stopped


# Ranks that sample together


class Rank(Neighbours):
    """One of two ranks, which are threads of this process."""

    def __init__(self, index: int, parts: list[Any], barrier: threading.Barrier):
        super().__init__(index, 2)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, part: Any) -> list[Any]:
        self.parts[self.index] = part
        self.barrier.wait(timeout=30)
        parts = list(self.parts)
        self.barrier.wait(timeout=30)
        return parts

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))


@pytest.fixture
def two(talking):
    """The outcomes of two ranks that sample together, and their samplers."""

    def two(name: str, split: int) -> tuple[list[Any], list[Any]]:
        samplers, shared = [talking(name)[1] for _ in range(2)], ([None, None], threading.Barrier(2))
        for index, sampler in enumerate(samplers):
            sampler._engine._together = Rank(index, *shared)
        prompts = [PROMPTS.select(range(split)), PROMPTS.select(range(split, len(PROMPTS)))]
        with ThreadPoolExecutor(2) as threads:
            running = [threads.submit(one.sample, part) for one, part in zip(samplers, prompts, strict=True)]
            return [one.exception() or one.result() for one in running], samplers

    return two


@pytest.mark.parametrize("split", [0, 3])
def test_ranks_that_hold_one_copy_ask_the_same_in_the_same_order_and_keep_their_own(talking, two, split):
    """Whenever the answers to each come; also one without prompts, which takes part all the same."""
    rollouts, samplers = two("slow", split)
    assert asked(samplers[0]) == asked(samplers[1])
    whole = parts(talking("answer")[1].sample(PROMPTS))
    assert parts(rollouts[0]) + parts(rollouts[1]) == whole


@pytest.mark.parametrize("split", [4, 6])
def test_an_environment_that_fails_on_one_rank_ends_all_that_sample_together(two, split):
    """The prompts are the fifth and the sixth: of the second rank, or of the first."""
    errors, samplers = two("fails", split)
    assert all(isinstance(error, ConversationError) for error in errors)
    assert str(errors[0]) == str(errors[1]) and "LookupError: no such file" in str(errors[0])
    assert not any(sampler._engine._llm.llm_engine.running for sampler in samplers)


def test_ranks_that_sample_together_stop_together_while_an_environment_answers(two, monkeypatch):
    asked_to = threading.Event()
    threading.Timer(1.0, asked_to.set).start()

    def check_among(neighbours: Neighbours) -> None:
        if neighbours.any(neighbours.index == 0 and asked_to.is_set()):
            raise Stopped

    monkeypatch.setattr(stop, "check_among", check_among)
    monkeypatch.setattr(stop, "check_alone", lambda: pytest.fail("one of them alone"))
    start = time.monotonic()
    outcomes, _ = two("hangs", 0)
    assert all(isinstance(outcome, Stopped) for outcome in outcomes) and time.monotonic() - start < 25
