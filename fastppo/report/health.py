"""The health of a run: its figures over the steps, and the alarms that they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastppo.config import REST
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
        f'<p class="note">{SIGNS["warn"]} a warning, {SIGNS["act"]} an alarm that acts; dashed: the level of each,'
        " where it is near.</p>"
    )
    return alarms(runs) + note + grid(figures(runs, charts))


def figures(runs: Sequence[Run], charts: Charts) -> str:
    """A chart of each health figure, with its levels and the alarms that it gave."""
    names = dict.fromkeys(name for run in runs for name in run.names if name.startswith("health/"))
    drawn = []
    for name in names:
        figure = name.removeprefix("health/")
        lines = [Line(run.name, run.curve(name), i) for i, run in enumerate(runs)]
        drawn.append(charts.draw(quantity(name), lines, flags=flags(runs, figure), levels=levels(runs, figure)))
    return "".join(drawn)


def flags(runs: Sequence[Run], *figures: str) -> list[Flag]:
    """Where the alarms of these figures began; of every figure, those that acted, if none is named."""
    return [
        Flag(float(e.first), f"{e.when}: {e.figure}. {e.message}", e.level, f"alarm-{i}-{n}")
        for i, run in enumerate(runs)
        for n, e in enumerate(episodes(run))
        if (e.figure in figures if figures else e.level == "act")
    ]


@dataclass(frozen=True)
class Episode:
    """An alarm, with those of its kind that follow it at once."""

    first: int  # step
    last: int
    figure: str
    level: str  # warn or act
    value: float | None  # at the first step, as what follows
    threshold: float | None
    action: str
    message: str

    @property
    def when(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


def episodes(run: Run) -> list[Episode]:
    """The alarms of a run. Those of one kind count as one while no more lies between than `REST` steps, or a hundredth
    of the run, so that a chart of a long run has room for their signs."""
    gap = max(REST, run.steps // 100)
    found: list[Episode] = []
    newest: dict[tuple[str, str, str], int] = {}
    for alarm in run.alarms:
        episode, kind = _episode(alarm)
        at = newest.get(kind)
        if at is not None and episode.first - found[at].last <= gap:
            found[at] = replace(found[at], last=episode.first)
        else:
            newest[kind] = len(found)
            found.append(episode)
    return found


def _episode(alarm: Record) -> tuple[Episode, tuple[str, str, str]]:
    """An alarm alone, and its kind."""
    figure, step = alarm["figure"].removeprefix("health/"), alarm["step"]
    level = "act" if alarm["level"] == "act" else "warn"
    action = (alarm["action"] or "none").replace("_", " ")
    episode = Episode(step, step, figure, level, alarm["value"], alarm["threshold"], action, alarm["message"])
    return episode, (figure, level, action)


def alarms(runs: Sequence[Run]) -> str:
    """Every alarm with its steps, figure, value, threshold and what was done."""
    rows = [(i, run, n, e) for i, run in enumerate(runs) for n, e in enumerate(episodes(run))]
    if not rows:
        return '<p class="good">No alarm was raised.</p>'
    body = "".join(_row(f"alarm-{i}-{n}", _whose(i, run) if len(runs) > 1 else "", e) for i, run, n, e in rows)
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="Alarms"><table class="alarms"><thead><tr>'
        f"{''.join(f'<th>{column}' for column in COLUMNS)}</thead><tbody>{body}</tbody></table></div>"
    )


def _whose(i: int, run: Run) -> str:
    return f'<i class="swatch run{i}"></i>{text(run.name)}: '


def _row(key: str, whose: str, episode: Episode) -> str:
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
    return f'<tr id="{key}">{row}<td data-of="{COLUMNS[-1]}" dir="auto">{whose}{text(e.message)}'
