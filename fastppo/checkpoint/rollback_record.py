"""The record of a rollback, `since.json` beside the checkpoints: what happened after the checkpoint.

A run that is resumed from that checkpoint needs it to know that it has rolled back, or that an alarm has ended it.
Without it the run would repeat the same steps.
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


class RollbackRecordError(FastPPOError):
    """The file cannot be read. The message says what it is needed for, and the consequence of deleting it."""


@dataclass(frozen=True)
class RollbackRecord:
    """The newest rollback of a run."""

    checkpoint: str  # the name of the checkpoint's folder
    kl_coef: float  # the KL coefficient after the rollback
    roll_backs: int  # the number of rollbacks so far
    alarms: list[dict[str, Any]]  # the fields of each `health.Alarm` of the run
    bytes: Mapping[str, int]  # the sizes of the JSONL files, for `run_dir.continue_folder`
    ended: str | None = None  # the step and the message of the alarm that ended the run; None: it continues
    levels: Mapping[str, Any] | None = None  # the `alarm_settings` with which the alarm ended the run

    def write(self, checkpoints: Path) -> None:
        """Write the file atomically into the folder `checkpoints`, in place of an earlier one. Errors are logged."""
        draft = checkpoints / f"{atomic_dir.UNFINISHED}{NAME}"
        try:
            draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            atomic_dir.sync(draft)
            draft.rename(checkpoints / NAME)
            atomic_dir.sync(checkpoints)
        except OSError as error:
            log.error("%s could not be written (%s): a resumed run will roll back again", checkpoints / NAME, error)


def read_rollback_record(checkpoint: Path) -> RollbackRecord | None:
    """Read the record of a rollback to this checkpoint; None if there was none, or the newest one was to another
    checkpoint. Raises RollbackRecordError."""
    path = checkpoint.parent / NAME
    try:
        record = RollbackRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RollbackRecordError(
            f"{path} cannot be read ({error}). It records how often the run has rolled back, and whether an alarm has"
            " ended it. Restore the file; if you delete it, the run continues as if neither had happened."
        ) from error
    return record if record.checkpoint == checkpoint.name else None
