"""Conversations in the trainer's own process: rows wait with their cache, and are extended by what is observed.

The oracle is the model's own forward pass over the whole conversation.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from test_graphs import recorder  # noqa: F401 - a fixture

from fastppo.config import GENERATE
from fastppo.config.command_line import parse
from fastppo.data.batch import Prompts, Rollout
from fastppo.data.prompts import PromptSet
from fastppo.distributed import Stopped, stop
from fastppo.environments import ConversationError, load_environment
from fastppo.errors import FastPPOError
from fastppo.models import attention
from fastppo.models.cache import Cache
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout.answers import check_rollout
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.inprocess import sample

TOKENIZER = tiny.tokenizer()
TEXTS = [f"prompt {i}: {'word ' * (i % 5)}" for i in range(20)]
STOPS = [0, *range(10, 257, 12)]

ENVIRONMENT = """
import time

def answer(conversation, turn, seed, delay=None):
    said = conversation[-1]["content"]
    number = (sum(map(ord, said)) + seed) % 6
    if delay:
        time.sleep(delay[turn % len(delay)])
    return None if number == 0 else ("o" * number + str(turn), number / 4)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    (folder / "partner.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def actor():
    return Policy(fuse_head(tiny.causal()))


def prompts_of(count=12, samples=1, order=None, **columns):
    tokens = tuple(tuple(TOKENIZER(text)["input_ids"]) for text in TEXTS)
    data = PromptSet(tokens, tuple(TEXTS), {name: [value] * len(TEXTS) for name, value in columns.items()})
    prompts = Prompts.of(tokens, range(count), first=5, samples=samples, data=data)
    return prompts if order is None else prompts.select(order)


def settings_of(folder: Path, function="answer", **changes):
    fixed = {"model.path": "none", "data.path": "none", "rollout.environment": f"{folder}/partner.py:{function}"}
    fixed |= {"rollout.turn_tokens": 7, "rollout.max_turns": 4, "sampling.max_new_tokens": 30, "sampling.rows": 8}
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return parse([part for name, value in changed.items() for part in (f"--{name}", str(value))], GENERATE)


def talk(actor, folder, prompts=None, *, seed=3, **changes) -> Rollout:
    config = settings_of(folder, **changes)
    prompts = prompts_of() if prompts is None else prompts
    environment = load_environment(config, TOKENIZER)
    rollout = sample(actor, prompts, config.sampling, stop_ids=STOPS, seed=seed, environment=environment)
    longest = config.sampling.max_new_tokens
    check_rollout(rollout, prompts, "rollout.engine = inprocess", longest=longest, vocabulary=257)
    return rollout


def parts(rollout: Rollout):
    """Of each conversation, by its place."""
    packed = rollout.packed
    for i in range(len(packed)):
        start, end = packed.cu_seqlens[i : i + 2].tolist()
        first, last = packed.response_cu_seqlens[i : i + 2].tolist()
        yield (
            *(packed.tokens[start:end].tolist(), packed.mask[start:end].tolist()),
            *(rollout.logprobs[first:last].tolist(), rollout.turn_rewards[first:last].tolist()),
            *(bool(rollout.ended[i]), rollout.conversations[i]),
        )


def assert_logprobs_of_a_whole_pass(model, rollout: Rollout) -> None:
    for tokens, mask, logprobs, *_ in parts(rollout):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        written = [i for i, wrote in enumerate(mask) if wrote]
        expected = [float(logits[i - 1, tokens[i]]) for i in written]
        assert logprobs == pytest.approx(expected, abs=2e-4)


def test_conversations_have_turns_observations_and_rewards(actor, folder):
    rollout = talk(actor, folder)
    counts = rollout.packed.turn_counts.tolist()
    assert set(counts) > {1, 2} and max(counts) <= 4
    assert rollout.packed.turn_lengths.max() <= 7
    behind = rollout.packed.lengths - rollout.packed.prompt_lengths
    assert behind.max() <= 30 and (behind > rollout.packed.response_lengths).any()
    assert rollout.turn_rewards.max() > 0 and rollout.ended.any() and not rollout.ended.all()
    for (tokens, mask, *_, said), turns in zip(parts(rollout), counts, strict=True):
        assert [message["role"] for message in said][: 2 * turns] == ["user", "assistant"] * turns
        observed = "".join(message["content"] for message in said[2 : 2 * turns : 2])
        behind = tokens[len(TOKENIZER(said[0]["content"])["input_ids"]) :]
        read = [token for token, written in zip(behind, mask[-len(behind) :], strict=True) if not written]
        assert TOKENIZER.decode(read) == observed


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_neox"])
def test_each_written_token_has_the_logprob_of_a_pass_over_the_whole_conversation(folder, family):
    """With a window, a soft cap, grouped heads and learned positions too."""
    model = tiny.causal(family)
    rollout = talk(Policy(fuse_head(tiny.causal(family))), folder)
    assert_logprobs_of_a_whole_pass(model, rollout)
    assert rollout.packed.turn_counts.max() > 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_long_observation_is_read_in_parts(folder, monkeypatch, family):
    """Of queries, and of rows: more tokens than prompts have are computed in several passes."""
    monkeypatch.setattr("fastppo.models.plain_attention.QUERIES", 5)
    (folder / "long.py").write_text("def long(turn):\n    return None if turn == 2 else 'much to read, ' * 5\n")
    passes, prefill = [], Policy.prefill
    monkeypatch.setattr(
        Policy, "prefill", lambda self, tokens, *rest: passes.append(len(tokens)) or prefill(self, tokens, *rest)
    )
    model = tiny.causal(family)
    changes = {"rollout__environment": f"{folder}/long.py:long", "sampling__max_new_tokens": 200}
    rollout = talk(Policy(fuse_head(tiny.causal(family))), folder, **changes)
    assert_logprobs_of_a_whole_pass(model, rollout)
    assert max(passes) <= 8 * int(rollout.packed.prompt_lengths.max()) < 8 * 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [4, 24])
