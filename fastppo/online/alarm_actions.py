"""What a run does about its alarms: raise the KL coefficient, roll back to a checkpoint from before, or end.

Alarms are the same on every rank, and so is what is done; all ranks call `act_on_alarms` at the same place.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from fastppo.checkpoint import Checkpoint, Checkpoints, RollbackRecord, alarm_settings, atomic_dir, held_out_score
from fastppo.config import OnlineConfig
from fastppo.distributed import World, all_gather
from fastppo.monitor import ALARMS, ROLLBACK_ACTIONS, Alarm, Tracker, file_sizes
from fastppo.online.progress import Progress

log = logging.getLogger("fastppo")

ENDED = 3  # the exit status of a run that an alarm has ended


def act_on_alarms(
    alarms: Sequence[Alarm],
    run: Progress,
    checkpoints: Checkpoints,
    tracker: Tracker,
    config: OnlineConfig,
    world: World,
) -> Literal["go on", "rolled back", "ended"]:
    """Do what the alarms of a step ask for, the most far-reaching of it.

    A run that has rolled back is at the newest checkpoint from before the alarm, with a coefficient above both its own
    and the one that failed. A run that has ended is at the best one from before, or as it was if there is none.
    """
    health, by_action = config.health, {alarm.action: alarm for alarm in reversed(alarms)}
    alarm = by_action.get("stop") or by_action.get("roll_back")
    if alarm is None:
        if "raise_kl" in by_action:
            run.kl_coef *= health.raise_kl
            _log(world, logging.WARNING, f"the KL coefficient is raised to {run.kl_coef:.4g}")
        return "go on"
    at, beta = f"step {run.step + 1}", run.kl_coef
    rolling = alarm.action == "roll_back" and run.health.roll_backs < health.roll_backs
    good = min(other.good for other in alarms if other.action in ROLLBACK_ACTIONS)
    checkpoint = checkpoint_before(good, config, world, best=not rolling)
    if checkpoint is not None:
        _go_back(checkpoint, run, checkpoints)
    if checkpoint is None or not rolling:
        _log(
            world,
            logging.ERROR,
            f"{at}: the run ends here: {alarm.message} {_where_it_ends(checkpoint, good, alarm, run)}",
        )
        if checkpoint is not None:
            run.ended = replace(
                _rollback_record(checkpoint, run, config),
                ended=f"{at}: {alarm.message}",
                levels=alarm_settings(config),
            )
        return "ended"
    run.health.roll_backs += 1
    run.kl_coef = max(beta, run.kl_coef) * health.raise_kl
    tracker.roll_back(run.step, checkpoint.sizes)
    if world.rank == 0:
        _rollback_record(checkpoint, run, config).write(checkpoint.folder.parent)
    _log(
        world,
        logging.WARNING,
        f"{at}: the run rolls back to {checkpoint.folder}, with a KL coefficient of {run.kl_coef:.4g}; roll back"
        f" {run.health.roll_backs} of at most {health.roll_backs}",
    )
    return "rolled back"


def _log(world: World, level: int, message: str) -> None:
    if world.rank == 0:  # every rank does the same
        log.log(level, message)


def _where_it_ends(checkpoint: Checkpoint | None, good: int, alarm: Alarm, run: Progress) -> str:
    """Where a run that ends stands."""
    before = f"Roll backs so far: {run.health.roll_backs}. " if alarm.action == "roll_back" else ""
    if checkpoint is None:
        return (
            f"{before}No checkpoint up to step {good} is left, so the actor stays as it is now; a lower"
            " checkpoint.every, or checkpoint.keep_best, would keep one."
        )
    return f"{before}The best checkpoint from before is {checkpoint.folder}; the actor goes back to it."


def _go_back(checkpoint: Checkpoint, run: Progress, checkpoints: Checkpoints) -> None:
    """Weights, optimizers and progress as they were; what alarms have said and done since is not forgotten."""
    alarms, roll_backs = run.health.alarms, run.health.roll_backs
    checkpoints.load(checkpoint, run)
    run.health.alarms, run.health.roll_backs = alarms, roll_backs


def _rollback_record(checkpoint: Checkpoint, run: Progress, config: OnlineConfig) -> RollbackRecord:
    """What the run, which has gone back there, knows beyond it."""
    lines = checkpoint.sizes | {ALARMS: file_sizes(Path(config.output))[ALARMS]}
    alarms = [asdict(alarm) for alarm in run.health.alarms]
    return RollbackRecord(checkpoint.folder.name, run.kl_coef, run.health.roll_backs, alarms, lines)


def checkpoint_before(step: int, config: OnlineConfig, world: World, *, best: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint after at most `step` steps; None if there is none.

    best: the one with the highest held-out score, the judge's if there is a judge; the newest if none was evaluated.
    """
    folder = Path(config.output) / "checkpoints"
    # those within a step may have learned from the batch that went bad
    paths = [p for p in folder.glob(f"step-{'[0-9]' * 8}") if int(p.name[5:]) <= step]
    paths.sort(key=lambda path: (_rank(path) if best else 0.0, path.name), reverse=True)
    for path in all_gather(paths, world)[0]:
        problem = next((p for p in all_gather(atomic_dir.problem(path, world.rank, world.ranks), world) if p), None)
        if problem is None:
            return Checkpoint(path, json.loads((path / "about.json").read_text(encoding="utf-8")))
        _log(world, logging.ERROR, f"{path} cannot be used: {problem}.")
    return None


def _rank(checkpoint: Path) -> float:
    score = held_out_score(checkpoint)
    return -math.inf if score is None else score
