"""A task with a checkable answer: the largest of four numbers, `max(23,45,67,12)=` -> `67`, by RL after a short SFT.

`bench/estimators.py --task arithmetic` runs it. SmolLM2-135M-Instruct. The answer of a demonstration is any of its four
numbers, so that SFT teaches what an answer looks like, and a quarter of its answers are right; RL draws eight answers
to a prompt, each worth 1 if it is right and 0 if not. The numbers of held-out prompts are in no demonstration and in no
training prompt. On these prompts, before and after RL: the share of responses that are a number of two digits and then
end (format), and the share that is right, at temperature 1, eight to a prompt; the share of prompts with a right one
among the eight; and the share of prompts whose most likely response is right.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fastppo.monitor import read_lines

HERE = Path(__file__)
SFT, RL = HERE.with_name("arithmetic-sft.yaml"), HERE.with_name("arithmetic.yaml")
OPERANDS = 4  # of a prompt
DEMONSTRATIONS, TRAINING, HELDOUT = 192, 4096, 256  # prompts
HELDOUT_NUMBERS = 20
SAMPLES = 8  # of each held-out prompt


def right(responses: list[str], answer: list[str]) -> list[bool]:
    """The reward. A response that was cut is longer than any answer."""
    return [response == a for response, a in zip(responses, answer, strict=True)]


def number(responses: list[str]) -> list[bool]:
    """Whether a response has the format: a number of two digits, and the end."""
    return [re.fullmatch(r"[0-9]{2}", response) is not None for response in responses]


@dataclass(frozen=True)
class Data:
    """Files of rows with a prompt, its `answer`, and a `response` that is any of the prompt's numbers."""

    demonstrations: Path
    training: Path
    heldout: Path


def write_data(folder: Path, seed: int = 0) -> Data:
    """The numbers of held-out prompts are in no other file; the answer of a demonstration is any of its numbers."""
    chance = random.Random(seed)
    numbers = list(range(10, 100))
    chance.shuffle(numbers)
    apart, others = numbers[:HELDOUT_NUMBERS], numbers[HELDOUT_NUMBERS:]
    folder.mkdir(parents=True, exist_ok=True)
    data = Data(*(folder / f"{name}.jsonl" for name in ("demonstrations", "training", "heldout")))
    _write(data.heldout, HELDOUT, apart, chance)
    _write(data.training, TRAINING, others, chance)
    _write(data.demonstrations, DEMONSTRATIONS, others, chance)
    return data


def _write(path: Path, count: int, numbers: Sequence[int], chance: random.Random) -> None:
    drawn = (chance.sample(numbers, OPERANDS) for _ in range(count))
    rows = (
        {"prompt": f"max({','.join(map(str, x))})=", "answer": str(max(x)), "response": str(chance.choice(x))}
        for x in drawn
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass(frozen=True)
class Accuracy:
    """Of a model on the held-out prompts; shares."""

    format: float  # of the responses at temperature 1
    right: float
    any_right: float  # of the prompts
    greedy: float  # right, of the most likely responses


def ran(script: str, *settings: object) -> None:
    subprocess.run(["deepspeed", f"fastppo/{script}.py", *map(str, settings)], stdout=sys.stderr, check=True)


def sft(folder: Path, data: Data, *settings: object) -> Path:
    """The model that RL starts from; the one that is there already, if it is."""
    output = folder / "sft"
    if not (output / "model").exists():
        ran("train_sft", "--config", SFT, "--data.path", data.demonstrations, "--output", output, *settings)
    return output / "model"


def rl(seed: int, model: Path, data: Data, output: Path) -> list[object]:
    """The settings of `train`, but for the estimator's."""
    return [
        *("--config", RL, "--seed", seed, "--output", output, "--actor.model", model),
        *("--data.path", data.training, "--data.eval_path", data.heldout, "--eval.prompts", HELDOUT),
        *("--rewards", functions("right"), "--health.judge", functions("number")),
    ]


def functions(name: str) -> str:
    return json.dumps([{"function": f"{HERE}:{name}"}])


def measure(model: Path, data: Data, output: Path, *settings: object) -> Accuracy:
    drawn, likeliest = output / "drawn", output / "likeliest"
    _generate(model, data, drawn, "--sampling.samples_per_prompt", SAMPLES, *settings)
    _generate(model, data, likeliest, "--sampling.top_k", 1, *settings)
    rows = read_lines(drawn / "responses.jsonl")
    prompts = {row["prompt_index"] for row in rows if row["score"]}
    return Accuracy(
        format=fmean(row["judge"] for row in rows),
        right=fmean(row["score"] for row in rows),
        any_right=len(prompts) * SAMPLES / len(rows),
        greedy=fmean(row["score"] for row in read_lines(likeliest / "responses.jsonl")),
    )


def _generate(model: Path, data: Data, output: Path, *settings: object) -> None:
    """Responses of a model, unless they are there already."""
    if (output / "responses.jsonl").exists():
        return
    ran(
        *("generate", "--model.path", model, "--data.path", data.heldout, "--output", output),
        *(
            "--rewards",
            functions("right"),
            "--judge",
            functions("number"),
            "--sampling.max_new_tokens",
            5,
            "--dtype",
            "auto",
        ),
        *settings,
    )
