"""The quickstart over several seeds, against what it promises; a soak of minutes a seed.

    python bench/quickstart_seeds.py --seeds 1 2 3

On 64 fixed held-out prompts at temperature 1 the mean score must rise by 0.4 or by half of the distance from its start
to 1, while KL (k1, summed over a response) stays at most 10, the responses' perplexity under the reference at most 1.5
times its start, and distinct-2 at least 0.8 of its start. Exits with 1 if a seed falls short.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def run(seed: int, output: Path, settings: list[str]) -> dict[str, float]:
    """One run, and what changed on the held-out prompts."""
    command = ["deepspeed", "fastppo/train.py", "--config", "quickstart", "--seed", str(seed), "--output", str(output)]
    start = time.monotonic()
    subprocess.run([*command, *settings], check=True, stdout=sys.stderr)
    seconds = time.monotonic() - start
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (r for r in records if "eval/score" in r)
    return {
        "seed": seed,
        "score before": before["eval/score"],
        "score after": after["eval/score"],
        "KL": after["eval/kl"],
        "perplexity ratio": after["eval/ref_perplexity"] / before["eval/ref_perplexity"],
        "distinct-2 ratio": after["eval/distinct_2"] / before["eval/distinct_2"],
        "seconds": seconds,
    }


def holds(row: dict[str, float]) -> bool:
    """Whether a seed did what the quickstart promises."""
    rise, missing = row["score after"] - row["score before"], 1 - row["score before"]
    drift = row["KL"] <= 10 and row["perplexity ratio"] <= 1.5 and row["distinct-2 ratio"] >= 0.8
    return rise >= min(0.4, missing / 2) and drift


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    options, settings = parser.parse_known_args()
    rows = [run(seed, options.output / str(seed), settings) for seed in options.seeds]
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{row[name]:.0f}" if name in ("seed", "seconds") else f"{row[name]:.2f}" for name in names)
            + " |"
        )
    sys.exit(0 if all(map(holds, rows)) else 1)


if __name__ == "__main__":
    main()
