"""What a run that went back to a checkpoint knows beyond it: a file beside the checkpoints.

Without it a run that is resumed there would not know that it has rolled back, or that an alarm has ended it, and would
do the same again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastppo.checkpoint import atomic_dir
from fastppo.errors import FastPPOError

log = logging.getLogger("fastppo")

NAME = "since.json"


class SinceError(FastPPOError):
    """The file cannot be read. The message names the way out."""


@dataclass(frozen=True)
class Since:
    """Of the newest time that a run went back."""

    checkpoint: str  # the folder's name
    kl_coef: float  # with which it goes on
    roll_backs: int
    alarms: list[dict[str, Any]]  # the fields of each `health.Alarm` of the run
    bytes: Mapping[str, int]  # of its files of lines, for `folder.continue_folder`
    ended: str | None = None  # why an alarm has ended it; None: it goes on
    levels: Mapping[str, Any] | None = None  # the settings of alarms by which it was ended

    def write(self, checkpoints: Path) -> None:
        """In the folder of checkpoints, in the place of what was written before, whole or not at all."""
        draft = checkpoints / f"{atomic_dir.UNFINISHED}{NAME}"
        try:
            draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            atomic_dir.sync(draft)
            draft.rename(checkpoints / NAME)
            atomic_dir.sync(checkpoints)
        except OSError as error:
            log.error("%s could not be written (%s): resumed, the run will go back again", checkpoints / NAME, error)


def read_since(checkpoint: Path) -> Since | None:
    """What belongs to this checkpoint; None if the run has not gone back, or to another one. Raises SinceError."""
    path = checkpoint.parent / NAME
    try:
        since = Since(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise SinceError(
            f"{path} cannot be read ({error}). It says how often the run has rolled back, and whether an alarm has"
            " ended it; without the file the run goes on as if neither had been."
        ) from error
    return since if since.checkpoint == checkpoint.name else None
