"""The folder of a run that draws responses: whether it begins or continues there, and what it was made with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastppo.checkpoint import CheckpointError, atomic_dir, check_settings, data_id, settings, versions
from fastppo.config import GenerateConfig, dump
from fastppo.data import DataError, PromptSet
from fastppo.distributed import World, begin_clock, check_output_is_shared, clock
from fastppo.errors import FastPPOError
from fastppo.generation.rows import own_columns
from fastppo.generation.store import agreed
from fastppo.monitor import METRICS, begin_folder, check_folder

log = logging.getLogger("fastppo")

ABOUT = "about.json"  # what the responses that are there were made with; written before the first of them

About = Mapping[str, Any]


def find_generation(config: GenerateConfig, world: World) -> About | None:
    """What the run in `output` was made with, if it continues; None for a new run. Sets the clock of the run.

    Writes nothing. Raises CheckpointError for settings that would change the responses, or RunFolderError if `output`
    cannot be the folder of a new run. All ranks call it.
    """
    answer: About | FastPPOError | None = None
    if world.rank == 0:
        try:
            answer = _read(config)
        except FastPPOError as error:
            answer = error
    about = agreed(answer, world)
    begin_clock(None if about is None else str(about["clock"]), world)
    if about is not None and about["ranks"] != world.ranks:
        log.warning(
            "%s was written by %d rank(s), and this run has %d: a reward model may round otherwise, and a reward"
            " function that draws random numbers draws others",
            *(config.output, about["ranks"], world.ranks),
        )
    return about


def _read(config: GenerateConfig) -> About | None:
    output = Path(config.output)
    path = output / ABOUT
    if config.resume is None or not path.exists():
        if config.resume is not None:
            log.info("resume is auto and %s has no responses: the run starts at the first prompt", output)
        check_folder(output)
        return None
    try:
        about: About = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: about[name] for name in ("config", "versions", "ranks", "data", "clock")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}), so that the run cannot be continued. Give --resume"
            " null to start a new run."
        ) from error
    check_settings(output, parts, config)
    return parts


def check_data(about: About | None, data: PromptSet, config: GenerateConfig) -> None:
    """Raises CheckpointError if the data has changed since the responses in `output` were drawn."""
    if about is not None and about["data"] != (found := _data_id(data)):
        raise CheckpointError(
            f"{config.output} was made with other data ({about['data']}, number and hash) than data.path ="
            f" {config.data.path} has now ({found}). Restore the data, or give --resume null to start a new run."
        )


def _data_id(data: PromptSet) -> str:
    """Of the prompts' tokens, and of the columns, which are written beside each response."""
    columns = hashlib.sha256(repr(own_columns(data)).encode("utf-8", "backslashreplace")).hexdigest()
    return f"{data_id([data.tokens])}-{columns[:16]}"


def open_output(config: GenerateConfig, about: About | None, batches: int, world: World) -> None:
    """Make the run's folder, or continue in it after so many batches. Raises RunFolderError. All ranks call it."""
    output = Path(config.output)
    if world.rank == 0:
        begin_folder(output, None if about is None else {METRICS: _bytes_of(output / METRICS, batches)}, dump(config))
    check_output_is_shared(output, world)


def _bytes_of(metrics: Path, batches: int) -> int:
    """The size of the lines of the first batches; they are written before the batches themselves."""
    size = 0
    with suppress(OSError, ValueError, KeyError, TypeError), metrics.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > batches:
                break
            size += len(line)
    return size


def write_about(config: GenerateConfig, data: PromptSet, world: World) -> None:
    """Write what the responses are made with, before the first of them. Raises DataError. All ranks call it."""
    problem = None
    if world.rank == 0:
        path = Path(config.output) / ABOUT
        draft = path.with_name(f".{ABOUT}")
        about = {
            "ranks": world.ranks,
            "data": _data_id(data),
            "clock": clock.reading(),
            "versions": versions(),
            "config": settings(config),
        }
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(json.dumps(about, indent=1))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            atomic_dir.sync(path.parent)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            problem = DataError(f"{path} cannot be written ({error.strerror or error}). Make room, and start again.")
    agreed(problem, world)
