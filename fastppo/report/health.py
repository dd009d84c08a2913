"""The health section: the figures over the steps, and the alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastppo.config import QUIET_STEPS
from fastppo.report.curves import number
from fastppo.report.levels import levels
from fastppo.report.lines import Record
from fastppo.report.plot import SIGNS, Charts, Flag, Line, grid
from fastppo.report.run import Run
from fastppo.report.texts import text
from fastppo.report.titles import quantity

COLUMNS = ("step", "level", "figure", "value", "threshold", "action", "message")


def health(runs: Sequence[Run], charts: Charts) -> str:
    if not any(run.is_watched for run in runs):
        return ""
    note = (
        f'<p class="note">{SIGNS["warn"]} warning, {SIGNS["act"]} alarm with an action; dashed lines: their levels, if'
        " they are close to the values.</p>"
    )
    return alarms(runs) + note + grid(figures(runs, charts))


def figures(runs: Sequence[Run], charts: Charts) -> str:
    """A chart of each health figure with its levels and alarms."""
    names = dict.fromkeys(name for run in runs for name in run.names if name.startswith("health/"))
    drawn = []
    for name in names:
        figure = name.removeprefix("health/")
        lines = [Line(run.name, run.curve(name), i) for i, run in enumerate(runs)]
        drawn.append(charts.draw(quantity(name), lines, flags=flags(runs, figure), levels=levels(runs, figure)))
    return "".join(drawn)


def flags(runs: Sequence[Run], *figures: str) -> list[Flag]:
    """Markers at the first step of each alarm of these figures; without figures, of all alarms with an action."""
    return [
        Flag(float(e.first), f"{e.when}: {e.figure}. {e.message}", e.level, f"alarm-{i}-{n}")
        for i, run in enumerate(runs)
        for n, e in enumerate(episodes(run))
        if (e.figure in figures if figures else e.level == "act")
    ]


@dataclass(frozen=True)
class Episode:
    """An alarm together with the repetitions of it that follow closely."""

    first: int  # step
    last: int
    figure: str
    level: str  # warn or act
    value: float | None  # this and the following fields are of the first step
    threshold: float | None
    action: str
    message: str

    @property
    def when(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


def episodes(run: Run) -> list[Episode]:
    """The alarms of a run. Alarms of the same kind are merged if at most `QUIET_STEPS` steps, or a hundredth of the
    run, lie between them, so that a chart of a long run has space for the markers."""
    gap = max(QUIET_STEPS, run.steps // 100)
    merged: list[Episode] = []
    newest: dict[tuple[str, str, str], int] = {}  # kind -> index of its last episode
    for alarm in run.alarms:
        episode, kind = _episode(alarm)
        index = newest.get(kind)
        if index is not None and episode.first - merged[index].last <= gap:
            merged[index] = replace(merged[index], last=episode.first)
        else:
            newest[kind] = len(merged)
            merged.append(episode)
    return merged


def _episode(alarm: Record) -> tuple[Episode, tuple[str, str, str]]:
    """A single alarm as an episode, and its kind: figure, level and action."""
    figure, step = alarm["figure"].removeprefix("health/"), alarm["step"]
    level = "act" if alarm["level"] == "act" else "warn"
    action = (alarm["action"] or "none").replace("_", " ")
    episode = Episode(step, step, figure, level, alarm["value"], alarm["threshold"], action, alarm["message"])
    return episode, (figure, level, action)


def alarms(runs: Sequence[Run]) -> str:
    """A table of all alarms: steps, figure, value, threshold, action and message."""
    rows = [(i, run, n, e) for i, run in enumerate(runs) for n, e in enumerate(episodes(run))]
    if not rows:
        return '<p class="good">No alarm was raised.</p>'
    body = "".join(_row(f"alarm-{i}-{n}", _run_label(i, run) if len(runs) > 1 else "", e) for i, run, n, e in rows)
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="Alarms"><table class="alarms"><thead><tr>'
        f"{''.join(f'<th>{column}' for column in COLUMNS)}</thead><tbody>{body}</tbody></table></div>"
    )


def _run_label(i: int, run: Run) -> str:
    return f'<i class="swatch run{i}"></i>{text(run.name)}: '


def _row(key: str, label: str, episode: Episode) -> str:
    e = episode
    cells = (
        e.when.partition(" ")[2],
        f'<span class="level-{e.level}">{SIGNS[e.level]} {e.level}</span>',
        text(e.figure),
        number(e.value),
        number(e.threshold),
        text(e.action),
    )
    row = "".join(f'<td data-of="{column}">{cell}' for column, cell in zip(COLUMNS, cells, strict=False))
    return f'<tr id="{key}">{row}<td data-of="{COLUMNS[-1]}" dir="auto">{label}{text(e.message)}'
