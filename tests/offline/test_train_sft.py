"""Whole runs of supervised fine-tuning on tiny models, and what they leave behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import torch
from stage_runs import evaluations, records
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.config.command_line import SFT, parse
from fastppo.data.examples import Examples, load_answers
from fastppo.distributed.world import start_world
from fastppo.errors import TrainingFault
from fastppo.train_sft import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("sft"))


def run(folder: Path, output: Path, **changes: Any) -> Path:
    train(parse(stage_runs.settings(folder, "answers", output=output, **changes), SFT), start_world(1))
    return output


@pytest.fixture(scope="module")
def trained(folder):
    return run(folder, folder / "out")


@pytest.fixture(scope="module")
def heldout(folder):
    config = parse(stage_runs.settings(folder, "answers"), SFT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return load_answers(config.data, tokenizer, heldout=config.eval.examples, context=None)[1]


def loss_of_transformers(path: Path, examples: Examples) -> float:
    """Transformers' own loss over the response tokens of all examples."""
    model = AutoModelForCausalLM.from_pretrained(path)
    total = 0.0
    for tokens, length in zip(examples.tokens, examples.response_lengths.tolist(), strict=True):
        labels = [-100] * (len(tokens) - length) + tokens[-length:]
        with torch.no_grad():
            total += float(model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss) * length
    return total / len(examples.packed.responses)


def test_the_heldout_loss_falls_and_perplexity_is_its_exponential(trained):
    before, *_, after = evaluations(trained)
    assert after["eval/loss"] < 0.7 * before["eval/loss"]
    assert after["eval/perplexity"] == pytest.approx(math.exp(after["eval/loss"]))
    assert [r["step"] for r in records(trained) if "loss" in r] == list(range(1, 9))


def test_the_loss_is_transformers_own_on_the_responses_alone(trained, folder, heldout):
    before, *_, after = evaluations(trained)
    assert before["eval/loss"] == pytest.approx(loss_of_transformers(folder / "model", heldout), rel=1e-4)
    assert after["eval/loss"] == pytest.approx(loss_of_transformers(trained / "model", heldout), rel=1e-4)


def test_the_export_writes_what_it_learned(folder, trained):
    """Each response begins with `and`."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    ids = tokenizer("5 ", return_tensors="pt")["input_ids"]
    wanted = tokenizer("and", return_tensors="pt")["input_ids"]
    surprise = []
    for path in (folder / "model", trained / "model"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(torch.cat([ids, wanted], dim=1)).logits
        surprise.append(float(torch.nn.functional.cross_entropy(logits[0, 1:4], wanted[0])))
    assert surprise[1] < 0.7 * surprise[0]


def test_a_loss_that_is_not_finite_is_not_applied_and_too_many_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.offline.sft.response_logprobs", lambda role, hidden, targets: hidden.sum() * math.nan)
    changes = {"optim__max_skipped": 1, "eval__examples": 0, "model__train": "1"}
    with pytest.raises(TrainingFault, match=r"2 updates in a row .* optim.max_skipped is 1"):
        run(folder, tmp_path / "out", **changes)
    monkeypatch.undo()
    once = run(folder, tmp_path / "once", steps=1, optim__max_skipped=1, eval__examples=0)
    assert records(once)[0]["skipped_updates"] == 0


def test_a_model_no_better_than_its_start_is_left_with_a_warning(folder, trained, tmp_path, caplog):
    changes = {"model__path": trained / "model", "model__lr": 1.0, "eval__every": 1, "patience": 2}
    output = run(folder, tmp_path / "worse", **changes)
    start, *losses = [record["eval/loss"] for record in evaluations(output)]
    assert start < min(losses) and len(losses) == 2
    words = f"was {start:.4f} before training and never lower after it (at best {min(losses):.4f}): the exported"
    assert words in caplog.text and "Lower model.lr (1)" in caplog.text
    assert (output / "model/model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__dtype": "bf16", "optim__activation_checkpointing": "true", "model__train": "1", "patience": 1},
        {"eval__examples": 0, "model__train": "*.mlp.*", "zero__stage": 2},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_run_with_other_settings_goes_through(folder, tmp_path, changes):
    assert (run(folder, tmp_path / "out", steps=2, **changes) / "model/model.safetensors").is_file()
