"""The calculator of docs/examples over several seeds, with a control; and what waiting for an environment costs.

    python bench/conversations.py --seeds 1 2 3
    python bench/conversations.py --waiting

A model of 135M learns to call a calculator: right answers on held-out questions after a short SFT, after RL, and after
RL with wrong numbers in the place of the calculator's, which shows that the calls are what earns the answers. Exits
with 1 if a seed is not below 0.2, above 0.7, and below 0.2.

--waiting: 32 conversations with an environment that sleeps a second in each call, against the same conversations
without sleep. The time that this adds, over the time that the longest conversation waited for its own calls, must be at
most 1.3 (the median of the rounds): other rows are drawn while one waits.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer

from fastppo.config import GENERATE
from fastppo.config.command_line import parse
from fastppo.data import Prompts, PromptSet
from fastppo.environments import Environment, load_environment
from fastppo.models.attention import choose_attention
from fastppo.models.loading.policies import load_causal
from fastppo.models.roles import Policy
from fastppo.monitor import METRICS, read_lines
from fastppo.rollout.inprocess import sample

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
LOW, HIGH = 0.2, 0.7  # shares of right answers: at most before RL and in the control, at least after it
ROWS, SLEEP, BOUND = 32, 1.0, 1.3
DEVICE = torch.device("cpu")


def example(name: str) -> Any:
    """A file of docs/examples as a module."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None, "a file of the repository"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calculator = example("calculator")


@dataclass(frozen=True)
class HeldOut:
    """Of a model on held-out questions, one conversation to each."""

    right: float  # share of conversations
    calls: float  # share of conversations with a call
    turns: float  # mean


@dataclass(frozen=True)
class Result:
    seed: int
    before: HeldOut
    after: HeldOut
    scrambled: HeldOut
    seconds: float  # of all steps, without loading and evaluation

    @property
    def holds(self) -> bool:
        return self.before.right < LOW and self.after.right > HIGH and self.scrambled.right < LOW


def ran(module: str, *settings: object) -> None:
    command = [sys.executable, "-m", f"fastppo.{module}", *map(str, settings)]
    subprocess.run(command, stdout=sys.stderr, check=True)


def config(name: str) -> tuple[str, Path]:
    return "--config", EXAMPLES / f"{name}.yaml"


@dataclass(frozen=True)
class Runs:
    """The runs in a folder; one that is there already is not repeated."""

    folder: Path
    sft: Sequence[object]  # further settings, by kind of run
    rl: Sequence[object]
    generate: Sequence[object]

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.jsonl"

    def demonstrated(self) -> Path:
        """The model that RL starts from."""
        output = self.folder / "sft"
        if not (output / "model").exists():
            calculator.write_data(self.folder / "data")
            data = ("--data.path", self.data("demonstrations"))
            ran("train_sft", *config("calculator-sft"), *data, "--output", output, *self.sft)
        return output / "model"

    def reinforced(self, seed: int, model: Path) -> Path:
        """The folder of a run of RL."""
        output = self.folder / f"seed-{seed}"
        if not (output / "actor").exists():
            data = ("--data.path", self.data("training"), "--data.eval_path", "null", "--eval.prompts", 0)
            run = ("--actor.model", model, "--seed", seed, "--output", output)
            ran("train", *config("calculator"), *data, *run, *self.rl)
        return output

    def measured(self, model: Path, environment: str, output: Path) -> HeldOut:
        """environment: the function of docs/examples/calculator.py that answers."""
        if not (output / "responses.jsonl").exists():
            data = ("--data.path", self.data("heldout"))
            answers = ("--rollout.environment", f"{EXAMPLES}/calculator.py:{environment}")
            run = ("--model.path", model, "--output", output)
            ran("generate", *config("calculator-generate"), *data, *answers, *run, *self.generate)
        rows = read_lines(output / "responses.jsonl")
        turns = [line for row in rows for line in row["response"].splitlines() if line]  # a turn is a line
        shares = (sum(row[name] for row in rows) / len(rows) for name in ("score", "judge"))
        return HeldOut(*shares, len(turns) / len(rows))


