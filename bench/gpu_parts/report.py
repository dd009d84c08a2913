"""Where a part writes what it finds: a line of JSON at once, so that a part that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = "results.jsonl"


class SkipPart(Exception):
    """Something that a part needs is not here; the message says what, in one line."""


class Report(NamedTuple):
    part: str
    output: Path  # folder of the results
    scratch: Path  # folder that the parts share, removed at the end
    small: bool  # whether the part is to run in its small form
    end: float  # time.time() at which it is cut off

    def add(self, finding: str, text: str, **values: Any) -> None:
        """One finding: a name, a line or more to print, and what is in it for a program."""
        write_line(self.output, {"part": self.part, "finding": finding, "text": text, **values})

    def skip(self, what: str, why: str) -> None:
        """A measurement within the part that cannot be made here."""
        self.add("skipped", f"{what}: skipped, {why}", what=what, why=why)

    def seconds_left(self) -> float:
        return self.end - time.time()


def write_line(output: Path, record: dict[str, Any]) -> None:
    """Append a record to the results, whole and on the disk when this returns."""
    line = json.dumps(record, default=str) + "\n"
    descriptor = os.open(output / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def table(rows: list[dict[str, Any]]) -> str:
    """Records as aligned text, a column for each key; numbers with three digits."""
    if not rows:
        return "(none)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    texts = [isinstance(rows[0].get(name), str) for name in names]
    lines = [
        "  ".join(cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(line, widths, texts, strict=True))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def line(row: dict[str, Any]) -> str:
    """A record as one line."""
    return ", ".join(f"{name} {_cell(value)}" for name, value in row.items())


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