def test_a_conversation_does_not_depend_on_rows_order_or_others(folder, rows, dtype):
    actor = Policy(fuse_head(tiny.causal(dtype=dtype)))
    whole = list(parts(talk(actor, folder, prompts_of(samples=2))))
    order = list(range(24))
    random.Random(rows).shuffle(order)
    other = list(parts(talk(actor, folder, prompts_of(samples=2, order=order), sampling__rows=rows)))
    assert other == [whole[i] for i in order]
    alone = list(parts(talk(actor, folder, prompts_of(samples=2, order=order[:3]))))
    assert alone == [whole[i] for i in order[:3]]


def test_a_conversation_does_not_depend_on_when_answers_come(actor, folder):
    prompt = prompts_of(delay=[])
    slow = prompts_of(delay=[0.0, 0.03, 0.01])
    assert list(parts(talk(actor, folder, prompt))) == list(parts(talk(actor, folder, slow)))


def test_recorded_steps_write_the_same_conversations(folder, recorder):  # noqa: F811
    actor = Policy(fuse_head(tiny.causal(dtype=torch.bfloat16)))
    recorded = list(parts(talk(actor, folder, prompts_of(samples=2))))
    assert recorder.recorded and recorder.replays
    assert recorded == list(parts(talk(actor, folder, prompts_of(samples=2), sampling__cuda_graphs="false")))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["flash", "varlen", "sdpa"])
def test_on_a_gpu_conversations_are_the_same_recorded_or_not_and_have_the_logprobs_of_a_whole_pass(folder, setting):
    try:
        attention.choose_attention(setting, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    except FastPPOError as error:
        pytest.skip(str(error))
    model = tiny.causal(dtype=torch.bfloat16).to("cuda")
    actor = Policy(fuse_head(tiny.causal(dtype=torch.bfloat16))).to("cuda")
    recorded, launched = (
        talk(actor, folder, prompts_of(samples=2), sampling__cuda_graphs=graphs) for graphs in ("true", "false")
    )
    attention.compute_with(None)
    assert list(parts(recorded)) == list(parts(launched))
    for tokens, mask, logprobs, *_ in parts(recorded):
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device="cuda")).logits[0].float().log_softmax(-1).cpu()
        expected = [float(logits[i - 1, tokens[i]]) for i, wrote in enumerate(mask) if wrote]
        assert logprobs == pytest.approx(expected, abs=0.2)


def test_with_an_environment_that_ends_each_conversation_at_once_responses_are_as_without(actor, folder):
    (folder / "silent.py").write_text("def silent(conversation):\n    return None\n")
    config = settings_of(folder, rollout__environment=f"{folder}/silent.py:silent", rollout__turn_tokens=30)
    environment = load_environment(config, TOKENIZER)
    one, other = (
        sample(actor, prompts_of(), config.sampling, stop_ids=STOPS, seed=3, environment=each)
        for each in (None, environment)
    )
    for name in ("tokens", "cu_seqlens", "response_cu_seqlens", "predictors"):
        assert torch.equal(getattr(one.packed, name), getattr(other.packed, name)), name
    assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.ended, other.ended)


