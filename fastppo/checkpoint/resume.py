"""Finding the checkpoint from which a run resumes, and checking that it fits the run's current settings."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastppo import __version__
from fastppo.checkpoint import atomic_dir
from fastppo.checkpoint.rollback_record import RollbackRecord, read_rollback_record
from fastppo.config import SERVICE_SETTINGS, AnyConfig, OnlineConfig, RewardConfig, TrainingConfig
from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.monitor import JSONL_FILES

log = logging.getLogger("fastppo")

NAME = re.compile(r"step-\d{8}(-update-\d{4}|-(grow|update)-\d{6})?")

# Settings of every command that may change on resuming, because the result does not depend on them.
FREE = (
    *("output", "timeout", "checkpoint.", "track.", "zero.nvme_path", "zero.offload_frozen"),
    *("plan", "resume", "optim.max_skipped", "optim.activation_checkpointing"),
)
# ... or only in how it is rounded. A command's own are in its config class, as `free` and `rounding`.
ROUNDING = ("attention", "model.fused", "threads", "zero.deepspeed")
# ... or in how sequences are split over ranks, or the state, which `Engine.load` undoes.
LAYOUT = ("zero.stage", "zero.offload", "zero.offload_optimizer", "zero.offload_parameters", "parallel.sequence")
SPLIT_ANEW = "the state is carried over bit for bit, and from there the result is the same within rounding"
SOURCES = ("rewards", "health.judge", "judge")


class CheckpointError(FastPPOError):
    """A checkpoint cannot be used or written. The message gives the reason and the way out."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint that fits this run's settings."""

    folder: Path
    about: Mapping[str, Any]  # the content of its about.json
    rollback: RollbackRecord | None = None  # set if the run has rolled back to this checkpoint

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes in bytes that the run's JSONL files had at this checkpoint."""
        sizes = self.about["bytes"] if self.rollback is None else self.rollback.bytes
        return {name: int(sizes[name]) for name in JSONL_FILES}

    @property
    def clock(self) -> str:
        """The ISO time at which the run started, for chat templates that write the date. Earlier versions did not store
        it; they refused to resume on another day, so that the day on which this checkpoint was written is that of the
        start."""
        written = datetime.fromtimestamp((self.folder / "about.json").stat().st_mtime)
        return str(self.about.get("clock", written.isoformat(timespec="seconds")))

    def ended(self, config: OnlineConfig, world: World) -> bool:
        """Whether an alarm has ended the run and the settings of alarms are unchanged; the reason is logged."""
        record = self.rollback
        if record is None or record.ended is None or record.levels != alarm_settings(config):
            return False
        if world.rank == 0:
            log.error(
                "an alarm has ended this run, at %s Its checkpoint is %s. Change health.alarms to continue from there.",
                record.ended,
                self.folder,
            )
        return True


def find_checkpoint(config: TrainingConfig, world: World) -> Checkpoint | None:
    """The checkpoint that the setting `resume` selects; None for a new run. All ranks call it.

    Raises CheckpointError if there are checkpoints but none is usable: only the user can decide to start a new run.
    """
    if config.resume is None:
        return None
    candidates = all_gather(_candidates(config), world)[0]
    problems = []
    for folder in candidates:
        rank_problems = all_gather(atomic_dir.problem(folder, world.rank, world.ranks), world)
        problem = next((p for p in rank_problems if p is not None), None)
        if problem is None:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            _check_fit(folder, about, config, world)
            log.info("continuing from %s", folder)
            return Checkpoint(folder, about, read_rollback_record(folder))
        problems.append(f"{folder} cannot be used: {problem}.")
        log.error(problems[-1])
    if problems:
        raise CheckpointError(
            f"resume is {config.resume}, but no checkpoint is complete. {' '.join(problems)} Restore one of them, or"
            " give --resume null to start a new run."
        )
    log.info("resume is auto and %s has no checkpoint: the run starts at step 0", config.output)
    return None


def _candidates(config: TrainingConfig) -> list[Path]:
    """The checkpoints to try, the newest first. Raises CheckpointError if `resume` is not a checkpoint of this run."""
    assert config.resume is not None
    folder = Path(config.output) / "checkpoints"
    if config.resume == "auto":
        return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)
    chosen = Path(config.resume)
    if not chosen.is_dir():
        raise CheckpointError(
            f"resume is {chosen}, and this folder does not exist. Give auto, or one of {_names(folder)}."
        )
    if chosen.resolve().parent != folder.resolve() or not NAME.fullmatch(chosen.resolve().name):
        raise CheckpointError(
            f"resume is {chosen}, which is not a checkpoint of output = {config.output}; a run continues in the folder"
            f" that has its checkpoints. Give auto, one of {_names(folder)}, or the --output of the checkpoint."
        )
    return [folder / chosen.resolve().name]


