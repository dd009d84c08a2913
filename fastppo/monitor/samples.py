"""Held-out prompts with the actor's responses before and after training: as a file, and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from fastppo.monitor.output_guard import Terminal
from fastppo.monitor.run_dir import json_line

SHOWN_CELLS = 300  # the number of terminal columns per text in the table of samples; samples.jsonl has the whole text


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
    """A table for a terminal: prompt, and response and score before and after training. Long texts are truncated."""
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
    """A text that is safe to print, whatever a model wrote: `Text` does not interpret markup, and characters that are
    not printable, such as escape codes, are replaced."""
    shown = Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())))
    shown.truncate(SHOWN_CELLS, overflow="ellipsis")
    return shown


def write_samples(path: Path, rows: Sequence[Sample]) -> None:
    """Write one JSON object per row, with the field names of `Sample`."""
    lines = "".join(json_line(row._asdict()) for row in rows)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a lone surrogate becomes \ud800, as in JSON
