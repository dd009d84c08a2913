"""Updates whose loss or gradient is not finite: kept for study, counted, and after too many in a row the end."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastppo.config import Config
from fastppo.data import Experience, Minibatch
from fastppo.distributed import World
from fastppo.errors import TrainingFault

log = logging.getLogger("fastppo")

FILES = 20  # batches kept for study; a run that skips an update now and then should not fill the disk


def note_fault(
    experience: Experience,
    minibatch: Minibatch,
    update: dict[str, Any],
    config: Config,
    *,
    step: int,
    number: int,
    world: World,
) -> None:
    """Log an update that was not applied, and keep its batch in `output`/faults/step-N.pt, N counted from 1.

    update: the fields of `Update`; number: of the update in its step, from 0. Raises TrainingFault, on
    every rank, when it is one too many in a row.
    """
    losses_and_norms = {name: x for name, x in update.items() if name.endswith(("_loss", "_grad_norm"))}
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in losses_and_norms.items())
    file = Path(config.output) / "faults" / f"step-{step + 1}.pt"
    if world.rank == 0:
        log.warning("step %d: update %d is not applied, as its numbers are not finite (%s)", step + 1, number, numbers)
        _save_batch(file, experience, minibatch, update, config, step, number)
    if update["skipped"] > config.optim.max_skipped:
        raise TrainingFault(
            f"{update['skipped']} updates in a row had a loss or gradient that is not finite, and optim.max_skipped is"
            f" {config.optim.max_skipped} ({numbers}). The batches are in {file.parent}. Look there for rewards or"
            " returns that are far off; a lower actor.lr or optim.max_grad_norm, or ppo.score_clip, often helps."
            " The newest checkpoint is from before the first of them or in between; nothing was applied since."
        )


def _save_batch(
    path: Path,
    experience: Experience,
    minibatch: Minibatch,
    update: dict[str, Any],
    config: Config,
    step: int,
    number: int,
) -> None:
    """The first such update of a step; the others see the same batch and the same weights."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or len(list(path.parent.iterdir())) >= FILES:
            return
        packed = experience.packed
        batch: dict[str, Any] = {f.name: getattr(experience, f.name) for f in fields(experience)}
        batch["packed"] = {f.name: getattr(packed, f.name) for f in fields(packed)}
        about = {"step": step + 1, "update": number, "config": asdict(config)}
        torch.save({**about, "numbers": update, "sequences": list(minibatch.microbatches), "batch": batch}, path)
        log.warning("its batch is in %s; torch.load reads it", path)
    except (OSError, RuntimeError) as error:
        log.warning("its batch could not be kept in %s (%s)", path, error)
