"""Which checkpoint a run goes on from, and whether it fits the settings that the run has now."""

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
from fastppo.checkpoint.rollback_record import Since, read_since
from fastppo.config import OF_URL, AnyConfig, Config
from fastppo.distributed import World, all_gather
from fastppo.errors import FastPPOError
from fastppo.monitor import LINES

log = logging.getLogger("fastppo")

NAME = re.compile(r"step-\d{8}(-update-\d{4})?")

# Settings of every command that may differ on resuming, since the run that comes out does not depend on them ...
FREE = (
    *("output", "timeout", "checkpoint.", "track.", "zero.nvme_path", "zero.offload_frozen"),
    *("plan", "resume", "optim.max_skipped"),
)
# ... or only in how it is rounded. A command's own are in its config class, as `free` and `rounding`.
ROUNDING = ("attention", "threads", "optim.activation_checkpointing", "zero.deepspeed")
SOURCES = ("rewards", "health.judge")


class CheckpointError(FastPPOError):
    """A checkpoint that cannot be used or written. The message says why, and the way out."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A whole checkpoint that fits this run's settings and ranks."""

    folder: Path
    about: Mapping[str, Any]
    since: Since | None = None  # what the run that went back to it knows beyond it

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the run's files of lines at that time."""
        then = self.about["bytes"] if self.since is None else self.since.bytes
        return {name: int(then[name]) for name in LINES}

    @property
    def clock(self) -> str:
        """When its run began, for templates that write the date. Earlier versions did not keep it: they have refused to
        go on on another day than that on which the run began, so the day is that on which this was written."""
        written = datetime.fromtimestamp((self.folder / "about.json").stat().st_mtime)
        return str(self.about.get("clock", written.isoformat(timespec="seconds")))

    def ended(self, config: Config, world: World) -> bool:
        """Whether an alarm has ended the run, and the settings of alarms are the same now; the log says why then."""
        since = self.since
        if since is None or since.ended is None or since.levels != levels(config):
            return False
        if world.rank == 0:
            log.error(
                "an alarm has ended this run, at %s It is at %s, and goes on from there with other health.alarms.",
                since.ended,
                self.folder,
            )
        return True


def find_checkpoint(config: AnyConfig, world: World) -> Found | None:
    """The checkpoint that `resume` asks for; None for a run from the start. All ranks call it.

    Raises CheckpointError if there are checkpoints and none can be used: beginning anew is for the user to decide.
    """
    if config.resume is None:
        return None
    candidates = all_gather(_candidates(config), world)[0]
    problems = []
    for folder in candidates:
        found = all_gather(atomic_dir.problem(folder, world.rank, world.ranks), world)
        problem = next((p for p in found if p is not None), None)
        if problem is None:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            _check_fit(folder, about, config, world)
            log.info("going on from %s", folder)
            return Found(folder, about, read_since(folder))
        problems.append(f"{folder} cannot be used: {problem}.")
        log.error(problems[-1])
    if problems:
        raise CheckpointError(
            f"resume is {config.resume}, but no checkpoint is whole. {' '.join(problems)} Restore one of them, or give"
            " --resume null to begin anew."
        )
    log.info("resume is auto and %s has no checkpoint: the run begins at step 0", config.output)
    return None


def _candidates(config: AnyConfig) -> list[Path]:
    """The checkpoints to try, the newest first."""
    assert config.resume is not None
    folder = Path(config.output) / "checkpoints"
    if config.resume == "auto":
        return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)
    chosen = Path(config.resume)
    if not chosen.is_dir():
        raise CheckpointError(
            f"resume is {chosen}, and there is no such folder. Give auto, or one of {_names(folder)}."
        )
    if chosen.resolve().parent != folder.resolve() or not NAME.fullmatch(chosen.resolve().name):
        raise CheckpointError(
            f"resume is {chosen}, which is no checkpoint of output = {config.output}; a run goes on in its own folder."
            f" Give auto, one of {_names(folder)}, or the --output that the checkpoint belongs to."
        )
    return [folder / chosen.resolve().name]


def _names(folder: Path) -> str:
    found = sorted(str(p) for p in folder.glob("step-*") if NAME.fullmatch(p.name))
    return ", ".join(found) or f"those in {folder} (it has none)"


def _check_fit(folder: Path, about: Mapping[str, Any], config: AnyConfig, world: World) -> None:
    """Refuse a checkpoint of another number of ranks or of settings that make another run."""
    if about["ranks"] != world.ranks:
        raise CheckpointError(
            f"{folder} was written by {about['ranks']} rank(s), and this run has {world.ranks}: optimizer states are"
            f" split by rank. Resume with --num_accelerators {about['ranks']}; to go on with {world.ranks}, begin a new"
            f" run from the {config.new_start}."
        )
    then, now, fresh = dict(about["config"]), settings(config), settings(type(config)())
    free = (*FREE, *config.free)
    for name in sorted({*then, *now}):
        old, new = then.get(name, fresh.get(name)), now.get(name, fresh.get(name))
        if old == new or _among(name, free) or (name in SOURCES and _said_alike(old) == _said_alike(new)):
            continue
        if name in (*ROUNDING, *config.rounding):
            log.warning("%s was %s and is %s: the run goes on, but not bit for bit as it would have", name, old, new)
        elif name == "steps" and config.optim.schedule == "constant":
            log.info("steps was %s and is %s", old, new)
        else:
            hint = " (the learning rate falls to 0 at the last step; set from the start, optim.schedule constant lets"
            hint = f"{hint} steps change)" if name == "steps" else ""
            raise CheckpointError(
                f"{name} is {json.dumps(new)}, but {folder} was made with {json.dumps(old)}{hint}. Resume with"
                f" --{name} {json.dumps(old)}, or give --resume null to begin anew."
            )
    for library, old in about["versions"].items():
        if old != (new := versions()[library]):
            log.warning("%s was %s and is %s: bits may differ", library, old, new)


def _among(name: str, settings: tuple[str, ...]) -> bool:
    """Whether a setting is one of these, or of a group of these, whose name ends with a dot."""
    return any(name == other or (other.endswith(".") and name.startswith(other)) for other in settings)


def _said_alike(sources: Any) -> list[dict[str, Any]]:
    """The sources without where a service is and how it is asked: it may have moved, and says what it said."""
    return [{k: v is not None if k == "url" else v for k, v in r.items() if k not in OF_URL} for r in sources]


def settings(config: AnyConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""

    def flat(group: Any, plain: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in plain.items():
            inner = getattr(group, name)
            if dataclasses.is_dataclass(inner):
                yield from flat(inner, value, f"{prefix}{name}.")
            else:  # a setting, which may be a mapping itself
                yield prefix + name, json.loads(json.dumps(value))

    return dict(flat(config, dataclasses.asdict(config), ""))


def levels(config: Config) -> dict[str, Any]:
    """The settings by which alarms end a run."""
    return {
        name: value for name, value in settings(config).items() if name.startswith("health.") and name in config.free
    }


def versions() -> dict[str, str]:
    return {"fastppo": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}


def held_out_score(checkpoint: Path) -> float | None:
    """By which checkpoints are compared (`Evaluation.held_out`); None for one that was not evaluated."""
    try:
        about = json.loads((checkpoint / "about.json").read_text(encoding="utf-8"))
        return None if about["score"] is None else float(about["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
