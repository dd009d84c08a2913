"""The time section: the seconds of each phase, and the speed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

from fastppo.report.plot import Charts, Line, grid
from fastppo.report.run import Run
from fastppo.report.titles import quantity


def times(runs: Sequence[Run], charts: Charts) -> str:
    """The mean seconds of the phases as shares of a step, and charts of times and speeds over the steps."""
    names = dict.fromkeys(n for run in runs for n in run.names if n.startswith("time/") and n != "time/step")
    bars = "".join(_bar(run, i, list(names), len(runs) > 1) for i, run in enumerate(runs))
    speeds = dict.fromkeys(n for run in runs for n in run.names if n.startswith("tokens_per_second/"))
    curves = ("tokens_per_second", "time/step", *names, *speeds)
    drawn = (
        charts.draw(quantity(name), [Line(run.name, run.curve(name), i) for i, run in enumerate(runs)])
        for name in curves
    )
    return bars + grid("".join(drawn))


def _bar(run: Run, i: int, names: Sequence[str], named: bool) -> str:
    """The mean seconds of the phases as one bar, with a legend. named: show the run's name."""
    means = {name: fmean(y for _, y in points) for name in names if (points := run.curve(name).points)}
    total = sum(means.values())
    if not total:
        return ""
    parts = "".join(
        f'<span class="phase{n % 6}" style="flex-grow:{seconds / total * 100:.2f}"></span>'
        for n, seconds in enumerate(means.values())
    )
    legend = "".join(
        f'<li><i class="phase{n % 6}"></i>{escape(name.removeprefix("time/"))} <b>{seconds:.3g} s</b>'
        f" <small>{seconds / total:.0%}</small></li>"
        for n, (name, seconds) in enumerate(means.items())
    )
    whose = f'<p class="whose"><i class="swatch run{i}"></i>{escape(run.name)}</p>' if named else ""
    return f'{whose}<div class="bar" aria-hidden="true">{parts}</div><ul class="phases">{legend}</ul>'