def test_other_rows_are_decoded_while_an_environment_answers(actor, folder, monkeypatch):
    """The call for the first prompt returns only after further decode steps."""
    (folder / "patient.py").write_text(
        "import threading\n"
        "steps = threading.Semaphore(0)\n"
        "def patient(conversation):\n"
        "    if 'prompt 0' not in conversation[0]['content']:\n"
        "        return 'go on'\n"
        "    while steps.acquire(blocking=False):\n"
        "        pass\n"
        "    assert all(steps.acquire(timeout=60) for _ in range(3))\n"
    )
    step = Decoder.step

    def counted(self, at):
        step(self, at)
        sys.modules["patient"].steps.release()

    monkeypatch.setattr(Decoder, "step", counted)
    rollout = talk(actor, folder, prompts_of(18), rollout__environment=f"{folder}/patient.py:patient")
    assert rollout.packed.turn_counts[0] == 1 and rollout.packed.turn_counts[1:].min() > 1


def test_a_row_is_extended_and_not_computed_again(actor, folder, monkeypatch):
    prefilled, extended = [], []
    prefill, extend = Cache.begin_prefill, Cache.begin_extension

    def counted_prefill(self, lengths, rows):
        prefilled.extend(lengths[: len(rows)])
        prefill(self, lengths, rows)

    def counted_extension(self, lengths, rows, before, kept):
        extended.extend(lengths[:kept])  # without what fills a product up
        extend(self, lengths, rows, before, kept)

    monkeypatch.setattr(Cache, "begin_prefill", counted_prefill)
    monkeypatch.setattr(Cache, "begin_extension", counted_extension)
    packed = talk(actor, folder).packed
    assert sum(prefilled) == int(packed.prompt_lengths.sum())
    turns = int((packed.turn_counts - 1).sum())
    observed = int((packed.lengths - packed.prompt_lengths - packed.response_lengths).sum())
    assert len(extended) == turns  # and of each turn the newest one or two tokens, which the cache does not hold
    assert observed + turns <= sum(extended) <= observed + 2 * turns


def test_an_environment_that_fails_in_one_conversation_ends_sampling_with_its_reason(actor, folder):
    (folder / "fails.py").write_text(
        "def fails(conversation, turn):\n"
        "    if 'prompt 7' in conversation[0]['content'] and turn == 1:\n"
        "        raise LookupError('no such file')\n"
        "    return 'go on'\n"
    )
    with pytest.raises(ConversationError, match=r"fails.py:fails raised LookupError: no such file \(fails.py:3\)"):
        talk(actor, folder, rollout__environment=f"{folder}/fails.py:fails")


def test_instances_that_take_time_to_close_are_waited_for(actor, folder):
    (folder / "closing.py").write_text(
        "import time\n"
        "class Closing:\n"
        "    closed = 0\n"
        "    def reset(self, seed, options):\n"
        "        return '', {}\n"
        "    def step(self, action):\n"
        "        return '', 0.5, True, False, {}\n"
        "    def close(self):\n"
        "        time.sleep(0.3)\n"
        "        Closing.closed += 1\n"
    )
    rollout = talk(actor, folder, rollout__environment=f"{folder}/closing.py:Closing")
    assert rollout.rewards_of_turns.tolist() == [0.5] * 12
    assert sys.modules["closing"].Closing.closed == 12


def test_sampling_that_is_told_to_stop_leaves_while_an_environment_answers(actor, folder, monkeypatch):
    (folder / "hangs.py").write_text("import time\ndef hangs(conversation):\n    time.sleep(30)\n")
    asked = threading.Event()
    threading.Timer(1.0, asked.set).start()

    def check_alone():
        if asked.is_set():
            raise Stopped("test")

    monkeypatch.setattr(stop, "check_alone", check_alone)
    start = time.monotonic()
    with pytest.raises(Stopped):
        talk(actor, folder, rollout__environment=f"{folder}/hangs.py:hangs")
    assert time.monotonic() - start < 25  # before the call returns


def test_there_may_be_no_prompts(actor, folder):
    rollout = talk(actor, folder, prompts_of(order=[]))
    assert len(rollout.packed) == 0 and len(rollout.packed.mask) == 0 and rollout.conversations == ()
