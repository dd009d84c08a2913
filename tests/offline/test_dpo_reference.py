"""DPO against a reference that is a model of its own: its logprobs, its memory, resuming without it, and mistakes."""

from __future__ import annotations

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import tiny
import torch
import whole_runs
from safetensors.torch import load_file
from stage_runs import LONGEST, evaluations, records
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import train_dpo
from fastppo.config.command_line import DPO, parse
from fastppo.data.examples import Examples, load_pairs
from fastppo.distributed.world import start_world
from fastppo.models.roles import ModelError
from fastppo.offline import loop
from fastppo.offline import reference as reference_module

ROWS = 261  # embeddings of the reference, which nothing else has


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = stage_runs.prepare(tmp_path_factory.mktemp("reference"))
    other(folder, "reference", vocab_size=ROWS)
    return folder


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def other(folder: Path, name: str, **shape: Any) -> Path:
    """A second model with the tokenizer of the one that trains."""
    tiny.causal(seed=7, **shape).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
    return folder / name


def settings(folder: Path, **changes: Any) -> list[str]:
    return stage_runs.settings(folder, "dpo", **{"reference__model": folder / "reference"} | changes)


def logprobs(path: Path, pairs: Examples) -> torch.Tensor:
    """Summed logprobs of both answers, (P, 2) fp64, by transformers, one sequence at a time."""
    model, found = AutoModelForCausalLM.from_pretrained(path).double(), []
    for tokens, length in zip(pairs.tokens, pairs.packed.response_lengths.tolist(), strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            spread = model(ids).logits[0, -length - 1 : -1].log_softmax(-1)
        found.append(spread.gather(1, ids[0, -length:, None]).sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"zero__stage": 0}),
        (1, {"zero__stage": 1, "model__lora__rank": 4}),
        (2, {"zero__stage": 2, "model__train": 1, "microbatch_tokens": 45}),
        (2, {"zero__stage": 3, "zero__offload_frozen": "cpu"}),
    ],
    ids=["stage 0", "adapters", "2 ranks", "2 ranks at stage 3"],
)
def test_log_ratios_are_those_to_the_reference(folder, forks, tmp_path, ranks, changes):
    """Of the held-out pairs before training, and of every pair in the checkpoint."""
    if changes["zero__stage"] == 3:
        split = tmp_path / "split.json"
        split.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        changes = changes | {"zero__deepspeed": split}
    fixed = {"steps": 2, "checkpoint__every": 2, "batch_size": 8, "optim__schedule": "constant"}
    argv = settings(folder, output=tmp_path / "out", **fixed, **changes)
    run = forks.start(argv, ranks, module="fastppo.train_dpo")
    assert forks.wait(run) == [0] * ranks, run.text()
    config, tokenizer = parse(argv, DPO), AutoTokenizer.from_pretrained(folder / "model")
    parts = load_pairs(config.data, tokenizer, heldout=32, context=None, closed=False)
    saved = whole_runs.state(tmp_path / "out")["reference/logprobs.pt"]
    expected = [logprobs(folder / "reference", part) for part in parts]
    for name, sums in zip(("training", "heldout"), expected, strict=True):
        torch.testing.assert_close(saved[name], sums, rtol=1e-5, atol=1e-4)
    margins = (logprobs(folder / "model", parts[1]) - expected[1]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert float(margins.abs().min()) > 1e-3
    assert evaluations(tmp_path / "out")[0]["eval/margin"] == pytest.approx(float(margins.mean()) / 10, rel=1e-4)
    assert "the reference is another model (reference.model = " in run.text() and "should be" not in run.text()


@pytest.mark.slow
def test_a_reference_with_the_weights_of_the_start_changes_nothing(folder, world, tmp_path):
    for name, changes in (("own", {"reference__model": "null"}), ("other", {"reference__model": folder / "model"})):
        train_dpo.train(parse(settings(folder, output=tmp_path / name, steps=3, **changes), DPO), world)
    assert records(tmp_path / "own") == records(tmp_path / "other")
    assert whole_runs.same(*(load_file(tmp_path / name / "model/model.safetensors") for name in ("own", "other")))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_gone_before_the_model_loads(folder, world, tmp_path, monkeypatch, stage):
    """DeepSpeed keeps the modules of its engines; their weights must go all the same."""

    def alive() -> int:
        tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        return sum(each.numel() == ROWS * tiny.WIDTH for each in tensors)

    seen, assemble, asked = [], loop.assemble, reference_module.assemble_reference

    def watched(*arguments: Any) -> Any:
        gc.collect()
        seen.append(alive())
        return assemble(*arguments)

    def loaded(*arguments: Any) -> Any:
        found = asked(*arguments)
        seen.append(alive())
        return found

    monkeypatch.setattr(loop, "assemble", watched)
    monkeypatch.setattr(reference_module, "assemble_reference", loaded)
    gc.collect()
    assert alive() == 0
    train_dpo.train(parse(settings(folder, output=tmp_path / "out", steps=1, zero__stage=stage), DPO), world)
    while_it_is_asked, afterwards = seen
    assert while_it_is_asked >= 1 and afterwards == 0


@pytest.mark.slow
def test_a_run_resumes_without_the_reference(folder, world, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastppo")
    gone = Path(shutil.copytree(folder / "reference", tmp_path / "reference"))
    argv = settings(folder, reference__model=gone, output=tmp_path / "out", checkpoint__every=2, eval__every=2)
    train_dpo.train(parse(argv, DPO), world)
    broken = shutil.copytree(tmp_path / "out", tmp_path / "broken")
    shutil.rmtree(broken / "model")
    for later in sorted((broken / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    shutil.rmtree(gone)
    caplog.clear()
    train_dpo.train(parse([*argv, "--output", str(broken), "--resume", "auto", "--plan", "check"], DPO), world)
    assert "reference.model" not in caplog.text
    assert records(broken) == records(tmp_path / "out")
    assert whole_runs.same(*(load_file(path / "model/model.safetensors") for path in (tmp_path / "out", broken)))


@pytest.mark.parametrize(
    ("shape", "extra", "words"),
    [
        (
            {"vocab_size": 259},
            ("<pad>", "<more>"),
            r"reference.model = .* has another tokenizer than model.path = .* \(259 and 258 tokens\)",
        ),
        ({"vocab_size": 200}, ("<pad>",), r"embeddings of 200 tokens, and model.path has those of 258 tokens. Use a"),
        (
            {"vocab_size": 258, "max_position_embeddings": LONGEST - 1},
            ("<pad>",),
            r"data.max_tokens is 20, but the context of reference.model = .* holds 19. Lower data.max_tokens, or give",
        ),
    ],
    ids=["tokenizer", "embeddings", "context"],
)
def test_a_reference_that_cannot_read_the_pairs_is_refused_before_weights_load(
    folder, world, tmp_path, monkeypatch, shape, extra, words
):
    path = tmp_path / "other"
    tiny.causal(**shape).config.save_pretrained(path)  # no weights
    tokenizer = tiny.tokenizer(extra)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(path)
    monkeypatch.setattr(loop, "assemble", lambda *arguments: pytest.fail("weights are loaded"))
    with pytest.raises(ModelError, match=words):
        train_dpo.train(parse(settings(folder, output=tmp_path / "out", reference__model=path), DPO), world)
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_reference_without_its_folder_is_a_mistake(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(settings(folder, reference__model="null", reference__gguf_file="x.gguf"), DPO)
    assert "reference.gguf_file is x.gguf but reference.model is not set" in capsys.readouterr().err
