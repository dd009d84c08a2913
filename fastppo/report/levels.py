"""The levels at which a run's health warns or acts, in each figure's own unit, as far as the run's files tell them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean

from fastppo.config import FIGURES, Figure
from fastppo.report.curves import number
from fastppo.report.lines import is_number
from fastppo.report.plot import SIGNS, Level
from fastppo.report.run import Run

DOES = {
    "warn": "warns",
    "raise_kl": "raises the KL coefficient",
    "stop_epoch": "ends the epoch",
    "roll_back": "rolls back",
    "stop": "stops",
}
SIDES = {"lower": "below ", "higher": "above ", "either": "beyond \N{PLUS-MINUS SIGN}", "at": "at "}
KINDS: Mapping[str, Figure] = {str(name): figure for name, figure in FIGURES.items()}


def levels(runs: Sequence[Run], figure: str) -> list[Level]:
    """The levels of a figure in all runs, by what happens beyond them.

    Where settings and metrics do not tell them, as for the judge, whose level is in deviations that only the trainer
    knows, they are those that its alarms name.
    """
    found = [level for run in runs for level in (list(_in_force(run, figure)) or _named(run, figure))]
    side = KINDS[figure].worse if figure in KINDS else "at"
    drawn = []
    for action in dict.fromkeys(action for _, action in found):
        ys = tuple(dict.fromkeys(y for y, other in found if other == action))
        sign = "warn" if action == "warn" else "act"
        beyond = " or ".join(dict.fromkeys(number(float(f"{y:.3g}")) for y in ys))
        text = f"{SIGNS[sign]} {DOES.get(action, action)} {SIDES[side]}{beyond}"
        drawn.append(Level(ys + tuple(-y for y in ys if side == "either"), sign, text))
    return drawn


def _in_force(run: Run, figure: str) -> Iterator[tuple[float, str]]:
    """The standing warning unless the settings take its place, and the alarms that they set: threshold, action."""
    alarms, kind = run.settings.get("health.alarms"), KINDS.get(figure)
    if kind is None or not isinstance(alarms, list):
        return
    own = [alarm for alarm in alarms if isinstance(alarm, dict) and alarm.get("figure") == figure]
    rules = [(alarm.get("level"), str(alarm.get("action", "warn"))) for alarm in own]
    if not any(action == "warn" for _, action in rules):
        rules.insert(0, (kind.warn, "warn"))
    for level, action in rules:
        if is_number(level) and (y := _threshold(run, figure, kind, level)) is not None:
            yield y, action


def _threshold(run: Run, figure: str, kind: Figure, level: float) -> float | None:
    """The level in the figure's own unit; None while its start is not over, or not told."""
    window = run.settings.get("health.window")
    first = list(islice(run.curve(f"health/{figure}").y, window)) if isinstance(window, int) and window > 0 else []
    finite = [y for y in first if y is not None]
    started = finite and len(first) == window and kind.level_is != "deviations from start"
    if not (started or kind.level_is == "value"):
        return None
    return kind.threshold(level, fmean(finite) if finite else 0.0, 0.0)


def _named(run: Run, figure: str) -> list[tuple[float, str]]:
    return [
        (float(alarm["threshold"]), alarm["action"] or "warn")
        for alarm in run.alarms
        if alarm["figure"].removeprefix("health/") == figure and alarm["threshold"] is not None
    ]
