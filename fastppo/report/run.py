"""Reading a run's folder. The run may be in progress: a last line may be incomplete, and files may not exist yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fastppo.monitor import ALARMS, CONFIG, METRICS, RESPONSES, RunFolderError
from fastppo.report.curves import Curve
from fastppo.report.lines import Record, read_alarms, read_metrics, read_reliability, read_responses

RELIABILITY = "reliability.jsonl"


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    name: str  # the run's name in the report
    settings: dict[str, Any] = field(default_factory=dict)  # dotted name -> value; empty without a config.yaml
    metrics: list[Record] = field(default_factory=list)  # one per step, and one per evaluation: eval/NAME
    alarms: list[Record] = field(default_factory=list)  # step, figure, value, threshold, level, action, message
    heldout: list[Record] = field(default_factory=list)  # step, prompt, response, score
    training: list[Record] = field(default_factory=list)  # step, prompt, tokens, advantages, score
    reliability: list[Record] = field(default_factory=list)  # pairs, predicted, observed, observed_low, observed_high

    @cached_property
    def names(self) -> list[str]:
        """The metrics that have at least one number, in the order of their first appearance."""
        names = {name: None for record in self.metrics for name, value in record.items() if value is not None}
        return [name for name in names if name != "step"]

    def curve(self, name: str) -> Curve:
        """A metric over the steps; None at steps where it was not finite. Empty if there is no such metric."""
        rows = [(r["step"], r[name]) for r in self.metrics if name in r]
        return Curve([float(step) for step, _ in rows], [None if y is None else float(y) for _, y in rows])

    @property
    def is_watched(self) -> bool:
        """Whether the run has health figures, or alarms."""
        return bool(self.alarms) or any(name.startswith("health/") for name in self.names)

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return max((record["step"] for record in self.metrics), default=0)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs, with distinct names. Raises RunFolderError if a folder is not a run's or cannot be read."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder. Give the folder of a run: the --output of its command.")
    if not (folder / METRICS).is_file():
        raise RunFolderError(
            f"{folder} is not the folder of a run: it has no {METRICS}. Give the --output of a run's command."
        )
    settings = _settings(folder / CONFIG)
    if "rewards_on" in settings:  # a setting of that command alone
        raise RunFolderError(
            f"{folder} has the responses of generate, which trains nothing. `fastppo best-of-n RESPONSES --html FILE`"
            f" writes a page about them: {', '.join(map(str, sorted(folder.glob('responses*'))))}."
        )
    heldout, training = read_responses(folder / RESPONSES)
    return Run(
        name=name,
        settings=settings,
        metrics=read_metrics(folder / METRICS),
        alarms=read_alarms(folder / ALARMS),
        heldout=heldout,
        training=training,
        reliability=read_reliability(folder / RELIABILITY),
    )


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
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return settings
