"""Whole runs of tiny models."""

import json
import logging
import os
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.errors import FastPPOError
from fastppo.train import train

pytestmark = pytest.mark.slow

REWARD = """
def letters(prompts, responses, **columns):
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.saved(folder / "model", tiny.causal())
    lines = [json.dumps({"prompt": f"prompt {i}"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(REWARD)
    return folder


def settings(folder, **changes):
    fixed = {
        "output": folder / "out",
        "steps": 3,
        "actor.model": folder / "model",
        "rewards": json.dumps([{"function": f"{folder}/reward.py:letters"}]),
        "data.path": folder / "prompts.jsonl",
        "data.max_prompt_tokens": 16,
        "sampling.max_new_tokens": 8,
        "ppo.batch_size": 8,
        "ppo.epochs": 2,
        "ppo.microbatch_tokens": 100,
        "actor.lr": 1e-3,
        "optim.dtype": "fp32",
        "eval.prompts": 4,
        "plan": "off",
    }
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def run(folder, **changes):
    train(parse(settings(folder, **changes)), start_world(1))
    output = changes.get("output", folder / "out")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def records(folder):
    return run(folder)


def test_a_run_records_every_step_and_the_evaluations_around_it(records):
    assert [r["step"] for r in records] == [0, 1, 2, 3, 3]
    assert "eval/score" in records[0] and "eval/score" in records[-1]


def test_every_metric_of_a_step_is_a_number(records):
    policy = ["score", "reward", "kl", "entropy", "response_length", "ended"]
    learning = ["ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "value_loss", "explained_variance"]
    gradients = ["actor_grad_norm", "critic_grad_norm", "actor_lr", "critic_lr"]
    phases = ["sampling", "feedback", "experience", "learning"]
    times = [f"{kind}/{phase}" for phase in phases for kind in ("time", "tokens_per_second")]
    names = policy + learning + gradients + times
    for record in records[1:4]:
        assert all(isinstance(record[name], float) for name in names)


def test_the_first_epoch_starts_at_ratio_one_and_later_epochs_move_on(records):
    assert records[1]["epoch1/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert records[1]["epoch2/approx_kl"] > records[1]["epoch1/approx_kl"]


def test_the_actor_is_left_as_a_hugging_face_directory(folder, records):
    model = AutoModelForCausalLM.from_pretrained(folder / "out/actor")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out/actor")
    assert not torch.equal(model.lm_head.weight, tiny.causal().lm_head.weight)
    text = tokenizer.decode(model.generate(**tokenizer("prompt", return_tensors="pt"), max_new_tokens=3)[0])
    assert text.startswith("prompt")


def test_the_config_of_the_run_is_left_and_makes_the_same_run(folder, records):
    again = parse(["--config", str(folder / "out/config.yaml")])
    assert again == parse(settings(folder))


def test_samples_before_and_after_are_left(folder, records):
    rows = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and set(rows[0]) == {"prompt", "before", "score_before", "after", "score_after"}


def test_responses_of_evaluations_and_of_training_are_left_with_their_steps(folder, records):
    rows = [json.loads(line) for line in (folder / "out/responses.jsonl").read_text().splitlines()]
    assert [(r["step"], r["of"]) for r in rows] == [(s, o) for s, o in PHASES for _ in range(4)]
    heldout = [r for r in rows if r["of"] == "heldout"]
    assert [r["prompt"] for r in heldout[:4]] == [r["prompt"] for r in heldout[4:]]
    samples = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert [r["response"] for r in heldout] == [s["before"] for s in samples] + [s["after"] for s in samples]
    for row in rows[4:8]:
        assert row["prompt"].startswith("prompt ") and 1 <= len(row["tokens"]) == len(row["advantages"]) <= 8


PHASES = [(0, "heldout"), (1, "training"), (3, "heldout")]


def test_the_same_seed_makes_the_same_run(folder, records):
    again = run(folder)
    assert [r.get("score") for r in again] == [r.get("score") for r in records]
    assert [r.get("policy_loss") for r in again] == [r.get("policy_loss") for r in records]


def test_ppo_raises_the_reward_it_is_given(folder):
    changes = {"actor__lr": 3e-3, "ppo__batch_size": 16, "ppo__kl_coef": 0.01, "eval__prompts": 16}
    records = run(folder, steps=40, track__tensorboard="false", **changes)
    assert records[-1]["eval/score"] > records[0]["eval/score"] + 0.1


def test_four_epochs_on_each_batch_do_not_diverge(folder):
    records = run(folder, steps=10, ppo__epochs=4, ppo__batch_size=16, track__tensorboard="false")[1:-1]
    assert all(r["ratio_max"] < 20 and r["approx_kl"] < 0.2 and r["clip_fraction"] < 0.6 for r in records)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": "check"},
        {"critic__kind": "shared", "critic__warmup_steps": 1},
        {"sampling__samples_per_prompt": 4, "ppo__minibatches": 2},
        {"ppo__kl_kind": "exact", "ppo__kl_in": "loss", "ppo__entropy_coef": 0.01, "ppo__dual_clip": 3.0},
        {"ppo__kl_target": 1.0, "ppo__kl_horizon": 100, "sampling__top_p": 0.9, "sampling__temperature": 0.7},
        {"optim__dtype": "bf16", "optim__activation_checkpointing": "true", "critic__warmup_steps": 1},
        {"eval__prompts": 0, "track__profile_steps": "[2]"},
        {"actor__lora__rank": 4, "critic__lora__rank": 2, "optim__dtype": "bf16", "actor__lora__export": "adapters"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_run_with_other_settings_goes_through(folder, changes):
    run(folder, steps=2, **changes)
    if "track__profile_steps" in changes:
        assert list((folder / "out/profile").iterdir())
    if changes.get("actor__lora__export") == "adapters":
        assert json.loads((folder / "out/actor/adapter_config.json").read_text())["r"] == 4


def test_what_is_left_out_of_the_draw_is_said_once_with_what_it_changes(folder, caplog):
    with caplog.at_level("INFO", logger="fastppo"):
        records = run(folder, steps=3, sampling__top_p=0.6, sampling__top_k=40)
    said = [message for message in caplog.messages if "left out of the draw" in message]
    assert len(said) == 1 and said[0].startswith("sampling.top_p 0.6, sampling.top_k 40: ")
    assert f"{records[1]['sampler_error']:.2g} nats" in said[0] and "ppo.importance is token" in said[0]
    assert "ppo.importance auto is token, for sampling.top_p 0.6, sampling.top_k 40" in caplog.messages
    assert records[1]["sampler_error_max"] > records[1]["sampler_error"] and records[1]["sampler_kl"] > 0
    assert records[1]["importance_outside"] == 0  # the sampler's probabilities are the larger ones
    assert records[1]["sampler_error"] == records[1]["health/sampler_error"] > 0.1
    alarms = [json.loads(line) for line in (folder / "out/alarms.jsonl").read_text().splitlines()]
    assert "sampler_error" in {alarm["figure"] for alarm in alarms}


def test_nothing_is_said_of_a_draw_from_the_whole_distribution(folder, caplog):
    with caplog.at_level("INFO", logger="fastppo"):
        records = run(folder, steps=3, optim__dtype="bf16")
    assert not any(word in message for message in caplog.messages for word in ("left out", "sampler_", "importance"))
    assert 0 < records[1]["sampler_error"] < 0.08


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no token ends a response: neither"),
        ({"sampling__ignore_eos": "true"}, "every response has sampling.max_new_tokens = 8"),
        ({"sampling__stop_tokens": '["a"]'}, ""),
    ],
)
def test_a_run_without_any_stop_token_says_so(folder, tmp_path, caplog, changes, said):
    model = tiny.causal()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tiny.saved(tmp_path / "endless", model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "endless")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    caplog.set_level(logging.INFO, "fastppo")
    run(folder, output=tmp_path / "out", steps=0, actor__model=tmp_path / "endless", eval__prompts=0, **changes)
    lines = [
        r.getMessage() for r in caplog.records if "ends a response" in r.getMessage() or "ignore_eos" in r.getMessage()
    ]
    assert len(lines) == bool(said) and all(line.startswith((said, f"sampling.ignore_eos: {said}")) for line in lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__column": "question"}, "question.*prompt"),
        ({"data__max_prompt_tokens": 122, "ppo__microbatch_tokens": 200}, "context holds 128"),
        ({"actor__model": "no/such-model"}, "actor.model = no/such-model"),
        ({"eval__prompts": 41}, "40 usable prompts"),
        ({"data__max_prompt_tokens": 2}, "prompts"),
    ],
)
def test_bad_input_ends_a_run_with_a_message(folder, changes, words):
    with pytest.raises(FastPPOError, match=words):
        run(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"actor__modle": "x"}, 2, "actor.modle; did you mean actor.model"),
        ({"ppo__minibatches": 3}, 2, "batch_size is 8 and ppo.minibatches 3"),
        ({"rewards": '[{"function": "math:nothing"}]'}, 1, "math has no function nothing"),
    ],
)
def test_the_command_says_what_is_wrong_and_fails(folder, changes, status, words):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "fastppo/train.py", *settings(folder, **changes)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == status, found.stderr
    assert words in found.stderr and "Traceback" not in found.stderr
