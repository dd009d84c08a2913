"""The HTML page: its sections, and the markup around them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files

from fastppo import __version__
from fastppo.report import health, texts, tiles
from fastppo.report.frontier import frontier
from fastppo.report.learning import learning, times
from fastppo.report.plot import Charts, as_script, grid
from fastppo.report.run import Run
from fastppo.report.settings import settings


def page(runs: Sequence[Run]) -> str:
    """The content of the HTML file for one run, or for a comparison of two."""
    charts = Charts()
    sections = [
        ("learning", "Learning", learning(runs, charts)),
        ("frontier", "Reward against drift", grid(frontier(runs, charts), "one")),
        ("health", "Health", health.health(runs, charts)),
        ("time", "Time", times(runs, charts)),
        ("heldout", "Held-out responses by step", texts.heldout(runs)),
        ("training", "Training responses by step", texts.training(runs)),
        ("settings", "Settings", settings(runs)),
    ]
    name = " and ".join(run.name for run in runs)
    state = f"{tiles.state(runs)} · written {datetime.now():%Y-%m-%d %H:%M}"
    return document(name, tiles.names(runs), state, f"{tiles.endings(runs)}{tiles.tiles(runs)}", sections, charts)


def document(
    name: str, heading: str, state: str, below: str, sections: Sequence[tuple[str, str, str]], charts: Charts
) -> str:
    """A whole page. name: plain text; heading, state, below: the header, in HTML; sections: key, title and body, of
    which those without a body are left out."""
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in shown)
    assets = files("fastppo.report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · fastppo</title>
<link rel="icon" href="data:,">
<style>
{assets.joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<p class="brand">fastppo <span>report</span></p>
<button id="theme" type="button" hidden>theme: auto</button>
<h1>{heading}</h1>
<p class="state">{state}</p>
{below}
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<footer>fastppo {__version__}</footer>
<script type="application/json" id="data">{as_script(charts.data)}</script>
<script>
{assets.joinpath("page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""
