"""The page: its sections, and the frame around them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from statistics import fmean
from typing import Any

from fastppo import __version__
from fastppo.config import Config
from fastppo.report import health, texts
from fastppo.report.curves import duration, number
from fastppo.report.frontier import frontier
from fastppo.report.plot import Charts, Line, as_script
from fastppo.report.run import Run, flat

# Charts of the learning section: metric, title, what it is. An evaluation's metric of that name is laid over it.
MAIN = (
    ("score", "Score", "mean of the responses"),
    ("kl", "KL to the reference", "nats a response"),
)
LEARNING = (
    ("entropy", "Entropy", "nats a token"),
    ("response_length", "Response length", "tokens"),
    ("ended", "Ended", "share of responses"),
    ("reward", "Reward", "score less KL penalty, a response"),
    ("explained_variance", "Explained variance", "of the returns, by the critic"),
    ("clip_fraction", "Clipped", "share of tokens"),
    ("approx_kl", "Approximate KL", "of an update, nats a token"),
    ("ratio_max", "Largest ratio", "of new and old probability"),
    ("policy_loss", "Policy loss", ""),
    ("value_loss", "Value loss", ""),
    ("ptx_loss", "Loss of the text", "PPO-ptx, nats a token"),
    ("actor_grad_norm", "Gradient norm", "actor"),
    ("critic_grad_norm", "Gradient norm", "critic"),
    ("kl_coef", "KL coefficient", "beta"),
    ("actor_lr", "Learning rate", "actor"),
    ("ref_perplexity", "Perplexity", "of held-out responses, under the reference"),
    ("distinct_2", "Distinct-2", "of held-out responses"),
)
ELSEWHERE = ("time/", "health/")  # prefixes of metrics with a section of their own


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file about one run, or two laid over each other."""
    charts = Charts()
    sections = [
        ("learning", "Learning", _learning(runs, charts)),
        ("frontier", "Reward against drift", _grid(frontier(runs, charts), "one")),
        ("health", "Health", _health(runs, charts)),
        ("time", "Time", _time(runs, charts)),
        ("heldout", "Held-out responses by step", texts.heldout(runs)),
        ("training", "Training responses by step", texts.training(runs)),
        ("settings", "Settings", _settings(runs)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown)
    name = " and ".join(run.name for run in runs)
    own = files("fastppo.report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · fastppo</title>
<link rel="icon" href="data:,">
<style>
{own.joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<p class="brand">fastppo <span>report</span></p>
<button id="theme" type="button" hidden>theme: auto</button>
<h1>{_names(runs)}</h1>
<p class="state">{" · ".join(_state(run, len(runs) > 1) for run in runs)} · written {datetime.now():%Y-%m-%d %H:%M}</p>
{_tiles(runs)}
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<footer>fastppo {__version__}</footer>
<script type="application/json" id="data">{as_script(charts.data)}</script>
<script>
{own.joinpath("page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _names(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return escape(runs[0].name)
    return " and ".join(
        f'<span class="name"><i class="swatch run{i}"></i>{escape(run.name)}</span>' for i, run in enumerate(runs)
    )


def _state(run: Run, named: bool) -> str:
    whole = run.settings.get("steps")
    done = f"{run.steps} of {whole} steps" if isinstance(whole, int) else f"{run.steps} steps"
    return f"{escape(run.name)}: {done}" if named else done


def _tiles(runs: Sequence[Run]) -> str:
    tiles = (("Score, held-out", _score), ("KL to the reference", _kl), ("Time", _took), ("Alarms", _alarm_count))
    cells = []
    for title, tell in tiles:
        values = "".join(f'<dd class="run{i}">{tell(run)}</dd>' for i, run in enumerate(runs))
        cells.append(f"<div><dt>{title}</dt>{values}</div>")
    return f'<dl class="tiles{" two" if len(runs) > 1 else ""}">{"".join(cells)}</dl>'


def _score(run: Run) -> str:
    scores = run.curve("eval/score").points or run.curve("score").points
    if not scores:
        return number(None)
    first, last = scores[0][1], scores[-1][1]
    errors = run.curve("eval/score_error").points
    error = f" <small>± {errors[-1][1]:.2g}</small>" if errors else ""
    before = f"{number(_short(first))} → " if len(scores) > 1 else ""
    return before + number(_short(last)) + error


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _kl(run: Run) -> str:
    points = run.curve("kl").points or run.curve("eval/kl").points
    return f"{number(_short(points[-1][1]))} <small>nats a response</small>" if points else number(None)


def _took(run: Run) -> str:
    seconds = sum(y for _, y in run.curve("time/step").points)
    speeds = [y for _, y in run.curve("tokens_per_second").points]
    speed = f" <small>{number(_short(fmean(speeds)))} tokens/s</small>" if speeds else ""
    return (duration(seconds) if seconds else number(None)) + speed


def _alarm_count(run: Run) -> str:
    found = health.episodes(run)
    if not found:
        return "none"
    acted = sum(e.level == "act" for e in found)
    return f'<a href="#health">{len(found)}</a>' + (f" <small>of them {acted} acted</small>" if acted else "")


def _grid(figures: str, kind: str = "") -> str:
    return f'<div class="grid {kind}">{figures}</div>' if figures else ""


def _learning(runs: Sequence[Run], charts: Charts) -> str:
    known = {name for name, _, _ in (*MAIN, *LEARNING)} | {"tokens_per_second"}
    names = dict.fromkeys(name.removeprefix("eval/") for run in runs for name in run.names)
    others = [name for name in names if name not in known and not name.startswith(ELSEWHERE)]
    others = [name for name in others if name.removesuffix("_error") not in known]  # those are drawn as bars
    main = "".join(_both(runs, charts, *metric, kind="large") for metric in MAIN)
    small = "".join(_both(runs, charts, *metric) for metric in LEARNING)
    rest = "".join(_both(runs, charts, name, name.replace("_", " ").capitalize(), "") for name in others)
    first = _grid(main, "large") + _grid(small)
    if first and rest:
        return f"{first}<details><summary>More metrics</summary>{_grid(rest)}</details>"
    return first or _grid(rest) or "<p>No step has been recorded yet.</p>"


def _both(runs: Sequence[Run], charts: Charts, name: str, title: str, note: str, kind: str = "small") -> str:
    """A metric over the steps and, as dots, the evaluations' metric of the same name."""
    lines = []
    for i, run in enumerate(runs):
        whose = f"{run.name}, " if len(runs) > 1 else ""
        lines.append(Line(f"{whose}training", run.curve(name), i))
        errors = dict(run.curve(f"eval/{name}_error").points)
        lines.append(Line(f"{whose}held-out", run.curve(f"eval/{name}"), i, dots=True, errors=errors))
    return charts.draw(title, note, lines, flags=health.flags(runs) if kind == "large" else (), kind=kind)


def _health(runs: Sequence[Run], charts: Charts) -> str:
    if not any(run.alarms or any(name.startswith("health/") for name in run.names) for run in runs):
        return ""
    return health.alarms(runs) + _grid(health.figures(runs, charts))


def _time(runs: Sequence[Run], charts: Charts) -> str:
    names = dict.fromkeys(n for run in runs for n in run.names if n.startswith("time/") and n != "time/step")
    if not names:
        return ""
    bars = "".join(_bar(run, i, list(names), len(runs) > 1) for i, run in enumerate(runs))
    curves = [("tokens_per_second", "Tokens a second", "written, over the whole step")]
    curves += [("time/step", "Step", "seconds")]
    curves += [(name, name.removeprefix("time/").replace("_", " ").capitalize(), "seconds a step") for name in names]
    drawn = (
        charts.draw(title, note, [Line(run.name, run.curve(name), i) for i, run in enumerate(runs)])
        for name, title, note in curves
    )
    return bars + _grid("".join(drawn))


def _bar(run: Run, i: int, names: Sequence[str], named: bool) -> str:
    """The stages' mean seconds as one bar, and in words."""
    means = {name: fmean(y for _, y in points) for name in names if (points := run.curve(name).points)}
    total = sum(means.values())
    if not total:
        return ""
    parts = "".join(
        f'<span class="stage{n % 6}" style="flex-grow:{seconds / total * 100:.2f}"></span>'
        for n, seconds in enumerate(means.values())
    )
    legend = "".join(
        f'<li><i class="stage{n % 6}"></i>{escape(name.removeprefix("time/"))} <b>{seconds:.3g} s</b>'
        f" <small>{seconds / total:.0%}</small></li>"
        for n, (name, seconds) in enumerate(means.items())
    )
    whose = f'<p class="whose"><i class="swatch run{i}"></i>{escape(run.name)}</p>' if named else ""
    return f'{whose}<div class="bar" aria-hidden="true">{parts}</div><ul class="stages">{legend}</ul>'


def _settings(runs: Sequence[Run]) -> str:
    """Every setting; marked is what is not the default, and for two runs the differences come first."""
    if not any(run.settings for run in runs):
        return ""
    defaults = flat(dataclasses.asdict(Config()))
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    different = [n for n in names if len({_yaml(run.settings.get(n)) for run in runs}) > 1]
    head = ""
    if len(runs) > 1:
        rows = "".join(_setting(n, n, runs, defaults) for n in different)
        head = f"<h3>Differences</h3>{_table(rows, runs)}" if rows else "<p>The settings are the same.</p>"
    groups = dict.fromkeys(name.partition(".")[0] if "." in name else "" for name in names)
    tables = "".join(
        f"<div><h3>{escape(group or 'run')}</h3>"
        + _table(
            "".join(_setting(n, n.partition(".")[2] or n, runs, defaults) for n in names if _is_of(n, group)), runs
        )
        + "</div>"
        for group in groups
    )
    note = '<p class="note">Bold is what is not the default.</p>'
    whole = f'{note}<div class="groups">{tables}</div>'
    return f"{head}<details><summary>All settings</summary>{whole}</details>" if head else whole


def _is_of(name: str, group: str) -> bool:
    return name.startswith(f"{group}.") if group else "." not in name


def _table(rows: str, runs: Sequence[Run]) -> str:
    head = "".join(f'<th><i class="swatch run{i}"></i>{escape(run.name)}' for i, run in enumerate(runs))
    return f'<table class="settings">{f"<thead><tr><th>{head}</thead>" if len(runs) > 1 else ""}<tbody>{rows}</table>'


def _setting(name: str, called: str, runs: Sequence[Run], defaults: dict[str, Any]) -> str:
    cells = []
    for run in runs:
        value = _yaml(run.settings[name]) if name in run.settings else number(None)
        changed = name in defaults and value != _yaml(defaults[name])
        cells.append(f"<td><b>{texts.text(value)}</b>" if changed else f"<td>{texts.text(value)}")
    return f"<tr><th>{escape(called)}{''.join(cells)}"


def _yaml(value: Any) -> str:
    """A value as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
