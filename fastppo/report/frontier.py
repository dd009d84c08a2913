"""Reward against the square root of the KL to the reference (Gao et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean

from fastppo.monitor import trend
from fastppo.report.curves import Curve, number, smooth, span
from fastppo.report.plot import Charts, Line
from fastppo.report.run import Run
from fastppo.report.titles import Quantity

MAX_DOTS = 400  # the maximum number of points per run; each point of a run with more steps is the mean of several
MIN_FOR_MEANS = 6  # points needed for running means
MIN_FALL = 8  # points needed after the judge's maximum to detect a fall
# The Mann-Kendall z needed for a fall. Of 1,000 runs of 36 steps whose judge is constant with noise, 17 exceed it.
MIN_FALL_Z = 2.4
PANELS = (
    (Quantity("Proxy", "the score used for training"), "score"),
    (Quantity("Judge", "a score not used for training"), "health/judge"),
)


def frontier(runs: Sequence[Run], charts: Charts) -> str:
    """Two charts with the same x axis: the proxy and the judge. The point after which the judge falls while the proxy
    rises is marked."""
    lines = {score: _lines(runs, score) for _, score in PANELS}
    xs = [x for group in lines.values() for line in group for x in line.curve.x]
    if not xs:
        return ""
    marks = [mark for run in runs for mark in turning_point(run, f"{run.name}: " if len(runs) > 1 else "")]
    return "".join(
        charts.draw(
            shown,
            lines[score],
            x_title="\N{SQUARE ROOT}KL to the reference, nats per response",
            x_range=span(xs, room=0.02),
            marks=marks if score == "health/judge" else [(x, "") for x, _ in marks],
            kind="wide",
        )
        for shown, score in PANELS
    )


def turning_point(run: Run, prefix: str = "") -> list[tuple[float, str]]:
    """sqrt(KL) at the judge's maximum with a sentence; empty unless the judge has fallen since while the proxy rose."""
    steps, root, judge = _columns(run, "health/judge")
    proxy = _columns(run, "score")[2]
    if len(judge) < MIN_FOR_MEANS or len(proxy) != len(judge):
        return []
    means = _mean(judge)
    top = max(range(len(judge)), key=means.__getitem__)
    if len(judge) - top < MIN_FALL or trend(judge[top:]) > -MIN_FALL_Z or trend(proxy[top:]) <= 0:
        return []
    x = _mean(root)[top]
    sentence = f"the judge was highest at {number(x)} (step {steps[top]}); after that the proxy continued to rise"
    return [(x, f"{prefix}{sentence}")]


def _lines(runs: Sequence[Run], score: str) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        steps, root, scores = _columns(run, score)
        name = f"{run.name}, " if len(runs) > 1 else ""
        lines.append(Line(f"{name}each step", Curve(root, scores), i, dots=True, steps=steps))
        if len(steps) >= MIN_FOR_MEANS:
            lines.append(Line(f"{name}running mean", Curve(_mean(root), _mean(scores)), i, steps=steps))
    return lines


def _columns(run: Run, score: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, sqrt(KL) and scores, at most `MAX_DOTS` of each. A negative estimate of the KL counts as 0."""
    rows = [(r["step"], sqrt(max(r["kl"], 0.0)), r[score]) for r in run.metrics if _has(r.get("kl"), r.get(score))]
    n = min(len(rows), MAX_DOTS)
    parts = [rows[i * len(rows) // n : (i + 1) * len(rows) // n] for i in range(n)]
    steps, root, scores = ([fmean(row[column] for row in part) for part in parts] for column in range(3))
    return [round(step) for step in steps], root, scores


def _has(*values: float | None) -> bool:
    return None not in values


def _mean(values: Sequence[float]) -> list[float]:
    curve = smooth(Curve(range(len(values)), values), window=max(3, len(values) // 12))
    return [y for y in curve.y if y is not None]
