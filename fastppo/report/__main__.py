"""The command line of the report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastppo.errors import FastPPOError
from fastppo.monitor import RunFolderError
from fastppo.report.page import page
from fastppo.report.run import read_runs


def write_report(folders: list[Path], output: Path) -> None:
    """Write the report of one run, or of two laid over each other. Raises RunFolderError."""
    html = page(read_runs(folders))
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_text(html, encoding="utf-8", errors="replace")
        draft.replace(output)  # a reader sees the old report or the new one, never half of one
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunFolderError(f"{output} cannot be written ({error.strerror}). Give another --output.") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastppo.report",
        description="Write one HTML file about a run, or about two runs laid over each other. The run may be going on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, with its metrics.jsonl")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="a second run, laid over the first")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write; RUN/report.html when left out")
    given = parser.parse_args(argv)
    output = given.output or given.run / "report.html"
    try:
        write_report([given.run] + ([given.other] if given.other else []), output)
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{output} ({output.stat().st_size / 1000:,.0f} kB)")


if __name__ == "__main__":
    main()
