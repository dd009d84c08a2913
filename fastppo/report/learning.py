"""The sections on learning and time: metrics of training over the steps, held-out evaluations, seconds and speed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from fastppo.report.curves import Curve
from fastppo.report.health import flags
from fastppo.report.levels import levels
from fastppo.report.plot import Charts, Line, grid
from fastppo.report.run import Run
from fastppo.report.titles import Quantity, quantity

MAIN = ("score", "judge", "kl", "loss", "accuracy")
SMALL = (
    "score_drawn",
    "entropy",
    "response_length",
    "turns",
    "observed_tokens",
    "turn_reward",
    "ended",
    "reward",
    "explained_variance",
    "advantage_share",
    "clip_fraction",
    "approx_kl",
    "ratio_max",
    "policy_loss",
    "value_loss",
    "ptx_loss",
    "nll_loss",
    "actor_grad_norm",
    "critic_grad_norm",
    "kl_coef",
    "actor_lr",
    "ref_perplexity",
    "distinct_2",
    "perplexity",
    "calibration_error",
    "score_chosen",
    "score_rejected",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logprob_chosen_change",
    "logprob_chosen",
    "grad_norm",
    "lr",
)
TRAINING_NAMES = {"judge": "health/judge"}  # metrics that have another name in training than in evaluations
OTHER_SECTIONS = ("time/", "health/", "tokens_per_second")  # prefixes of the metrics that other sections show
QUARTERS = range(1, 5)
BAR_ENDS = ("_error", "_low", "_high")  # suffixes of metrics that are drawn as error bars of another metric
BY_QUARTER = {  # means over the second half of the steps, by the quarter of a response
    "explained_variance": Quantity("The critic by position", "explained variance of the returns", high=1.0),
    "value_bias": Quantity("Calibration of the critic", "value less return, mean over tokens"),
}
CALIBRATION = Quantity("Calibration", "share of correctly ordered pairs; bars: 95%", 0.0, 1.0)


def learning(runs: Sequence[Run], charts: Charts) -> str:
    """The charts of training and evaluation, the most important first; the rest is in a closed `<details>`."""
    names = dict.fromkeys(name.removeprefix("eval/") for run in runs for name in run.names)
    numbered = [name for name in names if re.match(r"(improve|turn)\d+/", name)]
    quarters = [f"{name}/{quarter}" for name in BY_QUARTER for quarter in QUARTERS]
    rest = [
        name
        for name in names
        if name not in (*MAIN, *SMALL, *numbered, *quarters) and not name.startswith(OTHER_SECTIONS)
    ]
    rest = [name for name in rest if not any(name.removesuffix(end) in names for end in BAR_ENDS if name.endswith(end))]
    main = grid("".join(_chart(runs, charts, name, "large") for name in MAIN), "large")
    small = grid(_calibration(runs, charts) + "".join(_chart(runs, charts, name) for name in (*SMALL, *numbered)))
    small += grid("".join(_by_quarter(runs, charts, name) for name in BY_QUARTER))
    more = grid("".join(_chart(runs, charts, name) for name in rest))
    if (main or small) and more:
        return f"{main}{small}<details><summary>More metrics</summary>{more}</details>"
    return main + small + more or "<p>No step has been recorded yet.</p>"


def _chart(runs: Sequence[Run], charts: Charts, name: str, kind: str = "small") -> str:
    """A chart of a training metric over the steps, with the metric of the same name in evaluations as dots."""
    lines = []
    for i, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        lines.append(Line(f"{prefix}training", run.curve(TRAINING_NAMES.get(name, name)), i))
        lines.append(Line(f"{prefix}held-out", run.curve(f"eval/{name}"), i, dots=True, bars=_bars(run, name)))
    shown = quantity(name)
    if any(line.bars for line in lines):
        has_error = any(run.curve(f"eval/{name}_error").points for run in runs)
        shown = shown._replace(note=f"{shown.note}; bars: {'standard error' if has_error else '95%'}")
    if kind == "large":
        return charts.draw(shown, lines, flags=flags(runs), kind=kind)
    if any(f"health/{name}" in run.names for run in runs):  # the health section has its alarms
        return charts.draw(shown, lines)
    return charts.draw(shown, lines, flags=flags(runs, name), levels=levels(runs, name))


def _bars(run: Run, name: str) -> Mapping[float, tuple[float, float]]:
    """The error bar of each evaluation, step -> (low, high): its confidence interval, or +/- its standard error."""
    error, low, high = (dict(run.curve(f"eval/{name}{end}").points) for end in BAR_ENDS)
    symmetric = {x: (y - error[x], y + error[x]) for x, y in run.curve(f"eval/{name}").points if x in error}
    return symmetric | {x: (low[x], high[x]) for x in low.keys() & high.keys()}


def _calibration(runs: Sequence[Run], charts: Charts) -> str:
    """A chart of a reward model's accuracy against its predicted probability."""
    lines = []
    for i, run in enumerate(runs):
        bins = [b for b in run.reliability if b["predicted"] is not None and b["observed"] is not None]
        curve = Curve([b["predicted"] for b in bins], [b["observed"] for b in bins])
        ends = {b["predicted"]: (b["observed_low"], b["observed_high"]) for b in bins}
        bars = {x: (low, high) for x, (low, high) in ends.items() if low is not None and high is not None}
        lines.append(Line(f"{run.name}, held-out" if len(runs) > 1 else "held-out", curve, i, dots=True, bars=bars))
    return charts.draw(CALIBRATION, lines, x_title="predicted probability", x_range=(0.5, 1.0), diagonal=True)


def _by_quarter(runs: Sequence[Run], charts: Charts, name: str) -> str:
    """A chart of a metric of the critic against the position in a response."""
    lines = []
    for i, run in enumerate(runs):
        curves = {quarter: run.curve(f"{name}/{quarter}").points for quarter in QUARTERS}
        late = {quarter: [y for _, y in points[len(points) // 2 :]] for quarter, points in curves.items() if points}
        curve = Curve([float(quarter) for quarter in late], [fmean(ys) for ys in late.values()])
        lines.append(Line(run.name if len(runs) > 1 else "training", curve, i))
    return charts.draw(BY_QUARTER[name], lines, x_title="quarter of a response", counted="quarter", x_range=(1.0, 4.0))


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
