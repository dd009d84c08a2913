"""Small runs of SFT, reward modelling and DPO: settings and data for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

LONGEST = 20


def prepare(folder: Path) -> Path:
    """A model with a token to pad with, pairs whose preference can be seen, and responses."""
    tiny.causal(vocab_size=258).save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer(("<pad>",))
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder / "model")
    pairs = [{"prompt": f"say {i}", "chosen": "yes" * (1 + i % 3), "rejected": f"no{i}"} for i in range(96)]
    answers = [{"prompt": f"{i} ", "response": "and so on"[: 3 + i % 7]} for i in range(96)]
    for name, rows in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, kind: str, **changes: Any) -> list[str]:
    """kind: `pairs`, `answers` or `dpo`, which learns from the pairs; changes are given as model__lr=1e-3."""
    fixed = {
        "output": folder / "out",
        "threads": 1,
        "model.path": folder / "model",
        "model.lr": 3e-3,
        "data.path": folder / f"{'pairs' if kind == 'dpo' else kind}.jsonl",
        "data.max_tokens": LONGEST,
        "batch_size": 16,
        "epochs": 2,
        "microbatch_tokens": 100,
        "optim.dtype": "fp32",
        "eval.examples": 32,
        "eval.every": 4,
        "checkpoint.every": 0,
        "plan": "off",  # it takes a second, and is tested in test_plan.py
        "track.tensorboard": "false",
    }
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def records(output: Path) -> list[dict[str, Any]]:
    """The metrics but for those that measure time."""
    written = (output / "metrics.jsonl").read_text().rpartition("\n")[0]  # of a run that goes on, whole lines
    lines = [json.loads(line) for line in written.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per_second"))} for line in lines]


def evaluations(output: Path) -> list[dict[str, Any]]:
    return [record for record in records(output) if "eval/loss" in record]
