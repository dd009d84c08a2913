"""Held-out prompts with what the actor wrote to them before and after training: as a file, and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from fastppo.monitor.run_dir import as_line
from fastppo.monitor.tell import Terminal

SHOWN_CELLS = 300  # columns of the terminal for one text in the table of samples; samples.jsonl holds all of it


class Sample(NamedTuple):
    """A held-out prompt, and the responses and scores of the actor before and after training."""

    prompt: str
    before: str
    score_before: float
    after: str
    score_after: float


def show_samples(rows: Iterable[Sample]) -> None:
    """Print `samples_table` on stdout."""
    Terminal().print(samples_table(rows))


def samples_table(rows: Iterable[Sample]) -> Table:
    """Prompt, and response and score before and after, for a terminal. Long texts are cut."""
    table = Table(expand=True, show_lines=True)
    for text, score in (("prompt", None), ("before", "score"), ("after", "score")):
        table.add_column(text, ratio=1, overflow="fold")
        if score:
            table.add_column(score, justify="right", no_wrap=True)
    for row in rows:
        before, after = f"{row.score_before:.2f}", f"{row.score_after:.2f}"
        table.add_row(_printable(row.prompt), _printable(row.before), before, _printable(row.after), after)
    return table


def _printable(text: str) -> Text:
    """Models write anything. Markup stays text (`Text` reads none), and escape codes lose their force."""
    shown = Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())))
    shown.truncate(SHOWN_CELLS, overflow="ellipsis")
    return shown


def write_samples(path: Path, rows: Sequence[Sample]) -> None:
    """One JSON object a row, with the field names of `Sample`."""
    lines = "".join(as_line(row._asdict()) for row in rows)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a lone surrogate: \ud800, as JSON writes it
