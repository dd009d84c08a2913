"""A run's folder, read as it is now: a run that goes on leaves a last line half written, and files come with time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from fastppo.folder import ALARMS, CONFIG, METRICS, RESPONSES, RunFolderError, read_lines
from fastppo.report.curves import Curve

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    name: str  # as the report calls it
    settings: dict[str, Any]  # dotted name -> value; empty without a config.yaml
    metrics: list[Record]  # one for each step, and one for each evaluation with names behind eval/
    alarms: list[Record]  # step, figure, value, threshold, level, action, message
    heldout: list[Record]  # step, prompt, response, score
    training: list[Record]  # step, prompt, tokens, advantages, score

    @cached_property
    def names(self) -> list[str]:
        """Every metric that has a number, in the order of its first appearance."""
        found = {name: None for record in self.metrics for name, value in record.items() if is_number(value)}
        return [name for name in found if name != "step"]

    def curve(self, name: str) -> Curve:
        """A metric over the steps; None where it was not finite. Empty if there is no such metric."""
        rows = [(r["step"], r[name]) for r in self.metrics if name in r]
        return Curve([float(step) for step, _ in rows], [float(y) if is_number(y) else None for _, y in rows])

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((record["step"] for record in self.metrics), default=0)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs under names that tell them apart. Raises RunFolderError for what is no run, or cannot be read."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is no folder. Give the folder of a run: the --output that it was started with.")
    if not (folder / METRICS).is_file():
        raise RunFolderError(
            f"{folder} is not the folder of a run: it has no {METRICS}. Give the --output that a run was started with."
        )
    responses = _read(folder / RESPONSES)
    return Run(
        name=name,
        settings=_settings(folder / CONFIG),
        metrics=_read(folder / METRICS),
        alarms=_read(folder / ALARMS),
        heldout=[r for r in responses if r.get("of") == "heldout"],
        training=[r for r in responses if r.get("of") == "training"],
    )


def _read(path: Path) -> list[Record]:
    """The lines of a file in the order of their steps; none if it is not there."""
    records = read_lines(path) if path.exists() else []
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("step"), int):
            raise RunFolderError(f"{path}, line {number}: this has no whole number as its step. Remove the line.")
    return sorted(records, key=lambda record: int(record["step"]))


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
    return flat(tree) if isinstance(tree, dict) else {}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
