"""PPO and the methods beside it on the quickstart's models, prompts and reward model, after `make demo`. 40 minutes.

    python bench/methods.py --seeds 1 2 3 --html runs/methods/methods.html
    python bench/methods.py --short

All start from the SFT model and draw as many responses in training: PPO in 36 steps; ReST in 4 Grows; rejection
sampling in one, with eight responses to a prompt of which the best is learned; DPO in one, with four, paired by their
score. Best-of-n learns nothing and draws 64 responses to each held-out prompt. On the same held-out prompts, at
temperature 1: the proxy (the reward model's score), the judge (VADER), the KL to the SFT model in nats a response, and
distinct-2. Seconds are those of training without loading and evaluation, on this machine; of best-of-n, of a response.
The KL of best-of-n is its upper bound.

--short draws and learns little, to see that it runs; its figures say nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fastppo.config import PPO, SamplingConfig
from fastppo.config.command_line import parse
from fastppo.data import ScoredResponses, load_prompts, read_scored
from fastppo.models import actor_context, load_actor_tokenizer
from fastppo.monitor import METRICS, distinct, ngrams, read_lines
from fastppo.report import Outcome, methods_page
from fastppo.rewards import BestOfN, estimate, kl_bound

SFT, REWARD = Path("runs/quickstart-sft/model"), Path("runs/quickstart-reward/reward_model")
TOKENS = 20  # of a response
SHOWN = (4, 16, 64)  # n of best-of-n in the table


@dataclass(frozen=True)
class Size:
    """How much is drawn and learned."""

    steps: int  # of PPO, 32 responses each; the other methods draw as many in all
    heldout: int  # prompts
    best_of: int  # responses to each of these

    @property
    def responses(self) -> int:
        return 32 * self.steps


FULL, SHORT = Size(steps=36, heldout=64, best_of=64), Size(steps=3, heldout=8, best_of=4)


@dataclass(frozen=True)
class Measured:
    """A row of the table."""

    method: str
    seed: int
    score: float
    judge: float
    kl: float
    distinct_2: float
    generated: int  # tokens, in training; of best-of-n, for one response
    trained: int  # tokens of responses, each pass counted
    seconds: float


def ran(script: str, *settings: object) -> None:
    command = ["deepspeed", f"fastppo/{script}.py", *map(str, settings)]
    subprocess.run(command, stdout=sys.stderr, check=True)


def seconds_of(output: Path) -> float:
    """Of all steps of a run, without loading and evaluation."""
    names = ("time/step", "time/learning", "time/sampling", "time/feedback")
    lines = read_lines(output / METRICS)
    return sum(
        line["time/step"] if "time/step" in line else sum(line.get(name, 0.0) for name in names) for line in lines
    )


def evaluated(output: Path) -> dict[str, Any]:
    return [line for line in read_lines(output / METRICS) if "eval/score" in line][-1]


def row(method: str, seed: int, output: Path, *, generated: int, trained: int, seconds: float) -> Measured:
    found = evaluated(output)
    figures = (found[f"eval/{name}"] for name in ("score", "judge", "kl", "distinct_2"))
    return Measured(method, seed, *figures, generated, trained, seconds)


def ppo(seed: int, size: Size, folder: Path) -> Measured:
    output = folder / "ppo"
    ran("train", "--config", "quickstart", *run_of(seed, output), "--steps", size.steps, "--eval.prompts", size.heldout)
    tokens = TOKENS * size.responses
    return row("PPO", seed, output, generated=tokens, trained=2 * tokens, seconds=seconds_of(output))


def rest(seed: int, size: Size, folder: Path) -> Measured:
    prompts = size.responses // 32  # 4 Grows with 8 responses to each prompt
    return _rest("ReST", seed, size, folder / "rest", "--steps", 4, "--grow.prompts", prompts)


def rejection_sampling(seed: int, size: Size, folder: Path) -> Measured:
    best = ("--improve.keep", "best", "--improve.thresholds", "null")
    one = ("--steps", 1, "--grow.prompts", size.responses // 8, "--improve.epochs", 2)
    return _rest("rejection sampling", seed, size, folder / "rejection-sampling", *one, *best)


def _rest(method: str, seed: int, size: Size, output: Path, *settings: object) -> Measured:
    prompts = ("--eval.prompts", size.heldout)
    ran("train_rest", "--config", "quickstart-rest", *run_of(seed, output), *settings, *prompts)
    steps = [line for line in read_lines(output / METRICS) if "tokens_trained" in line]
    generated, trained = (int(sum(line[f"tokens_{what}"] for line in steps)) for what in ("generated", "trained"))
    return row(method, seed, output, generated=generated, trained=trained, seconds=seconds_of(output))


def dpo(seed: int, size: Size, folder: Path) -> Measured:
    """On pairs of the SFT model's own responses."""
    drawn, output, judged = folder / "dpo-responses", folder / "dpo", folder / "dpo-evaluated"
    prompts = write_prompts(folder / "training.jsonl", size, size.responses // 4, seed, heldout=False)
    generate(drawn, prompts, seed, samples=4)
    ran(
        *("train_dpo", "--config", "quickstart-dpo", *run_of(seed, output), "--data.path", drawn / "responses.jsonl"),
        *("--data.prompt", "prompt", "--data.answer", "response", "--data.rating", "score", "--data.limit", "null"),
        *("--data.last_tokens", "null", "--data.max_tokens", 48, "--eval.examples", size.responses // 18),
    )
    ran(
        *("train", "--config", "quickstart", *run_of(seed, judged), "--steps", 0, "--optim.warmup_steps", 0),
        *("--actor.model", output / "model", "--reference.model", SFT, "--eval.prompts", size.heldout),
    )
    updates = sum("grad_norm" in line for line in read_lines(output / METRICS))
    trained = updates * 32 * 2 * TOKENS
    seconds = seconds_of(drawn) + seconds_of(output)
    return row("DPO", seed, judged, generated=TOKENS * size.responses, trained=trained, seconds=seconds)


def best_of_n(seed: int, size: Size, folder: Path) -> ScoredResponses:
    output = folder / "best-of-n"
    prompts = write_prompts(folder / "heldout.jsonl", size, size.heldout, seed, heldout=True)
    generate(output, prompts, seed, samples=size.best_of)
    return read_scored(output / "responses.jsonl", leave_out=())


def run_of(seed: int, output: Path) -> list[object]:
    return ["--seed", seed, "--output", output, "--eval.every", 0, "--checkpoint.every", 0, "--resume", "null"]


def generate(output: Path, prompts: Path, seed: int, samples: int) -> None:
    ran(
        *("generate", "--config", "quickstart-generate", "--data.path", prompts, "--data.column", "prompt"),
        *("--data.first_tokens", "null", "--data.limit", "null", "--sampling.samples_per_prompt", samples),
        *("--seed", seed, "--output", output, "--batch_size", 256),
    )


def write_prompts(path: Path, size: Size, count: int, seed: int, *, heldout: bool) -> Path:
    """The quickstart's prompts: those that are held out, or others of the data."""
    config = parse(["--config", "quickstart", "--eval.prompts", str(size.heldout)], PPO)
    tokenizer = load_actor_tokenizer(config)
    data, held = load_prompts(
        config.data,
        tokenizer,
        prompts_heldout=size.heldout,
        context=actor_context(config),
        reserve=SamplingConfig().max_new_tokens,
    )
    texts = held.texts if heldout else [data.texts[(seed - 1) * count + i] for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[:count]), encoding="utf-8")
    return path


def best_rows(seed: int, scored: ScoredResponses, seconds: float) -> list[Measured]:
    """seconds: of all responses."""
    found, tokens = estimate(scored.scores, scored.judges, resamples=100, seed=0), scored.table.columns["tokens"]
    assert found.judge is not None
    rows = []
    for n in (n for n in SHOWN if n <= found.n_max):
        chosen = [max(group[:n], key=lambda i: scored.table.columns["score"][i]) for group in scored.prompts]
        flat = np.array([token for i in chosen for token in tokens[i]])
        pairs = distinct(ngrams(flat, np.array([len(tokens[i]) for i in chosen]), 2)[1])
        each = seconds * n / sum(map(len, scored.prompts))
        figures = (float(found.score.mean[n - 1]), float(found.judge.mean[n - 1]), kl_bound(n), pairs)
        rows.append(Measured(f"best of {n}", seed, *figures, generated=n * TOKENS, trained=0, seconds=each))
    return rows


def start_row(seed: int, output: Path) -> Measured:
    """The SFT model, by the evaluation before PPO's training."""
    found = next(line for line in read_lines(output / METRICS) if "eval/score" in line)
    figures = (found[f"eval/{name}"] for name in ("score", "judge", "kl", "distinct_2"))
    return Measured("start", seed, *figures, generated=0, trained=0, seconds=0.0)


def joined(parts: Sequence[ScoredResponses]) -> BestOfN:
    """Of all seeds: the same prompts with other responses."""
    scores = [group for part in parts for group in part.scores]
    judges = [group for part in parts for group in part.judges or ()]
    return estimate(scores, judges, resamples=2000, seed=0)


METHODS: dict[str, Callable[[int, Size, Path], Measured]] = {
    "PPO": ppo,
    "ReST": rest,
    "rejection sampling": rejection_sampling,
    "DPO": dpo,
}


def table(rows: Sequence[Measured]) -> str:
    """Means over seeds, with the lowest and the highest in brackets where there are several."""
    lines = [
        "| | proxy | judge | KL | distinct-2 | tokens generated | tokens trained | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        cells = [
            method,
            *(_spread([getattr(row, name) for row in mine]) for name in ("score", "judge", "kl", "distinct_2")),
        ]
        cells += [f"{fmean(getattr(row, name) for row in mine):,.0f}" for name in ("generated", "trained")]
        seconds = fmean(row.seconds for row in mine)
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"]) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO and the methods beside it on the quickstart.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--short", action="store_true", help="little of everything, one seed")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--html", type=Path, help="a page with the chart")
    options = parser.parse_args()
    if missing := [str(path) for path in (SFT, REWARD) if not path.exists()]:
        sys.exit(f"There is no {' and no '.join(missing)}; `make demo` makes them.")
    size, seeds = (SHORT, options.seeds[:1]) if options.short else (FULL, options.seeds)
    rows, drawn = [], []
    for seed in seeds:
        folder = options.output / str(seed)
        drawn.append(best_of_n(seed, size, folder))
        rows += best_rows(seed, drawn[-1], seconds_of(folder / "best-of-n"))
        rows += [METHODS[name](seed, size, folder) for name in options.methods]
        if "PPO" in options.methods:
            rows.append(start_row(seed, folder / "ppo"))
    print(table(rows))
    (options.output / "methods.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.html:
        outcomes = [Outcome(r.method, r.kl, r.score, r.judge) for r in rows if r.method in METHODS]
        state = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {size.responses:,} responses drawn in training"
        page = methods_page(outcomes, joined(drawn), "PPO and the methods beside it", state, [])
        options.html.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
