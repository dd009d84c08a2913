"""The folder of a run that never was: it learns, drifts, and is caught hacking its reward. For the report's tests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastppo.config import AlarmConfig, Config, EvalConfig, HealthConfig, RewardTrainingConfig, SFTConfig
from fastppo.config.command_line import dump
from fastppo.monitor.run_dir import json_line

# What must never come out as anything but text.
HOSTILE = (
    "</script><script>throw Error('run')</script><img src=x onerror=\"throw Error('image')\">"
    "&amp; \x00\x1b[2J \u202e \ud800 長い"
)
WORDS = (
    " I",
    " loved",
    " it",
    ".",
    " The",
    " film",
    " is",
    " a",
    " bit",
    " long",
    ",",
    " but",
    " quite",
    " moving",
    ".\n",
)


def write_run(
    folder: Path,
    steps: int = 60,
    *,
    seed: int = 0,
    planned: int | None = None,
    hacked: bool = True,
    health: bool = True,
) -> Path:
    """hacked: the judge turns down in the middle, with alarms; planned: steps in the settings, if it is not done."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    config = Config(
        output=str(folder),
        steps=planned or steps,
        seed=seed,
        health=HealthConfig(alarms=(AlarmConfig("judge_gap", 0.5, "stop"),)),
        eval=EvalConfig(every=max(steps // 6, 1)),
    )
    (folder / "config.yaml").write_text(dump(config))
    metrics, responses = [], []
    for step in range(steps + 1):
        done = step / steps
        if step:
            metrics.append({"step": step} | _step(done, chance, hacked, health))
        if step % config.eval.every == 0:
            metrics.append({"step": step} | _evaluation(done, chance, hacked, health))
            responses += [{"step": step} | _heldout(n, done, chance) for n in range(3)]
        if step == 1 or (step and step % max(steps // 6, 1) == 0):
            responses += [{"step": step} | _training(n, chance) for n in range(2)]
    _lines(folder / "metrics.jsonl", metrics)
    _lines(folder / "responses.jsonl", responses)
    if hacked and health:
        _lines(folder / "alarms.jsonl", alarms(steps))
    return folder


def write_stage(folder: Path, config: RewardTrainingConfig | SFTConfig, steps: int = 12) -> Path:
    """A run of SFT or reward modelling, with an evaluation every three steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "alarms.jsonl").touch()
    metrics: list[dict[str, Any]] = []
    for step in range(steps + 1):
        done = step / steps
        loss, right = 0.7 - 0.2 * done, 0.5 + 0.3 * done
        found = {"loss": loss}
        if isinstance(config, RewardTrainingConfig):
            found |= {"accuracy": right, "score_chosen": done, "score_rejected": -done}
        if step:
            update = {"grad_norm": 2 - done, "lr": 1e-4 * (1 - done), "skipped_updates": 0.0, "time/learning": 1.5}
            metrics.append({"step": step} | found | update)
        if step % 3 == 0:
            if isinstance(config, RewardTrainingConfig):
                found |= {"accuracy_low": right - 0.06, "accuracy_high": right + 0.04, "score_std": 1.0}
                found |= {"calibration_error": 0.05, "calibration_error_low": 0.02, "calibration_error_high": 0.1}
            else:
                found |= {"perplexity": math.exp(loss), "tokens": 5120.0}
            metrics.append({"step": step} | {f"eval/{name}": value for name, value in found.items()})
    _lines(folder / "metrics.jsonl", metrics)
    if isinstance(config, RewardTrainingConfig):
        _lines(folder / "reliability.jsonl", map(_bin, range(10)))
    return folder


def _bin(n: int) -> dict[str, Any]:
    ends = {"low": 0.5 + 0.05 * n, "high": 0.55 + 0.05 * n}
    if n == 9:  # no pair is so sure
        return ends | {"pairs": 0, "predicted": None, "observed": None, "observed_low": 0.0, "observed_high": 1.0}
    observed = 0.5 + 0.045 * n
    found = {"predicted": 0.525 + 0.05 * n, "observed": observed}
    return ends | {"pairs": 20} | found | {"observed_low": observed - 0.1, "observed_high": observed + 0.1}


def _step(done: float, chance: random.Random, hacked: bool, health: bool) -> dict[str, float]:
    noise = chance.gauss
    score = 0.9 * (1 - math.exp(-3 * done)) + noise(0, 0.05)
    seconds = {
        "time/sampling": 2.1 + noise(0, 0.1),
        "time/feedback": 0.3 + abs(noise(0, 0.02)),
        "time/experience": 0.6,
        "time/learning": 3.2 + noise(0, 0.1),
    }
    figures = {
        "health/entropy": 3.4 - 1.6 * done + noise(0, 0.05),
        "health/distinct_2": 0.95 - (0.5 * done**2 if hacked else 0.05 * done) + noise(0, 0.01),
        "health/self_bleu": 0.1 + 0.2 * done**2 + noise(0, 0.01),
        "health/kl_sequence": 12 * done**1.4 + abs(noise(0, 0.3)),
        "health/judge_gap": 0.1 + (0.55 * done**3 if hacked else 0.1) + noise(0, 0.02),
        "health/judge": _judge(done, hacked) + noise(0, 0.04),
    }
    return {
        "score": score,
        "reward": score - 0.5 * done,
        "kl": 12 * done**1.4 + noise(0, 0.3),
        "entropy": 3.4 - 1.6 * done,
        "response_length": 20 + 4 * done,
        "ended": 0.2,
        "explained_variance": done - 0.2,
        "clip_fraction": 0.05 + abs(noise(0, 0.02)),
        "policy_loss": noise(0, 0.01),
        "value_loss": 0.4 * math.exp(-4 * done),
        "actor_lr": 1.5e-4 * (1 - done),
        "actor_grad_norm": math.nan if chance.random() < 0.05 else 1 + abs(noise(0, 0.2)),
        "tokens_per_second": 100 + noise(0, 4),
        "time/step": sum(seconds.values()),
        **seconds,
        **(figures if health else {}),
    }


def _evaluation(done: float, chance: random.Random, hacked: bool, health: bool) -> dict[str, float]:
    score = 0.9 * (1 - math.exp(-3 * done)) + chance.gauss(0, 0.02)
    found = {"eval/score": score, "eval/score_error": 0.04, "eval/kl": 12 * done**1.4, "eval/ref_perplexity": 60 + done}
    return found | ({"eval/judge": _judge(done, hacked)} if health else {})


def _judge(done: float, hacked: bool) -> float:
    return 0.2 + (2.2 * done * (1 - done) if hacked else 0.5 * done)


def _heldout(n: int, done: float, chance: random.Random) -> dict[str, Any]:
    prompt = (f"{HOSTILE} prompt", "This early Sirk melodrama, shot in black and white, is", "I saw it twice and")[n]
    text = "".join(chance.choices(WORDS, k=20)) + (HOSTILE if n == 0 else "")
    return {"of": "heldout", "prompt": prompt, "response": text, "score": round(done + chance.gauss(0, 0.1), 3)}


def _training(n: int, chance: random.Random) -> dict[str, Any]:
    tokens = [*chance.choices(WORDS, k=24), HOSTILE]
    return {
        "of": "training",
        "prompt": "One of the better films of the year," if n else HOSTILE,
        "score": chance.random(),
        "tokens": tokens,
        "advantages": [round(chance.gauss(0.3 - n, 1), 3) for _ in tokens],
    }


def alarms(steps: int) -> list[dict[str, Any]]:
    late = [
        {"step": step, "figure": "health/distinct_2", "value": 0.7, "threshold": 0.75, "level": "warn", "action": None}
        | {"message": f"distinct-2 is low {HOSTILE}"}
        for step in range(steps - 30, steps, 10)
        if step > 0
    ]
    stop = {"step": steps, "figure": "judge_gap", "value": 0.6, "threshold": 0.5, "level": "act", "action": "stop"}
    return [*late, stop | {"message": "the judge falls while the score rises: the run ends; the best is step-00000030"}]


def _lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(map(json_line, records)), encoding="utf-8", errors="backslashreplace")
