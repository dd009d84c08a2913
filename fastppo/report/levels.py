"""The levels at which a health figure warns or acts, in the figure's unit, as far as the run's files contain them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean

from fastppo.config import FIGURES, OF_ONE_POLICY, Figure
from fastppo.report.curves import number
from fastppo.report.lines import is_number
from fastppo.report.plot import SIGNS, Level
from fastppo.report.run import Run

ACTIONS = {
    "warn": "warns",
    "raise_kl": "raises the KL coefficient",
    "stop_epoch": "ends the epoch",
    "roll_back": "rolls back",
    "stop": "stops",
}
SIDES = {"lower": "below ", "higher": "above ", "either": "beyond \N{PLUS-MINUS SIGN}", "at": "at "}
KINDS: Mapping[str, Figure] = {str(name): figure for name, figure in FIGURES.items()}


def levels(runs: Sequence[Run], figure: str) -> list[Level]:
    """The levels of a figure in all runs, one `Level` for each action.

    If they do not follow from settings and metrics, they are taken from the run's alarms: the judge's level, for
    example, is in standard deviations that only the trainer knows.
    """
    thresholds = [level for run in runs for level in (list(_configured(run, figure)) or _from_alarms(run, figure))]
    side = KINDS[figure].worse if figure in KINDS else "at"
    levels = []
    for action in dict.fromkeys(action for _, action in thresholds):
        ys = tuple(dict.fromkeys(y for y, other in thresholds if other == action))
        sign = "warn" if action == "warn" else "act"
        values = " or ".join(dict.fromkeys(number(float(f"{y:.3g}")) for y in ys))
        text = f"{SIGNS[sign]} {ACTIONS.get(action, action)} {SIDES[side]}{values}"
        levels.append(Level(ys + tuple(-y for y in ys if side == "either"), sign, text))
    return levels


def _configured(run: Run, figure: str) -> Iterator[tuple[float, str]]:
    """Threshold and action of each alarm on the figure in the settings, and of its default warning, unless the settings
    replace that."""
    alarms, kind = run.settings.get("health.alarms"), KINDS.get(figure)
    if kind is None or not isinstance(alarms, list):
        return
    on_figure = [alarm for alarm in alarms if isinstance(alarm, dict) and alarm.get("figure") == figure]
    rules = [(alarm.get("level"), str(alarm.get("action", "warn"))) for alarm in on_figure]
    earlier = run.settings.get("ppo.steps_ahead") or run.settings.get("rollout.partial_tokens") is not None
    silent = figure in OF_ONE_POLICY and earlier
    if not (silent or any(action == "warn" for _, action in rules)):
        rules.insert(0, (kind.warn, "warn"))
    for level, action in rules:
        if is_number(level) and (y := _threshold(run, figure, kind, level)) is not None:
            yield y, action


def _threshold(run: Run, figure: str, kind: Figure, level: float) -> float | None:
    """The level, converted to the figure's unit; None if it needs a baseline that the metrics do not contain (yet)."""
    window = run.settings.get("health.window")
    first = list(islice(run.curve(f"health/{figure}").y, window)) if isinstance(window, int) and window > 0 else []
    finite = [y for y in first if y is not None]
    has_baseline = finite and len(first) == window and kind.level_is != "deviations from start"
    if not (has_baseline or kind.level_is == "value"):
        return None
    return kind.threshold(level, fmean(finite) if finite else 0.0, 0.0)


def _from_alarms(run: Run, figure: str) -> list[tuple[float, str]]:
    """Threshold and action of each alarm that the figure has raised."""
    return [
        (float(alarm["threshold"]), alarm["action"] or "warn")
        for alarm in run.alarms
        if alarm["figure"].removeprefix("health/") == figure and alarm["threshold"] is not None
    ]
