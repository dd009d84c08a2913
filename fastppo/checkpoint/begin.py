"""How a run begins, whichever command's: anew in a folder of its own, or from a checkpoint that is there."""

from __future__ import annotations

from pathlib import Path

from fastppo.checkpoint.resume import Found, find_checkpoint
from fastppo.config import AnyConfig, dump
from fastppo.distributed import World, begin_clock, check_output_is_shared
from fastppo.monitor import begin_folder, check_folder


def find_run(config: AnyConfig, world: World) -> Found | None:
    """The checkpoint that a run goes on from, its clock set to what it was; None for a run from the start.

    Nothing is written yet. Raises CheckpointError, or RunFolderError if `output` can be no new run's. All ranks call
    it.
    """
    found = find_checkpoint(config, world)
    if found is None and world.rank == 0:
        check_folder(Path(config.output))
    begin_clock(None if found is None else found.clock, world)
    return found


def open_folder(config: AnyConfig, found: Found | None, world: World) -> None:
    """Make the run's folder, an earlier run in it being moved aside, or take it up where `found` has it.

    Raises RunFolderError. All ranks call it, before they write there.
    """
    output = Path(config.output)
    if world.rank == 0:
        begin_folder(output, None if found is None else found.sizes, dump(config))
    check_output_is_shared(output, world)
