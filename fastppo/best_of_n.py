"""What best-of-n gives, from scored responses: `python -m fastppo.best_of_n FILE [--keep best --output FILE]`.

From N responses to each prompt it estimates, for every n ≤ N, the score of the best of n responses and the judge of the
same choice, beside the bound on its KL to the policy. It loads no model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastppo.data import DataError, ScoredResponses, read_scored, whole_file, write_rows
from fastppo.errors import FastPPOError
from fastppo.report import best_of_n_page
from fastppo.rewards import LEVEL, MIN_PROMPTS_FOR_TURN, Band, BestOfN, estimate, kl_bound

BOUND = "ln n - (n - 1)/n, an upper bound (Stiennon et al., 2020; Beirami et al., 2024)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastppo.best_of_n",
        description="Estimate for every n what keeping the best of n responses would give, from N of them per prompt.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=".jsonl, .parquet, or a folder of .parquet parts")
    parser.add_argument("--n", type=int, nargs="+", help="the n of the table; default: powers of 2, and N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the estimate for every n")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    parser.add_argument("--keep", choices=["best"], help="write the best scored response to each prompt to --output")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".jsonl or .parquet, data for train_sft")
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="COUNT", help="resamples of the prompts (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    options = parser.parse_args(argv)
    if (options.keep is None) != (options.output is None):
        parser.error("--keep best and --output FILE belong together: give both, or none.")
    if options.bootstrap < 100:
        parser.error(f"--bootstrap {options.bootstrap}: an interval needs at least 100 resamples.")
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: it must be 0 or more.")
    try:
        _run(options)
    except FastPPOError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(options: argparse.Namespace) -> None:
    scored = read_scored(options.file)
    _check_samples(scored, options.n or ())
    found = estimate(scored.scores, scored.judges, resamples=options.bootstrap, seed=options.seed)
    state, remarks = _state(scored), _remarks(scored, found)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(state, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(found, sorted(set(options.n)) if options.n else _powers(found.n_max)))
    for remark in remarks:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    if options.json:
        _write(options.json, json.dumps(_record(scored, found, options), indent=1) + "\n", "--json")
    if options.html:
        name = options.file.stem or str(options.file)
        _write(options.html, best_of_n_page(found, name, state, remarks), "--html")
    if options.keep:
        console.print(_keep_best(scored, options.output), highlight=False, markup=False, soft_wrap=True)


def _check_samples(scored: ScoredResponses, asked: Sequence[int]) -> None:
    few = min(scored.prompts, key=len)
    prompt = scored.table.columns["prompt_index"][few[0]]
    if len(few) == 1:
        raise DataError(
            f"{scored.table.where(few[0])}: prompt_index {prompt} has 1 response, and the best of n needs at least 2 to"
            " each prompt. Draw more responses to a prompt, or remove this one."
        )
    if asked and (min(asked) < 1 or max(asked) > len(few)):
        wrong = min(asked) if min(asked) < 1 else max(asked)
        raise DataError(
            f"--n {wrong}: n goes from 1 to {len(few)}, the number of responses to prompt_index {prompt}, which has"
            " the fewest. Ask for a smaller n, or draw more responses to a prompt."
            if wrong > 0
            else f"--n {wrong}: n begins at 1."
        )


def _powers(n_max: int) -> list[int]:
    return sorted({n_max, *(1 << k for k in range(n_max.bit_length()))})


def _counts(scored: ScoredResponses) -> tuple[int, int, int, int]:
    """Prompts, responses, and the smallest and the largest number of responses to a prompt."""
    sizes = list(map(len, scored.prompts))
    return len(sizes), sum(sizes), min(sizes), max(sizes)


def _state(scored: ScoredResponses) -> str:
    prompts, responses, fewest, most = _counts(scored)
    each = (
        f"{fewest} each" if fewest == most else f"{fewest} to {most} each: n goes to {fewest}, all responses are used"
    )
    return f"{scored.table.source}: {responses:,} responses to {prompts:,} prompts, {each}"


def _remarks(scored: ScoredResponses, found: BestOfN) -> list[str]:
    """Sentences below the table."""
    prompts = len(scored.prompts)
    remarks = [f"KL to the policy in nats per response: {BOUND}."]
    if prompts == 1:
        remarks.append("There are no intervals: they come from a bootstrap over prompts, and there is one prompt.")
    else:
        remarks.append(f"Intervals: {LEVEL:.0%}, bootstrap over {prompts:,} prompts.")
    if found.judge is None:
        remarks.append("There is no judge in the file, so it cannot be seen whether the proxy is exploited.")
    elif prompts < MIN_PROMPTS_FOR_TURN:
        remarks.append(f"Whether the judge turns down is not tested with fewer than {MIN_PROMPTS_FOR_TURN} prompts.")
    elif found.turn is None:
        remarks.append(f"No fall of the judge to n = {found.n_max} that is more than noise.")
    else:
        turn, (first, last), (low, high) = found.turn, found.turn.interval, found.turn.fall_interval
        remarks.append(
            f"The judge turns down at n = {turn.n} ({first} to {last}) while the proxy still rises: from there to"
            f" n = {found.n_max} it falls by {turn.fall:.4g} ({low:.4g} to {high:.4g})."
        )
    return remarks


def _table(found: BestOfN, shown: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False)
    titles = ["n", "KL at most", "proxy", "", *([] if found.judge is None else ["judge", ""])]
    for title in titles:
        table.add_column(title, justify="right")
    for n in shown:
        cells = [str(n), f"{kl_bound(n):.3f}", *_cells(found.score, n)]
        table.add_row(*cells, *([] if found.judge is None else _cells(found.judge, n)))
    return table


def _cells(band: Band, n: int) -> tuple[str, str]:
    if band.low is None or band.high is None:
        return f"{band.mean[n - 1]:.4g}", ""
    return f"{band.mean[n - 1]:.4g}", f"{band.low[n - 1]:.4g} to {band.high[n - 1]:.4g}"


def _record(scored: ScoredResponses, found: BestOfN, options: argparse.Namespace) -> dict[str, Any]:
    """The content of --json. An interval or a judge that is not there is null."""
    prompts, responses, fewest, most = _counts(scored)
    turn = found.turn
    return {
        "file": scored.table.source,
        "prompts": prompts,
        "responses": responses,
        "samples": [fewest, most],
        "level": LEVEL,
        "bootstrap": options.bootstrap,
        "seed": options.seed,
        "kl": BOUND,
        "turn": turn
        and {
            "n": turn.n,
            "n_interval": list(turn.interval),
            "fall": turn.fall,
            "fall_interval": list(turn.fall_interval),
        },
        "n": [
            {"n": n, "kl_bound": kl_bound(n), **_numbers("score", found.score, n), **_numbers("judge", found.judge, n)}
            for n in range(1, found.n_max + 1)
        ],
    }


def _numbers(name: str, band: Band | None, n: int) -> dict[str, Any]:
    interval = None
    if band is not None and band.low is not None and band.high is not None:
        interval = [float(band.low[n - 1]), float(band.high[n - 1])]
    return {name: None if band is None else float(band.mean[n - 1]), f"{name}_interval": interval}


def _keep_best(scored: ScoredResponses, output: Path) -> str:
    """Write the best scored response to each prompt; returns a sentence about it."""
    scores = scored.table.columns["score"]
    best = [max(rows, key=lambda row: scores[row]) for rows in scored.prompts]  # the first of those that tie
    tied = sum(
        sum(scores[row] == scores[top] for row in rows) > 1 for rows, top in zip(scored.prompts, best, strict=True)
    )
    names = ["prompt", "response", *scored.data_columns]
    write_rows(output, {name: [scored.table.columns[name][row] for row in best] for name in names}, "--output")
    ties = f"; {tied:,} of them tie with others and have the lowest sample number" if tied else ""
    return f"{output}: the best response to each of {len(best):,} prompts{ties}"


def _write(path: Path, text: str, option: str) -> None:
    with whole_file(path, option) as draft:
        draft.write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
