"""Time of a PPO step and of its phases on one rank and on two, with the same global batch and the same cores.

    python bench/ranks.py
    python bench/ranks.py --config quickstart --steps 3

Runs on one rank and on two alternate; each pair gives a ratio. The cores are divided among the ranks, so on CPUs two
ranks have no more computing power than one. A ratio above 1 is the cost of the second rank: matrix products with half
the rows, imbalance, and communication. On GPUs each rank has its own GPU. Without `--config` the models are those of
bench/end_to_end.py, with responses of 1 to 64 tokens.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from end_to_end import SIZES, make_inputs

HERE = Path(__file__).resolve().parent
PHASES = ("sampling", "feedback", "experience", "learning")


def small(folder: Path, dtype: str) -> list[str]:
    """Settings of a run of the small models. One token in twenty is a stop token, so that lengths differ."""
    make_inputs(folder, SIZES["small"])
    settings = {
        "actor.model": folder / "actor",
        "rewards": json.dumps([{"model": str(folder / "reward")}]),
        "data.path": folder / "prompts.jsonl",
        "data.max_prompt_tokens": 32,
        "sampling.max_new_tokens": 64,
        "sampling.stop_tokens": json.dumps([f"w{i}" for i in range(0, 4096, 20)]),
        "ppo.batch_size": 64,
        "ppo.microbatch_tokens": 2048,
        "optim.dtype": dtype,
        "eval.prompts": 0,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(settings: list[str], output: Path, ranks: int, steps: int) -> list[dict[str, float]]:
    """The metrics of each step except the first."""
    with socket.socket() as s:  # a free port: another run may use DeepSpeed's default
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", port]
    own = ["--output", str(output), "--steps", str(steps), "--checkpoint.every", "0", "--track.tensorboard", "false"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(
        [*deepspeed, "--num_accelerators", str(ranks), str(HERE.parent / "fastppo/train.py"), *settings, *own],
        check=True,
        stdout=sys.stderr,
        env=environment,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "time/step" in line][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a PPO step and of its phases on one rank and on two.")
    parser.add_argument("--config", help="a preset or a file of settings instead of the small models")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="data type of the small models")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run; the first is not counted (at least 2)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not counted")

    steps: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = ["--config", options.config, "--eval.prompts", "0"]
        settings = chosen if options.config else small(folder, options.dtype)
        for number in range(options.rounds):
            pair = {ranks: run(settings, folder / f"run-{number}-{ranks}", ranks, options.steps) for ranks in (1, 2)}
            for ranks, found in pair.items():
                steps[ranks] += found
            medians = {ranks: statistics.median(step["time/step"] for step in found) for ranks, found in pair.items()}
            ratios.append(medians[2] / medians[1])

    result: dict[str, object] = {
        "config": options.config or f"small, {options.dtype}",
        "cores": len(os.sched_getaffinity(0)),
        "ratio": round(statistics.median(ratios), 3),
    }
    print(f"{'':<10} {'step':>10} " + " ".join(f"{phase:>18}" for phase in PHASES) + f" {'imbalance':>10}")
    for ranks, found in steps.items():
        seconds = {phase: statistics.median(step[f"time/{phase}"] for step in found) for phase in ("step", *PHASES)}
        whole = sum(seconds[phase] for phase in PHASES)
        shares = {phase: seconds[phase] / whole for phase in PHASES}
        uneven = statistics.median(step["imbalance"] for step in found)
        cells = " ".join(f"{seconds[phase]:9.3f} s ({shares[phase]:4.0%})" for phase in PHASES)
        print(f"{ranks} rank{'s' if ranks > 1 else ' '}    {seconds['step']:8.3f} s {cells} {uneven:10.3f}")
        result[f"ranks_{ranks}"] = {
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
            "shares": {stage: round(value, 3) for stage, value in shares.items()},
            "imbalance": round(uneven, 4),
        }
    print(f"two ranks take {result['ratio']} times as long as one (median of {options.rounds} pairs)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
