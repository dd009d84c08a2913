"""What the nodes of a run must have in common, checked before it costs anything."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from fastppo.errors import FastPPOError
from fastppo.world import World, all_gather

PATIENCE = 30.0  # seconds; a network file system may show a new file to other nodes late


def check_output_is_shared(output: Path, world: World) -> None:
    """Refuse an `output` that is not one and the same folder to all ranks; all of them call it once rank 0 made it.

    Each rank writes its own part of a checkpoint. On disks of their own the nodes would leave halves of it, which only
    shows when the run is to be resumed. Raises FastPPOError.
    """
    if world.ranks == 1:
        return
    marker = output / f".shared-{all_gather(secrets.token_hex(8), world)[0]}"
    failed = None
    if world.rank == 0:
        try:
            marker.touch()
        except OSError as error:
            failed = error.strerror
    if (failed := all_gather(failed, world)[0]) is not None:  # else it is there by now
        raise FastPPOError(
            f"output = {output}: nothing can be written there ({failed}). Make room, or give another --output."
        )
    seen = all_gather((socket.gethostname(), _appears(marker)), world)
    if world.rank == 0:
        marker.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise FastPPOError(
            f"output = {output} is not the same folder on every node: what rank 0 on {seen[0][0]} makes there is not"
            f" seen by {', '.join(blind)}. All ranks write their parts of a checkpoint into it, so give an --output on"
            " a file system that the nodes share, under the same absolute path on each."
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes to be in time."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
