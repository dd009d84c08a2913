"""Parts in a process of their own, as `bench/gpu.py` starts it: python -m gpu_parts NAME [NAME ...]"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from gpu_parts.report import Report, SkipPart, write_line


def run_part(report: Report) -> str:
    """How the part ended. What was wrong with it is among its findings, and whole in the log."""
    try:
        importlib.import_module(f"gpu_parts.{report.part}").run(report)
    except SkipPart as missing:
        report.skip(report.part, str(missing))
        return "skipped"
    except (Exception, SystemExit) as error:  # settings that are refused end the process
        traceback.print_exc()
        summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        report.add("error", summary, error=summary)
        return "failed"
    return "done"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    for part in options.parts:
        start = time.time()
        status = run_part(Report(part, options.output, options.scratch, options.small, options.end))
        seconds = round(time.time() - start, 1)
        text = f"{part}: {status} after {seconds:.1f} s"
        write_line(options.output, {"part": part, "status": status, "seconds": seconds, "text": text})


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries may not end by themselves
