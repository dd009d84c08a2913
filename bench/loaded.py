"""Time of a PPO step with and without other work on the same cores.

    python bench/loaded.py
    python bench/loaded.py --rounds 5 --steps 8 --before

Each round runs the quickstart's PPO (after its SFT and reward model, as by `make demo`) on a quiet machine, then beside
one busy process, then beside two, and once more quiet with the spinning of OpenMP's threads as the library has it by
itself; so ratios are within a round. With --before that last setting is run beside busy processes too, which takes
minutes a step. On two cores a step beside one busy process should take at most 2.5 times its quiet time and beside two
at most 4, and bounding the spinning should cost a quiet step at most 5%. Exits with 1 where it does not hold.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ranks import run

LIBRARY = "300000"  # turns that GNU OpenMP's threads spin where nothing says otherwise
MOST = {"beside 1": 2.5, "beside 2": 4.0, "quiet over the library's own": 1.05}


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside the context run so many processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def step_seconds(config: str, steps: int, output: Path, spins: str | None) -> float:
    """The median step of a run; spins: None for fastppo's own bound."""
    before = os.environ.pop("GOMP_SPINCOUNT", None)
    if spins is not None:
        os.environ["GOMP_SPINCOUNT"] = spins
    try:
        found = run(["--config", config, "--eval.prompts", "0"], output, ranks=1, steps=steps)
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
        if before is not None:
            os.environ["GOMP_SPINCOUNT"] = before
    return statistics.median(step["time/step"] for step in found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a PPO step on a quiet machine and on a busy one.")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run; the first is not counted (at least 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spins", help="a bound to try in the place of fastppo's own")
    parser.add_argument("--before", action="store_true", help="run the library's own setting beside busy processes too")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not counted")

    cases = [("quiet", 0, options.spins), ("beside 1", 1, options.spins), ("beside 2", 2, options.spins)]
    cases += [
        (f"library's own, {name}", processes, LIBRARY) for name, processes, _ in cases[: 3 if options.before else 1]
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for i, (name, processes, spins) in enumerate(cases):
                with busy(processes):
                    output = Path(folder) / f"run-{number}-{i}"
                    seconds[name].append(step_seconds(options.config, options.steps, output, spins))
    ratios = {name: _ratio(seconds[name], seconds["quiet"]) for name in ("beside 1", "beside 2")}
    ratios["quiet over the library's own"] = _ratio(seconds["quiet"], seconds["library's own, quiet"])
    for name, values in seconds.items():
        print(f"{name:<30} {statistics.median(values):8.2f} s  ({min(values):.2f} to {max(values):.2f})")
    for name, ratio in ratios.items():
        print(f"{name:<30} {ratio:8.2f} times, at most {MOST[name]:g}")
    print(json.dumps({"config": options.config, "cores": len(os.sched_getaffinity(0)), **seconds, "ratios": ratios}))
    sys.exit(any(ratio > MOST[name] for name, ratio in ratios.items()))


def _ratio(values: list[float], over: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(values, over, strict=True))


if __name__ == "__main__":
    main()
