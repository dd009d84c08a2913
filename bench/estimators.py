"""Every estimator of advantages on two tasks, with as many generated tokens: the quickstart's, and arithmetic. Hours.

    python bench/estimators.py --task quickstart --seeds 1 2 3
    python bench/estimators.py --task arithmetic --seeds 1 2 3 --estimators gae rloo
    python bench/estimators.py --task quickstart --table runs/estimators

The quickstart's PPO, after `make demo`: film reviews, scored by a reward model of which nothing is known to be right;
estimators of groups draw four responses to each of 8 prompts instead of one to each of 32. `bench/arithmetic.py` has
the other task, whose answers are right or wrong. Of each run: score, judge or accuracy, and KL on held-out prompts, the
seconds of all steps without loading and evaluation, and the most memory that a process of it held.

--table prints the table of the runs in a folder once more. --short runs few steps of few responses, to see that it
runs; its figures say nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from arithmetic import measure, rl, sft, write_data

from fastppo.config.learning import ESTIMATOR_RULES
from fastppo.monitor import METRICS, read_lines

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """A run: what it measured on held-out prompts, and what it took."""

    estimator: str
    seed: int
    figures: dict[str, float]
    seconds: float
    gigabytes: float


def ran(script: str, *settings: object) -> float:
    """Run a command of fastppo; the most memory of a process of it, in GB, as the kernel counts it."""
    command = ["deepspeed", f"fastppo/{script}.py", *map(str, settings)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return usage.ru_maxrss * 1024 / 1e9


def seconds_of(output: Path) -> float:
    return sum(line["time/step"] for line in read_lines(output / METRICS) if "time/step" in line)


def evaluations(output: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(output / METRICS) if "eval/score" in line]


def settings_of(estimator: str, *, samples: int) -> list[object]:
    """Of an estimator; those of groups draw `samples` responses to a prompt."""
    rule = ESTIMATOR_RULES[estimator]
    settings: list[object] = ["--ppo.estimator", estimator]
    settings += [] if rule.critic else ["--critic.kind", "none"]
    return settings + (["--sampling.samples_per_prompt", samples] if rule.group else [])


@dataclass(frozen=True)
class Further:
    """Settings that were given beside a task's own, by kind of run."""

    sft: Sequence[object] = ()
    rl: Sequence[object] = ()
    generate: Sequence[object] = ()


def quickstart(estimator: str, seed: int, output: Path, further: Further) -> Result:
    run = ("--config", "quickstart", "--seed", seed, "--output", output)
    memory = ran("train", *run, *settings_of(estimator, samples=4), *further.rl)
    before, *_, after = evaluations(output)
    names = ("score", "judge", "kl", "distinct_2")
    figures = {f"{name} before": before[f"eval/{name}"] for name in ("score", "judge")}
    figures |= {name: after[f"eval/{name}"] for name in names}
    return Result(estimator, seed, figures, seconds_of(output), memory)


def arithmetic(estimator: str, seed: int, output: Path, further: Further) -> Result:
    """`bench/arithmetic.py`; eight responses to a prompt for every estimator."""
    data = write_data(output.parent)
    model = sft(output.parent, data, *further.sft)
    settings = (*rl(seed, model, data, output), *settings_of(estimator, samples=8), *further.rl)
    before = measure(model, data, output.parent / "sft-measured", *further.generate)
    memory = ran("train", *settings)
    after = measure(output / "actor", data, output / "measured", *further.generate)
    figures = {"format before": before.format, "format": after.format, "right before": before.right}
    figures |= {"right": after.right, "right greedily": after.greedy, "kl": evaluations(output)[-1]["eval/kl"]}
    return Result(estimator, seed, figures, seconds_of(output), memory)


TASKS: dict[str, Callable[[str, int, Path, Further], Result]] = {
    "quickstart": quickstart,
    "arithmetic": arithmetic,
}


def table(results: Iterable[Result]) -> str:
    """Means over the seeds, with the lowest and the highest in brackets where there are several; of the seconds the
    median, and of the memory the most."""
    by_name: dict[str, list[Result]] = {name: [] for name in ESTIMATOR_RULES}
    for result in results:
        by_name[result.estimator].append(result)
    by_name = {name: runs for name, runs in by_name.items() if runs}
    names = list(next(iter(by_name.values()))[0].figures)
    lines = [["", *names, "seconds", "GB"], ["---"] * (len(names) + 3)]
    for estimator, runs in by_name.items():
        cells = [_spread([run.figures[name] for run in runs]) for name in names]
        seconds = f"{median(run.seconds for run in runs):.0f}"
        lines.append([f"`{estimator}`", *cells, seconds, f"{max(run.gigabytes for run in runs):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    between = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{between}"


def read_results(folder: Path) -> list[Result]:
    return [Result(**line) for line in read_lines(folder / RESULTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATOR_RULES), choices=list(ESTIMATOR_RULES))
    parser.add_argument("--output", type=Path, help="default: runs/estimators/TASK")
    parser.add_argument("--table", type=Path, help="print the table of the runs in this folder")
    parser.add_argument("--short", action="store_true")
    options, settings = parser.parse_known_args()
    if options.table is not None:
        print(table(read_results(options.table)))
        return
    folder = options.output or Path("runs/estimators") / options.task
    folder.mkdir(parents=True, exist_ok=True)
    few = ["--steps", 2, "--optim.warmup_steps", 0]
    further = (
        Further(few, [*settings, *few, "--eval.prompts", 8, "--ppo.batch_size", 16], ["--data.limit", 8])
        if options.short
        else Further(rl=settings)
    )
    done = (
        {(result.estimator, result.seed) for result in read_results(folder)} if (folder / RESULTS).exists() else set()
    )
    for seed in options.seeds:
        for estimator in options.estimators:
            if (estimator, seed) in done:  # of an earlier call
                continue
            result = TASKS[options.task](estimator, seed, folder / f"{estimator}-{seed}", further)
            with (folder / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    print(table(read_results(folder)))


if __name__ == "__main__":
    main()
