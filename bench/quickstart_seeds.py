"""Run the quickstart's PPO with several seeds and compare with its targets. Takes minutes per seed.

    python bench/quickstart_seeds.py --seeds 1 2 3
    python bench/quickstart_seeds.py --seeds 1 2 3 --hacked

Every seed starts from the same SFT and reward models, which `make demo` makes. Targets, on 64 fixed held-out prompts at
temperature 1: the mean score rises by 0.4 and the judge by 0.2; KL (k1, summed over a response) is at most 12; the
responses' perplexity under the reference is at most 1.5 times, and distinct-2 at least 0.8 times, its value at the
start; no alarm is raised. With --hacked there is almost no KL penalty (`quickstart-hacked`): an alarm must end the run
with exit status 3, and no batch may have a distinct-2 below half of the mean of the first three. Exits with 1 if a seed
misses a target.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from fastppo.models.loading.source import EXPORTED_BY
from fastppo.monitor.run_dir import ALARMS, METRICS, read_lines
from fastppo.online.alarm_actions import ENDED

Verdict = tuple[dict[str, str], list[str]]  # a row of the table, and the targets that were missed


def run(preset: str, seed: int, output: Path, settings: list[str]) -> tuple[int, float]:
    """Exit status and seconds of one run."""
    command = ["deepspeed", "fastppo/train.py", "--config", preset, "--seed", str(seed), "--output", str(output)]
    start = time.monotonic()
    status = subprocess.run([*command, *settings], stdout=sys.stderr, check=False).returncode
    return status, time.monotonic() - start


def plain(status: int, metrics: list[dict[str, Any]], alarms: list[dict[str, Any]], output: Path) -> Verdict:
    """What changed on the held-out prompts."""
    before, *_, after = (record for record in metrics if "eval/score" in record)
    perplexity, distinct = (after[f"eval/{x}"] / before[f"eval/{x}"] for x in ("ref_perplexity", "distinct_2"))
    row = {f"{x} {when}": f"{r[f'eval/{x}']:.2f}" for x in ("score", "judge") for when, r in _around(before, after)}
    row |= {
        "KL per response": f"{after['eval/kl']:.2f}",
        "perplexity / start": f"{perplexity:.2f}",
        "distinct-2 / start": f"{distinct:.2f}",
        "alarms": str(len(alarms)),
    }
    promises = {
        "exit status 0": status == 0,
        "score + 0.4": after["eval/score"] - before["eval/score"] >= 0.4,
        "judge + 0.2": after["eval/judge"] - before["eval/judge"] >= 0.2,
        "KL at most 12": after["eval/kl"] <= 12,
        "perplexity at most 1.5 times its start": perplexity <= 1.5,
        "distinct-2 at least 0.8 times its start": distinct >= 0.8,
        "no alarm": not alarms,
    }
    return row, [name for name, kept in promises.items() if not kept]


def hacked(status: int, metrics: list[dict[str, Any]], alarms: list[dict[str, Any]], output: Path) -> Verdict:
    """Which alarm ended the run, and its best checkpoint; score and judge are those of held-out prompts."""
    evaluated = {record["step"]: record for record in metrics if "eval/score" in record}
    before, after = evaluated[0], evaluated[max(evaluated)]
    distinct = [record["health/distinct_2"] for record in metrics if "health/distinct_2" in record]
    lowest = min(distinct) / fmean(distinct[:3])
    acted = [alarm for alarm in alarms if alarm["level"] == "act"]
    row = {
        "ended by": ", ".join(alarm["figure"] for alarm in acted) or "nothing",
        "at step": str(acted[0]["step"]) if acted else str(metrics[-1]["step"]),
        "lowest distinct-2 / start": f"{lowest:.2f}",
    }
    row |= {f"{x} {when}": f"{r[f'eval/{x}']:.2f}" for x in ("score", "judge") for when, r in _around(before, after)}
    best = _best(output, min(alarm["good"] for alarm in acted), evaluated) if acted else None
    row["back to step"] = "-" if best is None else str(best)
    row["judge there"] = "-" if best is None else f"{evaluated[best]['eval/judge']:.2f}"
    promises = {
        f"exit status {ENDED}": status == ENDED,
        "distinct-2 at least half of its start": lowest >= 0.5,
        "a checkpoint from before": best is not None,
    }
    return row, [name for name, kept in promises.items() if not kept]


def _around(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("before", before), ("after", after)]


def _best(output: Path, good: int, evaluated: dict[int, dict[str, Any]]) -> int | None:
    """The step of the checkpoint with the judge's highest score, up to step `good` (as in `checkpoint_before`)."""
    steps = [int(path.name[5:]) for path in (output / "checkpoints").glob(f"step-{'[0-9]' * 8}")]
    return max((s for s in steps if s <= good), key=lambda s: (evaluated[s]["eval/judge"], s), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart's PPO with several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--hacked", action="store_true", help="run quickstart-hacked, which an alarm must end")
    parser.add_argument("--output", type=Path, help="default: runs/seeds or runs/seeds-hacked")
    options, settings = parser.parse_known_args()
    if missing := [
        f"{path}, which `{command.call} --config {preset}` exports"
        for path, (command, preset) in EXPORTED_BY.items()
        if not Path(path).exists()
    ]:
        sys.exit(f"There is no {' and no '.join(missing)}. `make demo` runs SFT, reward modelling and PPO.")
    preset, judge = ("quickstart-hacked", hacked) if options.hacked else ("quickstart", plain)
    folder = options.output or Path("runs/seeds-hacked" if options.hacked else "runs/seeds")
    soak(preset, judge, options.seeds, folder, settings)


def soak(preset: str, judge: Callable[..., Verdict], seeds: list[int], folder: Path, settings: list[str]) -> None:
    rows, broken = [], []
    for seed in seeds:
        output = folder / str(seed)
        status, seconds = run(preset, seed, output, settings)
        if status not in (0, ENDED):
            sys.exit(f"seed {seed}: the run failed with exit status {status}")
        row, short = judge(status, read_lines(output / METRICS), read_lines(output / ALARMS), output)
        rows.append({"seed": str(seed)} | row | {"seconds": f"{seconds:.0f}"})
        broken += [f"seed {seed} misses a target: {promise}" for promise in short]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    sys.exit("\n".join(broken) or 0)


if __name__ == "__main__":
    main()
