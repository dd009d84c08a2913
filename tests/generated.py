"""Settings of small runs of `fastppo.generate`, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import tiny

REWARD = """
import random

def letters(prompts, responses, **columns):
    # random numbers of Python's own: a batch that is done again must draw the same
    return [sum("a" <= c <= "z" for c in response) / 8 + random.random() / 10 for response in responses]

def length(prompts, responses, **columns):
    return [len(response) / 10 for response in responses]

def nan(prompts, responses, **columns):
    return [float("nan")] * len(responses)
"""
CHAT = [{"role": "system", "content": "be brief"}]


def prepare(folder: Path) -> Path:
    """A model with a token to pad with, prompts as text and as chats, and reward functions."""
    tiny.causal(vocab_size=258).save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer(("<pad>",))
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder / "model")
    texts = [{"prompt": f"prompt {i}", "answer": i % 3, "score": 7} for i in range(11)]
    chats = [{"prompt": [*CHAT[: i % 2], {"role": "user", "content": f"{i}"}], "answer": i} for i in range(11)]
    for name, rows in (("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def settings(folder: Path, output: Path, **changes: Any) -> list[str]:
    """Changes are given as sampling__rows=1."""
    fixed = {
        "output": output,
        "threads": 1,
        "model.path": folder / "model",
        "rewards": rewards(folder, "letters"),
        "data.path": folder / "texts.jsonl",
        "data.max_prompt_tokens": 48,
        "sampling.max_new_tokens": 6,
        "sampling.samples_per_prompt": 4,
        "batch_size": 6,  # 8 batches, whose ends are within the samples of a prompt
        "microbatch_tokens": 64,
        "dtype": "fp32",
        "plan": "off",  # it takes a second
    }
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def rewards(folder: Path, *functions: str) -> str:
    return json.dumps([{"function": f"{folder}/reward.py:{name}"} for name in functions])


def rows(output: Path) -> list[dict[str, Any]]:
    if (output / "responses.jsonl").exists():
        return [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    parts = sorted((output / "responses").iterdir())
    return [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


def metrics(output: Path) -> list[dict[str, Any]]:
    """But for those that measure time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per_second"))} for line in lines]


def files(output: Path) -> dict[str, bytes]:
    """The files of responses, by name."""
    found = [output / "responses.jsonl", *(output / "responses").glob("*")]
    return {path.name: path.read_bytes() for path in found if path.exists()}