def result(seed: int, runs: Runs) -> Result:
    model = runs.demonstrated()
    before = runs.measured(model, "calculator", runs.folder / "sft-calculator")
    output = runs.reinforced(seed, model)
    after, control = (
        runs.measured(output / "actor", name, runs.folder / f"seed-{seed}-{name}")
        for name in ("calculator", "scrambled")
    )
    seconds = sum(line["time/step"] for line in read_lines(output / METRICS) if "time/step" in line)
    return Result(seed, before, after, control, seconds)


def table(results: Sequence[Result]) -> str:
    lines = [
        "| seed | right after SFT | after RL | scrambled | call after SFT | after RL | turns | seconds of steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        shares = (r.before.right, r.after.right, r.scrambled.right, r.before.calls, r.after.calls, r.after.turns)
        lines.append(f"| {r.seed} | {' | '.join(f'{share:.2f}' for share in shares)} | {r.seconds:.0f} |")
    return "\n".join(lines)


# What waiting costs


class Sleeping:
    """The calculator, a second later; it counts how long each conversation waited."""

    def __init__(self) -> None:
        self.waited: Counter[int] = Counter()  # seconds, by the conversation's seed

    def __call__(self, conversation: list[dict[str, Any]], ended: bool, seed: int) -> str | None:
        start = time.monotonic()
        time.sleep(SLEEP)
        self.waited[seed] += time.monotonic() - start
        return calculator.calculator(conversation, ended)


def waiting(model: Path, rounds: int) -> float:
    """Prints a line a round; returns the median of what sleeping adds over the longest conversation's own waiting."""
    settings = parse(list(map(str, config("calculator-generate"))), GENERATE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    choose_attention("auto", torch.float32, DEVICE)
    policy = Policy(load_causal("model", str(model), None, None, torch.float32, DEVICE))
    questions = tuple(f"{calculator.QUESTION}{100 + 7 * i}*{900 - 11 * i}\n" for i in range(ROWS))
    tokens = tuple(tuple(tokenizer(text)["input_ids"]) for text in questions)
    prompts = Prompts.of(tokens, range(ROWS), data=PromptSet(tokens, questions, {}))
    stop_ids = [tokenizer("\n")["input_ids"][0], tokenizer.eos_token_id]
    awake = load_environment(settings, tokenizer)
    assert awake is not None, "the example has an environment"

    def seconds(environment: Environment) -> float:
        start = time.perf_counter()
        sample(policy, prompts, settings.sampling, stop_ids=stop_ids, seed=1, environment=environment)
        return time.perf_counter() - start

    seconds(awake)  # not counted
    ratios = []
    print("| without sleep, s | with, s | longest conversation waited, s | ratio |\n|---|---|---|---|")
    for _ in range(rounds):
        without, sleeping = seconds(awake), Sleeping()
        asleep, longest = seconds(replace(awake, called=sleeping)), max(sleeping.waited.values())
        ratios.append((asleep - without) / longest)
        print(f"| {without:.2f} | {asleep:.2f} | {longest:.2f} | {ratios[-1]:.2f} |", flush=True)
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/conversations"))
    parser.add_argument("--threads", type=int, help="of each run; default: all cores")
    parser.add_argument("--waiting", action="store_true", help="only measure what waiting costs")
    parser.add_argument("--model", type=Path, help="for --waiting; default: that of the first seed")
    parser.add_argument("--rounds", type=int, default=5, help="of --waiting")
    parser.add_argument("--short", action="store_true", help="few steps, to see that it runs; its figures say nothing")
    options, further = parser.parse_known_args()
    if options.waiting:
        model = options.model or options.output / f"seed-{options.seeds[0]}" / "actor"
        ratio = waiting(model, 1 if options.short else options.rounds)
        print(f"median {ratio:.2f}, at most {BOUND} wanted")
        sys.exit(0 if options.short or ratio <= BOUND else 1)
    every = [] if options.threads is None else ["--threads", options.threads]
    steps, prompts = (["--steps", 2], ["--data.limit", 8]) if options.short else ([], [])
    runs = Runs(
        options.output,
        sft=[*steps, *every],
        rl=[*further, *steps, *every],
        generate=[*prompts, *every],
    )
    results = []
    for seed in options.seeds:
        results.append(result(seed, runs))
        print(json.dumps(asdict(results[-1])), file=sys.stderr, flush=True)
    print(table(results))
    sys.exit(0 if options.short or all(each.holds for each in results) else 1)


if __name__ == "__main__":
    main()
