"""Pages of proxy and judge against the root of the KL (Gao et al., 2023), of best-of-n and of several methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from math import sqrt

from fastppo.report.curves import Curve, number, span
from fastppo.report.page import document
from fastppo.report.plot import Charts, Line, grid
from fastppo.report.titles import Quantity
from fastppo.rewards import LEVEL, Band, BestOfN, kl_bound

MAX_POINTS = 100  # of a curve: every n up to it, then n at equal ratios
MAX_METHODS = 4  # that have a colour of their own beside best-of-n


@dataclass(frozen=True)
class Outcome:
    """What a method's run came to, on held-out prompts."""

    method: str
    kl: float  # to the policy that all methods start from, nats per response
    score: float  # the proxy
    judge: float


def methods_page(outcomes: Sequence[Outcome], estimate: BestOfN, name: str, state: str, remarks: Sequence[str]) -> str:
    """The content of the HTML file: each method's runs as dots beside the curve of best-of-n.

    outcomes: of at most `MAX_METHODS` methods; estimate: with a judge; its KL is the upper bound; name, state, remarks:
    as of `best_of_n_page`.
    """
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    if len(methods) > MAX_METHODS:
        raise ValueError(f"{len(methods)} methods have no colour each: {', '.join(methods)}")
    assert estimate.judge is not None
    charts, xs = Charts(), [sqrt(max(outcome.kl, 0.0)) for outcome in outcomes]
    panels = (
        (Quantity("Proxy", "the score that is trained for"), estimate.score, [o.score for o in outcomes]),
        (Quantity("Judge", "a score that nothing is trained for"), estimate.judge, [o.judge for o in outcomes]),
    )
    figures = ""
    for shown, band, values in panels:
        lines = [_line(f"best of n, to n = {estimate.n_max}", band)]
        for run, method in enumerate(methods, start=1):
            points = sorted((x, y) for x, y, o in zip(xs, values, outcomes, strict=True) if o.method == method)
            lines.append(Line(method, Curve(*zip(*points, strict=True)), run, dots=True))
        figures += charts.draw(
            shown._replace(note=f"{shown.note}; held-out mean" + f", band: {LEVEL:.0%}" * (band.low is not None)),
            lines,
            x_title="\N{SQUARE ROOT}KL to the start, nats per response (best of n: its upper bound)",
            x_range=span([0.0, sqrt(kl_bound(estimate.n_max)), *xs], room=0.02),
            kind="wide",
        )
    said = "".join(f'<p class="note">{escape(remark)}</p>' for remark in remarks)
    state = f"{escape(state)} · written {datetime.now():%Y-%m-%d %H:%M}"
    sections = [("frontier", "Reward against drift", grid(figures, "one") + said)]
    return document(name, escape(name), state, "", sections, charts)


def best_of_n_page(estimate: BestOfN, name: str, state: str, remarks: list[str]) -> str:
    """The content of the HTML file. name: of the responses; state: what was read; remarks: sentences, all in plain
    text."""
    charts = Charts()
    turn = estimate.turn
    mark = (
        [] if turn is None else [(sqrt(kl_bound(turn.n)), f"the judge is highest at n = {turn.n}, and falls after it")]
    )
    panels = [(Quantity("Proxy", "the score by which the best is chosen"), estimate.score, [(x, "") for x, _ in mark])]
    if estimate.judge is not None:
        panels.append((Quantity("Judge", "a score by which nothing is chosen"), estimate.judge, mark))
    figures = "".join(
        charts.draw(
            shown._replace(note=f"{shown.note}; mean over prompts" + f", band: {LEVEL:.0%}" * (band.low is not None)),
            [_line(shown.title, band)],
            x_title="\N{SQUARE ROOT} of the upper bound on the KL to the policy, nats per response",
            counted="n",
            x_range=span([0.0, sqrt(kl_bound(estimate.n_max))], room=0.02),
            marks=marks,
            kind="wide",
        )
        for shown, band, marks in panels
    )
    said = "".join(f'<p class="note">{escape(remark)}</p>' for remark in remarks)
    state = f"{escape(state)} · written {datetime.now():%Y-%m-%d %H:%M}"
    sections = [("frontier", "Reward against drift", grid(figures, "one") + said), ("table", "Table", _table(estimate))]
    return document(name, f"Best of n, {escape(name)}", state, "", sections, charts)


def shown_n(n_max: int) -> list[int]:
    """The n that are drawn, ascending, from 1 to n_max: at most `MAX_POINTS`."""
    if n_max <= MAX_POINTS:
        return list(range(1, n_max + 1))
    return sorted({round(n_max ** (i / (MAX_POINTS - 1))) for i in range(MAX_POINTS)})


def _line(label: str, band: Band) -> Line:
    shown = shown_n(len(band.mean))
    x = [sqrt(kl_bound(n)) for n in shown]
    bars = {}
    if band.low is not None and band.high is not None:
        bars = {at: (float(band.low[n - 1]), float(band.high[n - 1])) for at, n in zip(x, shown, strict=True)}
    return Line(label, Curve(x, [float(band.mean[n - 1]) for n in shown]), steps=shown, bars=bars)


def _table(estimate: BestOfN) -> str:
    bands = [("Proxy", estimate.score)] + ([] if estimate.judge is None else [("Judge", estimate.judge)])
    head = "".join(f"<th>{title}</th>" for title in ("n", "KL at most", *(title for title, _ in bands)))
    rows = "".join(
        f"<tr><td>{n}</td><td>{number(kl_bound(n))}</td>{''.join(_cell(band, n) for _, band in bands)}</tr>"
        for n in shown_n(estimate.n_max)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(band: Band, n: int) -> str:
    interval = ""
    if band.low is not None and band.high is not None:
        interval = f" <small>{number(float(band.low[n - 1]))} to {number(float(band.high[n - 1]))}</small>"
    return f"<td>{number(float(band.mean[n - 1]))}{interval}</td>"
