"""Every causal family of the installed transformers, in miniature, on a run's way: a table of what becomes of it.

    python bench/families.py [--jobs 2] [--only llama,opt] [--table docs/families.md] [--log families.jsonl]

Planned, loaded, sampled from, updated, exported, loaded again, with every number beside the model's own forward pass
(`tests/families.py`): a family is trained, or refused in one message, and anything else is a failure, of which the
traceback is printed and the exit status is 1. A log keeps what was walked, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import transformers
from families import FAMILIES, Outcome, walk

INTRO = """# Model families

What becomes of each of the {count} families of causal language models that transformers {version} has: {trained} are
trained, {refused} are refused with the reason below. Each is walked in miniature, a random model made of the family's
own config with every size made small: planned, loaded and checked, sampled from, updated by one step of PPO, exported
and loaded again by transformers; on the way the logprobs of packed rows, of decoding and of the export are compared
with the model's own forward pass on one sequence at a time. A family whose published models differ from its config's
defaults may fare otherwise; what counts is the check that every model passes when it is loaded.

Made by `python bench/families.py --table docs/families.md`.

| family | outcome | why |
|---|---|---|
"""


def one(family: str) -> tuple[Outcome, float]:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        outcome = walk(family, Path(folder) / family)
    return outcome, time.process_time() - start


def table(outcomes: list[Outcome]) -> str:
    count = {kind: sum(outcome.kind == kind for outcome in outcomes) for kind in ("trained", "refused")}
    rows = [f"| {o.family} | {o.kind} | {first_sentence(o.why)} |" for o in outcomes]
    return INTRO.format(count=len(outcomes), version=transformers.__version__, **count) + "\n".join(rows) + "\n"


def first_sentence(text: str) -> str:
    """Of a message the sentence that says why; what follows says what to do instead."""
    lines = text.strip().splitlines() or [""]
    return lines[-1].replace("|", "\\|").partition(". ")[0].rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="families, separated by commas; all when left out")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    parser.add_argument("--log", type=Path, help="a JSONL file of what was walked, which is not walked again")
    options = parser.parse_args()
    chosen = tuple(options.only.split(",")) if options.only else FAMILIES
    done = {}
    if options.log is not None and options.log.exists():
        done = {line["family"]: Outcome(**line) for line in map(json.loads, options.log.open())}
    left = [family for family in chosen if family not in done]
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=16) as pool:
        for outcome, seconds in pool.imap_unordered(one, left):
            done[outcome.family] = outcome
            print(f"{outcome.kind:8} {outcome.family:26} {seconds:4.1f} s  {outcome.why}", flush=True)
            if options.log is not None:
                with options.log.open("a") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
    outcomes = [done[family] for family in chosen]
    if options.table is not None:
        options.table.parent.mkdir(exist_ok=True)
        options.table.write_text(table(outcomes), encoding="utf-8")
    else:
        print(table(outcomes))
    failed = [outcome.family for outcome in outcomes if outcome.kind == "failed"]
    if failed:
        sys.exit(f"neither trained nor refused: {', '.join(failed)}")


if __name__ == "__main__":
    main()
