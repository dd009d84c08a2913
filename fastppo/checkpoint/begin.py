"""The start of a run, for every command: a new run in a new folder, or from an existing checkpoint."""

from __future__ import annotations

from pathlib import Path

from fastppo.checkpoint.resume import Checkpoint, find_checkpoint
from fastppo.config import AnyConfig, TrainingConfig, dump
from fastppo.distributed import World, begin_clock, check_output_is_shared
from fastppo.monitor import begin_folder, check_folder


def find_run(config: TrainingConfig, world: World) -> Checkpoint | None:
    """The checkpoint from which the run resumes, or None for a new run; sets the clock of the run.

    Writes nothing. Raises CheckpointError, or RunFolderError if `output` cannot be the folder of a new run. All ranks
    call it.
    """
    checkpoint = find_checkpoint(config, world)
    if checkpoint is None and world.rank == 0:
        check_folder(Path(config.output))
    begin_clock(None if checkpoint is None else checkpoint.clock, world)
    return checkpoint


def open_folder(config: AnyConfig, checkpoint: Checkpoint | None, world: World) -> None:
    """Make the run's folder and rename the folder of an earlier run, or resume in it from `checkpoint`.

    Raises RunFolderError. All ranks call it, before they write there.
    """
    output = Path(config.output)
    if world.rank == 0:
        begin_folder(output, None if checkpoint is None else checkpoint.sizes, dump(config))
    check_output_is_shared(output, world)
