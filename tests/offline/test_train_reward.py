"""Whole runs of reward modelling on tiny models, and what they leave behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import tiny
import torch
from stage_runs import evaluations, records
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo.config import Config, DataConfig, ModelConfig, OptimConfig, RewardConfig
from fastppo.config.command_line import REWARD, parse
from fastppo.data.batch import Rollout
from fastppo.data.examples import load_pairs
from fastppo.data.packed import pack
from fastppo.data.prompts import PromptSet, load_prompts
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import start_world
from fastppo.models.loading.offline import initial_head, load_reward_model, set_padding
from fastppo.models.loading.policies import load_reward
from fastppo.models.roles import ModelError
from fastppo.rewards import load_sources, score
from fastppo.train_reward import train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("reward"))


def run(folder: Path, output: Path, **changes: Any) -> Path:
    train(parse(stage_runs.settings(folder, "pairs", output=output, **changes), REWARD), start_world(1))
    return output


@pytest.fixture(scope="module")
def trained(folder):
    return run(folder, folder / "out")


@pytest.fixture(scope="module")
def heldout(folder):
    config = parse(stage_runs.settings(folder, "pairs"), REWARD)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return load_pairs(config.data, tokenizer, heldout=config.eval.examples, context=None)[1]


def test_a_preference_that_can_be_seen_is_learned(trained):
    before, *_, after = evaluations(trained)
    assert after["eval/accuracy"] > 0.95 and after["eval/loss"] < 0.2 < before["eval/loss"]
    assert after["eval/accuracy_low"] < after["eval/accuracy"] <= after["eval/accuracy_high"]
    steps = [r for r in records(trained) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert steps[0]["lr"] > steps[-1]["lr"] > 0
    assert all(isinstance(value, int | float) for record in records(trained) for value in record.values())


def test_the_export_is_a_sequence_classifier_that_scores_as_the_trainer_does(trained, heldout):
    model = AutoModelForSequenceClassification.from_pretrained(trained / "reward_model")
    assert (model.config.num_labels, model.score.weight.shape) == (1, (1, tiny.WIDTH))
    ours, _ = load_reward(str(trained / "reward_model"), torch.float32, CPU)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in heldout.tokens])
        torch.testing.assert_close(ours(heldout.packed), alone, rtol=1e-4, atol=1e-4)
    chosen, rejected = alone.view(-1, 2).unbind(1)
    last = evaluations(trained)[-1]
    assert float((chosen > rejected).float().mean()) == last["eval/accuracy"]
    assert float(chosen.mean()) == pytest.approx(last["eval/score_chosen"], abs=1e-3)


def test_reference_responses_score_zero_on_average_in_transformers_own_hands(trained, heldout):
    """Also in a padded batch: padding is another token than the EOS, with which answers end."""
    model = AutoModelForSequenceClassification.from_pretrained(trained / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "reward_model")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer.pad({"input_ids": heldout.tokens}, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    assert float(scores.std()) > 0.5
    assert abs(float(scores.mean())) < 1e-3


def test_scores_may_be_centred_on_the_chosen_answers_or_not_at_all(folder, tmp_path):
    chosen = evaluations(run(folder, tmp_path / "chosen", centre="chosen", steps=1))[-1]
    assert abs(chosen["eval/score_chosen"]) < 1e-6 < abs(chosen["eval/score_rejected"])
    off = evaluations(run(folder, tmp_path / "off", centre="off", steps=1))[-1]
    assert abs(off["eval/score_chosen"] + off["eval/score_rejected"]) > 1e-3


def test_ppo_takes_the_export_as_a_reward(trained, heldout, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = Config(rewards=(RewardConfig(model=str(trained / "reward_model")),))
    config = replace(config, optim=OptimConfig(dtype="fp32"))
    packed, count = heldout.packed, len(heldout.packed)
    prompts = PromptSet(tuple(map(tuple, heldout.tokens)), ("",) * count, {})
    rollout = Rollout(packed, torch.zeros(len(packed.responses)), torch.ones(count).bool(), torch.arange(count))
    world = start_world(1)
    sources = load_sources(config, tokenizer, world, Residency(CPU))
    scored = score(rollout, prompts, sources, tokenizer, world)
    chosen, rejected = scored.scores.view(-1, 2).unbind(1)
    assert float((chosen > rejected).float().mean()) == evaluations(trained)[-1]["eval/accuracy"]


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_is_scored_in_ppo_and_by_transformers_where_it_was_trained(tmp_path):
    """At the template's last character, here a line break behind the token that ends a turn."""
    folder = stage_runs.prepare(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    output = run(folder, folder / "chat", data__chat="always", data__max_tokens=50, steps=2, eval__examples=8)
    model = AutoModelForSequenceClassification.from_pretrained(output / "reward_model")
    theirs = AutoTokenizer.from_pretrained(output / "reward_model")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    chats = {
        theirs.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}], tokenize=False
        ): (row["prompt"], row[answer])
        for row in rows
        for answer in ("chosen", "rejected")
    }
    config = parse(stage_runs.settings(folder, "pairs", data__chat="always", data__max_tokens=50), REWARD)
    heldout = load_pairs(config.data, tokenizer, heldout=8, context=None)[1]
    texts = [tokenizer.decode(ids) for ids in heldout.tokens]
    assert set(texts) <= set(chats)
    with torch.no_grad():
        batch = theirs(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert float(expected[0::2].mean()) == pytest.approx(evaluations(output)[-1]["eval/score_chosen"], abs=1e-4)

    asked = [chats[text] for text in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in asked))
    data = DataConfig(path=str(folder / "prompts.jsonl"), chat="always")
    prompts = load_prompts(data, tokenizer, prompts_heldout=0, context=None, reserve=0)[0]
    responses = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in asked]
    packed = pack([[*p, *r] for p, r in zip(prompts.tokens, responses, strict=True)], [len(r) for r in responses])
    count, world = len(asked), start_world(1)
    rollout = Rollout(packed, torch.zeros(len(packed.responses)), torch.ones(count).bool(), torch.arange(count))
    ppo = Config(rewards=(RewardConfig(model=str(output / "reward_model")),), optim=OptimConfig(dtype="fp32"))
    sources = load_sources(ppo, tokenizer, world, Residency(CPU))
    said = score(rollout, prompts, sources, tokenizer, world).scores
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_model_that_trains_further_is_scored_where_its_head_was_before(folder, tmp_path):
    """One that pads with its EOS at the token before it, in training as in transformers."""
    start = tiny.classifier(vocabulary=258)
    start.config.pad_token_id = 0  # the EOS
    start.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    output = run(folder, tmp_path / "out", model__path=tmp_path / "model", steps=1, eval__examples=8)
    model = AutoModelForSequenceClassification.from_pretrained(output / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(output / "reward_model")
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    config = parse(stage_runs.settings(folder, "pairs"), REWARD)
    heldout = load_pairs(config.data, tokenizer, heldout=8, context=None)[1]
    assert all(ids[-1] == 0 for ids in heldout.tokens)
    batch = tokenizer.pad({"input_ids": heldout.tokens}, return_tensors="pt")
    ours, _ = load_reward(str(output / "reward_model"), torch.float32, CPU)
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
        torch.testing.assert_close(ours(heldout.packed), scores, rtol=1e-4, atol=1e-4)
    assert float(scores[0::2].mean()) == pytest.approx(evaluations(output)[-1]["eval/score_chosen"], abs=1e-4)


def test_calibration_is_left_bin_by_bin(trained):
    rows = [json.loads(line) for line in (trained / "reliability.jsonl").read_text().splitlines()]
    assert sum(row["pairs"] for row in rows) == 32 and len(rows) == 10
    assert {"predicted", "observed", "observed_low", "observed_high"} < set(rows[0])


def test_the_config_of_the_run_is_left_and_makes_the_same_run(folder, trained):
    assert parse(["--config", str(trained / "config.yaml")], REWARD) == parse(
        stage_runs.settings(folder, "pairs"), REWARD
    )


def test_a_run_ends_early_and_leaves_the_best_model(folder, tmp_path, heldout):
    """At this rate the loss rises and falls at random."""
    changes = {"model__lr": 0.05, "optim__schedule": "constant", "eval__every": 1, "patience": 2, "epochs": 20}
    output = run(folder, tmp_path / "early", **changes)
    start, *losses = [record["eval/loss"] for record in evaluations(output)]
    best = losses.index(min(losses))
    assert losses[best] < start and len(losses) == best + 1 + 2 < 80
    model, _ = load_reward(str(output / "reward_model"), torch.float32, CPU)
    with torch.no_grad():
        chosen, rejected = model(heldout.packed).view(-1, 2).unbind(1)
    found = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert float(found) == pytest.approx(losses[best], rel=1e-3, abs=1e-4)


def test_a_model_that_scores_all_alike_is_half_right_and_left_with_a_warning(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fastppo.models.loading.offline.initial_head", lambda width, seed: torch.zeros(1, width))
    output = run(folder, tmp_path / "alike", model__lr=0, steps=1)
    assert [r["accuracy"] for r in records(output) if "accuracy" in r] == [0.5]
    assert {r["eval/accuracy"] for r in evaluations(output)} == {0.5}
    assert "the scores of all 64 evaluated answers are equal" in caplog.text


def test_the_head_alone_may_train_on_features_that_are_kept(folder, tmp_path):
    output = run(folder, tmp_path / "head", model__train="head", model__lr=0.05, epochs=6)
    before, *_, after = evaluations(output)
    assert after["eval/loss"] < before["eval/loss"]
    model = AutoModelForSequenceClassification.from_pretrained(output / "reward_model")
    start = tiny.causal(vocab_size=258)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, start.model.layers[2].mlp.up_proj.weight)
    anew = run(folder, tmp_path / "anew", model__train="head", model__lr=0.05, epochs=6, keep_trunk_gb=0)
    assert evaluations(anew)[-1]["eval/loss"] == pytest.approx(after["eval/loss"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__dtype": "bf16", "optim__activation_checkpointing": "true", "margin": 0.5, "model__train": "1"},
        {"eval__examples": 0, "model__train": "*.mlp.*", "centre": "off", "track__profile_steps": "[1]"},
        {"eval__every": 0, "zero__stage": 2, "data__too_long": "cut", "data__max_tokens": 12},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_run_with_other_settings_goes_through(folder, tmp_path, changes):
    output = run(folder, tmp_path / "out", steps=2, **changes)
    assert (output / "reward_model/model.safetensors").is_file() and (output / "reliability.jsonl").is_file()


def test_a_new_head_is_that_of_its_seed_and_the_backbone_the_language_models(folder):
    model = load_reward_model(ModelConfig(path=str(folder / "model")), OptimConfig(dtype="fp32"), 5, CPU)
    assert torch.equal(model.head.weight, initial_head(tiny.WIDTH, 5))
    assert torch.equal(model.model.model.norm.weight, tiny.causal(vocab_size=258).model.norm.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gemma2"])
def test_other_families_get_a_head_too(tmp_path, family):
    path = tiny.saved(tmp_path / family, tiny.causal(family))
    model = load_reward_model(ModelConfig(path=path, train="head"), OptimConfig(dtype="fp32"), 1, CPU)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.score.weight"]
    assert not any(p.is_meta for p in model.parameters())


def test_training_may_go_on_from_a_reward_model(trained):
    model = load_reward_model(ModelConfig(path=str(trained / "reward_model")), OptimConfig(dtype="fp32"), 5, CPU)
    again = AutoModelForSequenceClassification.from_pretrained(trained / "reward_model")
    assert torch.equal(model.head.weight, again.score.weight)


def test_a_reward_model_with_two_labels_is_refused(tmp_path):
    path = tiny.saved(tmp_path, tiny.classifier(labels=2))
    with pytest.raises(ModelError, match=r"model.path = .* has 2 labels; a reward model has one"):
        load_reward_model(ModelConfig(path=path), OptimConfig(dtype="fp32"), 1, CPU)
    with pytest.raises(ModelError, match=r"rewards.model = .* has 2 labels"):
        load_reward(path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model__pth": "x"}, 2, "model.pth; did you mean model.path"),
        ({"data__path": "same.jsonl", "data__unusable": "error"}, 1, "chosen and rejected: the two answers are equal"),
    ],
)
def test_the_command_says_what_is_wrong_and_fails(folder, tmp_path, changes, status, words):
    (tmp_path / "same.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    if "data__path" in changes:
        changes["data__path"] = tmp_path / "same.jsonl"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "fastppo/train_reward.py", *stage_runs.settings(folder, "pairs", **changes)]
    command += ["--output", str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == status, found.stderr
    assert words in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("named", "used"), [({"pad_token": "[PAD]", "unk_token": "!"}, "!"), ({"pad_token": "[PAD]"}, None)]
)
def test_no_token_beyond_the_embedding_is_for_padding(tmp_path, caplog, named, used):
    """As with Llama-2, to whose tokenizer users add one that the model does not know."""
    tiny.causal().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer(("[PAD]",))
    tokenizer.add_special_tokens(named)
    model = load_reward_model(ModelConfig(path=str(tmp_path)), OptimConfig(dtype="fp32"), 1, CPU)
    set_padding(model.model, tokenizer)
    model.model.save_pretrained(tmp_path / "left")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "left").config
    assert config.pad_token_id == (None if used is None else tokenizer.convert_tokens_to_ids(used))
    assert ("one text at a time" in caplog.text) == (used is None)


def test_a_reward_model_whose_padding_has_no_embedding_is_refused_with_the_way_out(tmp_path):
    path = tiny.saved(tmp_path, tiny.classifier())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 257}))
    with pytest.raises(ModelError, match=r"rewards.model = .* gives pad_token_id 257, but .* of 257 tokens: set"):
        load_reward(path, torch.float32, CPU)


def test_the_exports_tokenizer_pads_behind_a_text(tmp_path):
    """With padding before it the absolute positions of GPT-2 would shift, and scores with them."""
    tiny.causal("gpt2", vocab_size=258).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer(("<pad>",))
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "left"
    tokenizer.save_pretrained(tmp_path)
    model = load_reward_model(ModelConfig(path=str(tmp_path)), OptimConfig(dtype="fp32"), 1, CPU)
    found = AutoTokenizer.from_pretrained(tmp_path)
    set_padding(model.model, found)
    found.save_pretrained(tmp_path / "left")
    assert AutoTokenizer.from_pretrained(tmp_path / "left").padding_side == "right"
