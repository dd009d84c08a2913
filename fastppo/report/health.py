"""The health of a run: its figures over the steps, and the alarms that they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastppo.report.curves import number
from fastppo.report.lines import Record
from fastppo.report.plot import SIGNS, Charts, Flag, Level, Line
from fastppo.report.run import Run
from fastppo.report.texts import text

TITLES = {
    "entropy": ("Entropy", "nats a token"),
    "distinct_1": ("Distinct-1", "different words of all words"),
    "distinct_2": ("Distinct-2", "different pairs of all pairs"),
    "distinct_3": ("Distinct-3", "different triples of all triples"),
    "self_bleu": ("Self-BLEU", "likeness of responses to each other"),
    "repetition": ("Repetition", "within a response"),
    "duplicates": ("Duplicates", "share of responses"),
    "length_spread": ("Length spread", "standard deviation of lengths"),
    "kl_token": ("KL", "nats a token"),
    "kl_sequence": ("KL", "nats a response"),
    "perplexity": ("Perplexity", "of responses, under the reference"),
    "judge": ("Judge", "held-out, never trained on"),
    "judge_gap": ("Gap", "between proxy and judge"),
    "length_correlation": ("Length correlation", "of reward and length"),
}


REST = 10  # steps after which the trainer raises an alarm that stays on again


def figures(runs: Sequence[Run], charts: Charts) -> str:
    """A chart of each health figure, with the alarms that it gave."""
    names = dict.fromkeys(name for run in runs for name in run.names if name.startswith("health/"))
    drawn = []
    for name in names:
        figure = name.removeprefix("health/")
        title, note = TITLES.get(figure, (figure.replace("_", " ").capitalize(), ""))
        lines = [Line(run.name, run.curve(name), i) for i, run in enumerate(runs)]
        drawn.append(charts.draw(title, note, lines, flags=flags(runs, figure), levels=levels(runs, figure)))
    return "".join(drawn)


def flags(runs: Sequence[Run], *figures: str) -> list[Flag]:
    """Where the alarms of these figures began; of every figure, those that acted, if none is named."""
    return [
        Flag(float(e.first), f"{e.when}: {e.figure}. {e.message}", e.level, f"alarm-{i}-{n}")
        for i, run in enumerate(runs)
        for n, e in enumerate(episodes(run))
        if (e.figure in figures if figures else e.level == "act")
    ]


def levels(runs: Sequence[Run], figure: str) -> list[Level]:
    """The thresholds that alarms of a figure name, each once."""
    found = {(e.threshold, e.level): None for run in runs for e in episodes(run) if e.figure == figure}
    return [Level(y, level) for y, level in found if y is not None]


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
        f'<p class="note">{SIGNS["warn"]} a warning, {SIGNS["act"]} an alarm that acted; dashed: its threshold.</p>'
        '<div class="scroll" tabindex="0" role="group" aria-label="Alarms"><table class="alarms"><thead><tr>'
        "<th>step<th>level<th>figure<th>value<th>threshold<th>action<th>message</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _whose(i: int, run: Run) -> str:
    return f'<i class="swatch run{i}"></i>{text(run.name)}: '


def _row(key: str, whose: str, episode: Episode) -> str:
    e, sign = episode, SIGNS[episode.level]
    return (
        f'<tr id="{key}"><td>{e.when.partition(" ")[2]}<td><span class="level-{e.level}">{sign} {e.level}</span>'
        f"<td>{text(e.figure)}<td>{number(e.value)}<td>{number(e.threshold)}<td>{text(e.action)}"
        f'<td dir="auto">{whose}{text(e.message)}'
    )
