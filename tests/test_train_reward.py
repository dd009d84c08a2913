"""Whole runs of reward modelling on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastppo.batch import pack
from fastppo.cli import REWARD, parse
from fastppo.config import OptimConfig, RewardConfig
from fastppo.engine import start_world
from fastppo.errors import FastPPOError
from fastppo.load import load_reward, load_scorer
from fastppo.train_reward import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.saved(folder / "model", tiny.causal())
    rows = [{"prompt": f"say {i}", "chosen": f"yes{i}", "rejected": f"no{i % 7}"} for i in range(96)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, **changes: Any) -> list[str]:
    fixed = {
        "output": folder / "out",
        "model.path": folder / "model",
        "model.lr": 3e-3,
        "data.path": folder / "pairs.jsonl",
        "data.max_tokens": 20,
        "batch_size": 16,
        "epochs": 4,
        "microbatch_tokens": 100,
        "optim.dtype": "fp32",
        "eval.examples": 32,
        "eval.every": 5,
        "checkpoint.every": 0,
        "track.tensorboard": "false",
    }
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    train(parse(settings(folder, **changes), REWARD), start_world(1))
    output = Path(changes.get("output", folder / "out"))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict[str, Any]]:
    return run(folder)


def evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "eval/loss" in record]


def test_a_preference_that_can_be_seen_is_learned(records: list[dict[str, Any]]) -> None:
    before, *_, after = evaluations(records)
    assert before["eval/accuracy"] < 0.9 < after["eval/accuracy"]
    assert after["eval/loss"] < 0.3 < before["eval/loss"]
    assert after["eval/accuracy_low"] < after["eval/accuracy"] <= after["eval/accuracy_high"]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 17))
    assert all(isinstance(value, (int, float)) for record in records for value in record.values())
