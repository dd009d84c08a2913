"""What a run does about its alarms: raise the KL coefficient, roll back to a checkpoint from before, or end.

Alarms are the same on every rank, and so is what is done; all ranks call `respond` at the same place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastppo import durable
from fastppo.checkpoint import NAME, Checkpoints, Found
from fastppo.config import Config
from fastppo.engine import World, all_gather
from fastppo.health import Alarm
from fastppo.progress import Progress
from fastppo.track import Tracker

log = logging.getLogger("fastppo")

ENDED = 3  # the exit status of a run that an alarm has ended


def respond(
    alarms: Sequence[Alarm], run: Progress, checkpoints: Checkpoints, tracker: Tracker, config: Config, world: World
) -> Literal["go on", "rolled back", "ended"]:
    """Do what the alarms of a step ask for, the most far-reaching of it.

    A run that has rolled back is at the newest checkpoint from before the alarm, with a coefficient above both its own
    and the one that failed. A run that has ended is at the best one from before, or as it was if there is none.
    """
    health, first = config.health, {alarm.action: alarm for alarm in reversed(alarms)}
    alarm = first.get("stop") or first.get("roll_back")
    if alarm is None:
        if "raise_kl" in first:
            run.beta.value *= health.raise_kl
            log.warning("the KL coefficient is raised to %.4g, since %s", run.beta.value, first["raise_kl"].figure)
        return "go on"
    at, beta = run.step + 1, run.beta.value
    rolling = alarm.action == "roll_back" and run.health.roll_backs < health.roll_backs
    found = checkpoint_before(alarm.good, config, world, best=not rolling)
    if found is not None:
        _go_back(found, run, checkpoints)
    if found is None or not rolling:
        log.error("step %d: the run ends here: %s %s", at, alarm.message, _where(found, alarm, run))
        return "ended"
    run.health.roll_backs += 1
    run.beta.value = max(beta, run.beta.value) * health.raise_kl
    tracker.go_back(run.step, found.position)
    log.warning(
        "step %d: the run rolls back to %s with a KL coefficient of %.4g (roll back %d of at most %d)",
        at,
        found.folder,
        run.beta.value,
        run.health.roll_backs,
        health.roll_backs,
    )
    return "rolled back"


def _where(found: Found | None, alarm: Alarm, run: Progress) -> str:
    """Where a run that ends stands."""
    before = f"It has rolled back {run.health.roll_backs} times. " if alarm.action == "roll_back" else ""
    if found is None:
        return (
            f"{before}No checkpoint up to step {alarm.good} is left, so the actor stays as it is now; a lower"
            " checkpoint.every, or checkpoint.keep_best, would keep one."
        )
    return f"{before}The best checkpoint from before is {found.folder}; the actor goes back to it."


def _go_back(found: Found, run: Progress, checkpoints: Checkpoints) -> None:
    """Weights, optimizers and progress as they were; what alarms have said and done since is not forgotten."""
    alarms, roll_backs = run.health.alarms, run.health.roll_backs
    checkpoints.load(found, run)
    run.health.alarms, run.health.roll_backs = alarms, roll_backs


def checkpoint_before(step: int, config: Config, world: World, *, best: bool = False) -> Found | None:
    """The newest whole checkpoint after at most `step` steps; None if there is none.

    best: the one with the highest held-out score, the judge's if there is a judge; the newest if none was evaluated.
    """
    folder = Path(config.output) / "checkpoints"
    names = [p for p in folder.glob("step-????????") if NAME.fullmatch(p.name) and int(p.name[5:]) <= step]
    for path in all_gather(sorted(names, key=lambda p: (_score(p) if best else 0.0, p.name), reverse=True), world)[0]:
        problem = next((p for p in all_gather(durable.problem(path, world.rank, world.ranks), world) if p), None)
        if problem is None:
            return Found(path, json.loads((path / "about.json").read_text(encoding="utf-8")))
        log.error("%s cannot be used: %s", path, problem)
    return None


def _score(checkpoint: Path) -> float:
    try:
        score = json.loads((checkpoint / "about.json").read_text(encoding="utf-8"))["score"]
        return float("-inf") if score is None else float(score)
    except (OSError, ValueError, KeyError, TypeError):
        return float("-inf")
