"""Train the quickstart's reward model with several seeds and compare with its target. About a minute per seed.

    python bench/reward_seeds.py --seeds 1 2 3

Of 300 held-out pairs of film reviews, the same for every seed, at least 80% must be ordered correctly. The seed
determines the initial score head and the order of the pairs. Exits with 1 if a seed misses the target.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

PROMISED = 0.8


def run(seed: int, output: Path, settings: list[str]) -> dict[str, str]:
    """One run. Returns the measurements of the model that it saves, the one with the lowest held-out loss."""
    command = ["deepspeed", "fastppo/train_reward.py", "--config", "quickstart-reward", "--seed", str(seed)]
    start = time.monotonic()
    subprocess.run([*command, "--output", str(output), *settings], check=True, stdout=sys.stderr)
    seconds = time.monotonic() - start
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "eval/loss" in record]
    before, best = evaluations[0], min(evaluations[1:], key=lambda record: record["eval/loss"])

    def interval(name: str) -> str:
        return f"{best[f'eval/{name}']:.3f} ({best[f'eval/{name}_low']:.3f} to {best[f'eval/{name}_high']:.3f})"

    return {
        "seed": str(seed),
        "accuracy before": f"{before['eval/accuracy']:.3f}",
        "accuracy after (95%)": interval("accuracy"),
        "loss": f"{best['eval/loss']:.3f}",
        "calibration error (95%)": interval("calibration_error"),
        "step": str(best["step"]),
        "seconds": f"{seconds:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart's reward model with several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/reward-seeds"))
    options, settings = parser.parse_known_args()
    rows = [run(seed, options.output / str(seed), settings) for seed in options.seeds]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    sys.exit(0 if all(float(row["accuracy after (95%)"].split()[0]) >= PROMISED for row in rows) else 1)


if __name__ == "__main__":
    main()
