"""Reward against the square root of KL (Gao et al., 2023): how far the policy has gone, and what it got for that."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean

from fastppo.monitor import trend
from fastppo.report.curves import Curve, number, smooth, span
from fastppo.report.plot import Charts, Line
from fastppo.report.run import Run
from fastppo.report.titles import Quantity

DOTS = 400  # points of a run; of one with more steps each is the mean of some
FEWEST = 6  # for running means
FALL = 8  # since the judge was highest; fewer tell nothing
SURE = 2.4  # of a fall: a peak that was picked from noise passes in 17 of 1,000 runs of 36 steps whose judge is flat
PANELS = (
    (Quantity("Proxy", "the score that is trained on"), "score"),
    (Quantity("Judge", "a score that is never trained on"), "health/judge"),
)


def frontier(runs: Sequence[Run], charts: Charts) -> str:
    """The proxy and, below it on the same axis, the judge; marked is where the judge turned down and the proxy not."""
    lines = {score: _lines(runs, score) for _, score in PANELS}
    xs = [x for group in lines.values() for line in group for x in line.curve.x]
    if not xs:
        return ""
    marks = [mark for run in runs for mark in turning_point(run, f"{run.name}: " if len(runs) > 1 else "")]
    return "".join(
        charts.draw(
            shown,
            lines[score],
            x_title="\N{SQUARE ROOT}KL to the reference, nats a response",
            x_range=span(xs, room=0.02),
            marks=marks if score == "health/judge" else [(x, "") for x, _ in marks],
            kind="wide",
        )
        for shown, score in PANELS
    )


def turning_point(run: Run, whose: str = "") -> list[tuple[float, str]]:
    """sqrt(KL) where the judge was highest, and a sentence; none unless it has fallen since while the proxy rose."""
    steps, root, judge = _columns(run, "health/judge")
    proxy = _columns(run, "score")[2]
    if len(judge) < FEWEST or len(proxy) != len(judge):
        return []
    means = _mean(judge)
    top = max(range(len(judge)), key=means.__getitem__)
    if len(judge) - top < FALL or trend(judge[top:]) > -SURE or trend(proxy[top:]) <= 0:
        return []
    place = _mean(root)[top]
    return [(place, f"{whose}the judge was highest at {number(place)} (step {steps[top]}), and the proxy rose on")]


def _lines(runs: Sequence[Run], score: str) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        steps, root, scores = _columns(run, score)
        name = f"{run.name}, " if len(runs) > 1 else ""
        lines.append(Line(f"{name}each step", Curve(root, scores), i, dots=True, steps=steps))
        if len(steps) >= FEWEST:
            lines.append(Line(f"{name}running mean", Curve(_mean(root), _mean(scores)), i, steps=steps))
    return lines


def _columns(run: Run, score: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, sqrt(KL) and scores, at most `DOTS` of each. An estimate of KL that is below 0 counts as 0."""
    rows = [(r["step"], sqrt(max(r["kl"], 0.0)), r[score]) for r in run.metrics if _has(r.get("kl"), r.get(score))]
    n = min(len(rows), DOTS)
    parts = [rows[i * len(rows) // n : (i + 1) * len(rows) // n] for i in range(n)]
    steps, root, scores = ([fmean(row[column] for row in part) for part in parts] for column in range(3))
    return [round(step) for step in steps], root, scores


def _has(*values: float | None) -> bool:
    return None not in values


def _mean(values: Sequence[float]) -> list[float]:
    curve = smooth(Curve(range(len(values)), values), window=max(3, len(values) // 12))
    return [y for y in curve.y if y is not None]
