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
    """Write the report of one run, or a comparison of two. Raises RunFolderError."""
    html = page(read_runs(folders))
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        draft.write_text(html, encoding="utf-8", errors="replace")
        draft.replace(output)  # atomic: a reader never sees an incomplete report
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunFolderError(f"{output} cannot be written ({error.strerror}). Give another --output.") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastppo.report",
        description="Write one HTML file that shows a run, or compares two runs. The runs may still be in progress.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, with its metrics.jsonl")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="folder of a second run to compare")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write; default: RUN/report.html")
    options = parser.parse_args(argv)
    output = options.output or options.run / "report.html"
    try:
        write_report([options.run] + ([options.other] if options.other else []), output)
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{output} ({output.stat().st_size / 1000:,.0f} kB)")


if __name__ == "__main__":
    main()
