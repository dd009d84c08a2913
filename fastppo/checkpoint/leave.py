"""The trained model, written where it belongs, and elsewhere if it cannot be: it is what the run was for."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import atomic_dir
from fastppo.checkpoint.run_state import Run
from fastppo.checkpoint.save import Checkpoints, export
from fastppo.config import LoraConfig
from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.models import Backbone
from fastppo.monitor import reason, settle_stdout

log = logging.getLogger("fastppo")


class ExportError(FastPPOError):
    """A model that is not where the run should have left it. The message says where it is, or what is left of it."""


class Left(NamedTuple):
    """A model that a run has left behind."""

    wanted: Path  # where it belongs
    folder: Path | None  # where it is; None: nowhere
    problem: str | None = None  # why it is not where it belongs


def leave_model(
    role: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: LoraConfig,
    world: World,
    state: dict[str, Tensor] | None = None,
) -> Left:
    """`save.export`, or to another place; the log says so. All ranks call it, and get the same; rank 0 writes."""
    left = Left(folder, folder)
    if world.rank == 0:
        write = partial(export, role, tokenizer, lora=lora, state=state)
        weights = role.model.parameters() if state is None else state.values()
        left = save_somewhere(write, folder, sum(tensor.nbytes for tensor in weights))
    return all_gather(left, world)[0]


def save_somewhere(write: Callable[[Path], object], folder: Path, needed: int) -> Left:
    """Write a folder of `needed` bytes where it belongs or, if that fails, at the first other place that takes it."""
    problem = _attempt(write, folder)
    if problem is None:
        return Left(folder, folder)
    log.error("%s could not be written (%s); trying other places", folder, problem)
    for place in _places(folder):
        if (other := _free_name(place, folder, needed)) is None:
            continue
        again = _attempt(write, other)
        if again is None:
            log.error(
                "the trained model is in %s, as %s could not be written (%s). Move it there.", other, folder, problem
            )
            return Left(folder, other, problem)
        log.error("nor could %s (%s)", other, again)
    return Left(folder, None, problem)


def _attempt(write: Callable[[Path], object], folder: Path) -> str | None:
    """Why a folder could not be written; None if it was. What is there of it goes, as the disk may be full."""
    settle_stdout()
    try:
        write(folder)
    except Exception as error:  # of safetensors and transformers too, which have types of their own for a full disk
        shutil.rmtree(atomic_dir.unfinished(folder), ignore_errors=True)
        return reason(error)
    return None


def _places(folder: Path) -> Iterator[Path]:
    """Beside the run's folder, in the temporary folder, in the user's: not all need be of the disk that is full."""
    seen: set[Path] = set()
    for place in (folder.resolve().parent.parent, Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        if place not in seen and os.access(place, os.W_OK):
            yield place
        seen.add(place)


def _free_name(place: Path, folder: Path, needed: int) -> Path | None:
    """A name there that nothing has yet; None where the disk has too little room."""
    try:
        if shutil.disk_usage(place).free < needed:
            return None
    except OSError:
        return None
    name, n = f"{folder.resolve().parent.name}-{folder.name}", 1
    while (other := place / (name if n == 1 else f"{name}.{n}")).exists():
        n += 1
    return other


def supersede(before: Sequence[Left], now: Left, world: World) -> Left:
    """A better model than the one that was left before. Of what was written elsewhere, only the last stays."""
    for old in before:
        if world.rank == 0 and old.folder not in (None, old.wanted) and now.folder not in (None, old.folder):
            shutil.rmtree(str(old.folder), ignore_errors=True)
    return now


def settle(left: Sequence[Left], checkpoints: Checkpoints, run: Run) -> None:
    """The end of a run that has left these models: an error if one is not where it belongs. All ranks call it.

    The run saves itself first if it has not, so that nothing that it has learned is lost.
    """
    lost = [model for model in left if model.problem is not None]
    if not lost:
        return
    said = " ".join(
        f"{wanted} could not be written ({problem}); "
        + (f"it is in {folder}: move it." if folder else "nor elsewhere.")
        for wanted, folder, problem in lost
    )
    error = checkpoints.save(run)
    resume = (
        f"`--resume auto` goes on from {checkpoints.newest() or 'nowhere'}"
        if error is None
        else (f"{error} What is left to resume from is {checkpoints.newest() or 'nothing'}")
    )
    raise ExportError(
        f"The run is done, but its model is not where it belongs. {said} Make room or give access; {resume}."
    )