def _names(folder: Path) -> str:
    """The paths of the checkpoints in `folder`, for a message."""
    paths = sorted(str(p) for p in folder.glob("step-*") if NAME.fullmatch(p.name))
    return ", ".join(paths) or f"the checkpoints in {folder} (there are none)"


def _check_fit(folder: Path, about: Mapping[str, Any], config: TrainingConfig, world: World) -> None:
    """Raise CheckpointError if a checkpoint has settings that would change the result; another number of ranks is
    logged."""
    if about["ranks"] != world.ranks:
        log.warning(
            "%s was written by %d rank(s), and this run has %d: %s", folder, about["ranks"], world.ranks, SPLIT_ANEW
        )
    check_settings(folder, about, config)


def check_settings(made: Path, about: Mapping[str, Any], config: AnyConfig) -> None:
    """Raise CheckpointError if settings that would change the result are others than when `made` was made.

    about: `config` and `versions`, as `settings` and `versions` gave them then. What only rounds otherwise is logged.
    """
    saved, current, defaults = dict(about["config"]), settings(config), settings(type(config)())
    free, before = (*FREE, *config.free), config.done_before
    for name in sorted({*saved, *current}):
        old, new = saved.get(name, defaults.get(name)), current.get(name, defaults.get(name))
        if name not in saved and name in before:
            old, new = before[name]
        if old == new or _matches(name, free) or (name in SOURCES and _scoring_part(old) == _scoring_part(new)):
            continue
        if name in (*ROUNDING, *config.rounding):
            log.warning("%s was %s and is %s: the result will not be the same bit for bit", name, old, new)
        elif name in LAYOUT:
            log.warning("%s was %s and is %s: %s", name, old, new, SPLIT_ANEW)
        elif name == "steps" and config.optim.schedule == "constant":
            log.info("steps was %s and is %s", old, new)
        else:
            hint = " (the learning rate falls to 0 at the last step; steps can change only in a run that has"
            hint = f"{hint} optim.schedule constant from its start)" if name == "steps" else ""
            raise CheckpointError(
                f"{name} is {json.dumps(new)}, but {made} was made with {json.dumps(old)}{hint}. Resume with"
                f" --{name} {json.dumps(old)}, or give --resume null to start a new run."
            )
    for library, old in about["versions"].items():
        if old != (new := versions()[library]):
            log.warning("%s was %s and is %s: the result may not be the same bit for bit", library, old, new)


def _matches(name: str, settings: tuple[str, ...]) -> bool:
    """Whether `name` is one of the settings, or belongs to one of the groups among them, which end with a dot."""
    return any(name == other or (other.endswith(".") and name.startswith(other)) for other in settings)


def _scoring_part(sources: Any) -> list[dict[str, Any]]:
    """The sources without the URL of a service and its request settings: a service may move without changing its
    scores. Settings that earlier versions did not have are at their defaults."""
    defaults = dataclasses.asdict(RewardConfig())
    full = [json.loads(json.dumps(defaults | source)) for source in sources]
    return [{k: v is not None if k == "url" else v for k, v in r.items() if k not in SERVICE_SETTINGS} for r in full]


def settings(config: AnyConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as values that JSON can represent, with what `auto` stands for where the result
    depends on it."""

    def flatten(group: Any, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            member = getattr(group, name)
            if dataclasses.is_dataclass(member):
                yield from flatten(member, value, f"{prefix}{name}.")
            else:  # a setting; its value may be a mapping
                yield prefix + name, json.loads(json.dumps(value))

    return dict(flatten(config, dataclasses.asdict(config), "")) | config.settled


def alarm_settings(config: OnlineConfig) -> dict[str, Any]:
    """The settings that decide whether an alarm ends a run, by their dotted names."""
    return {
        name: value for name, value in settings(config).items() if name.startswith("health.") and name in config.free
    }


def versions() -> dict[str, str]:
    """The versions of the libraries on which the result depends."""
    return {"fastppo": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


def held_out_score(checkpoint: Path) -> float | None:
    """The held-out score of a checkpoint, by which the best is chosen (`Evaluation.held_out`); None if it was not
    evaluated."""
    try:
        about = json.loads((checkpoint / "about.json").read_text(encoding="utf-8"))
        return None if about["score"] is None else float(about["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
