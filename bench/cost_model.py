"""The cost model against measured steps: constants are measured, a step is predicted, and steps are run, case by case.

    nice python bench/cost_model.py [--rounds 3] [--steps 4] [CASE...]

Each rank has one thread. In a round constants are measured and steps run directly after each other. The first step of
a run is not counted. A step is a sample of wall time only if its process had its core for at least 90% of it; on a
machine with other work the seconds of the process itself (`os.times`) are shown beside, which other processes do not
change. A case is predicted from each round's own constants, and medians are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PHASES = ("sampling", "feedback", "experience", "learning")
QUIET = 0.9  # the share of its core that a process must have had


class Case(NamedTuple):
    """A run that is predicted and measured."""

    dtype: str
    ranks: int
    model: dict[str, Any]  # what differs from the common shape; empty: SmolLM2, as the quickstart has it
    prompts: int  # of a step
    prompt: int  # tokens
    response: int
    settings: dict[str, Any]


LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
WIDE = LLAMA | {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
GROUPS = {"ppo.estimator": "grpo", "sampling.samples_per_prompt": 4}
CASES = {
    "fp32": Case("fp32", 1, LLAMA, 16, 32, 64, {"ppo.epochs": 2}),
    "two ranks, ZeRO-3": Case("bf16", 2, WIDE, 16, 64, 64, {"zero.stage": 3, "ppo.epochs": 2}),
    "SmolLM2, 8 of 30 layers": Case("bf16", 1, {}, 8, 20, 20, {"actor.train": 8, "critic.kind": "shared"}),
    "long, GQA": Case("bf16", 1, LLAMA | {"num_key_value_heads": 2}, 4, 32, 480, {"critic.kind": "shared"}),
    "LoRA, separate critic": Case("bf16", 1, LLAMA, 16, 32, 64, {"actor.lora.rank": 16, "ppo.epochs": 2}),
    "no critic, groups": Case("bf16", 1, LLAMA, 16, 48, 48, GROUPS),
}
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
VOCABULARY = 4_096


def make_inputs(folder: Path, case: Case) -> list[str]:
    """Random models and prompts in files; returns the settings of the run."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "num_key_value_heads": case.model.get("num_attention_heads")} | (
        case.model or SMOLLM2
    )
    config = LlamaConfig(
        **shape, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1, max_position_embeddings=2048
    )
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocab_size"])}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for name, kind in (("actor", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        kind.from_config(config).to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokens = torch.randint(shape["vocab_size"], (case.prompts * 4, case.prompt)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{t}" for t in row)}) for row in tokens]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    settings = {
        "actor.model": folder / "actor", "rewards": json.dumps([{"model": str(folder / "reward")}]),
        "data.path": folder / "prompts.jsonl", "data.max_prompt_tokens": case.prompt,
        "sampling.max_new_tokens": case.response, "sampling.ignore_eos": "true", "ppo.batch_size": case.prompts,
        "ppo.microbatch_tokens": 2048, "optim.dtype": case.dtype, "threads": 1,
    } | case.settings  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


# The process that is measured


@contextmanager
def recorded(into: list[dict[str, float]]) -> Any:
    """Within this context, the phases of a run are recorded: seconds that passed, and seconds of the process."""
    from fastppo import train
    from fastppo.monitor import tracker

    spent: dict[str, float] = {}
    begun = [time.perf_counter(), sum(os.times()[:4])]
    timed, log_step = tracker.Phases.__call__, train.log_step

    @contextmanager
    def timing(self: Any, name: str) -> Any:
        start = sum(os.times()[:4])
        with timed(self, name):
            yield
        spent[f"cpu/{name}"] = spent.get(f"cpu/{name}", 0.0) + sum(os.times()[:4]) - start

    def logging(setup: Any, done: Any, given: Any) -> None:
        seconds = {f"wall/{name}": value for name, value in setup.phases._seconds.items()}
        log_step(setup, done, given)
        now = [time.perf_counter(), sum(os.times()[:4])]
        wall, cpu = (b - a for a, b in zip(begun, now, strict=True))
        begun[:] = now
        into.append(seconds | spent | {"wall": wall, "cpu": cpu})
        spent.clear()

    tracker.Phases.__call__, train.log_step = timing, logging  # type: ignore[method-assign]
    try:
        yield
    finally:
        tracker.Phases.__call__, train.log_step = timed, log_step  # type: ignore[method-assign]


def run_steps(out: Path, argv: Sequence[str]) -> None:
    """Train in this process, and write what each step took."""
    from fastppo import rank, train

    steps: list[dict[str, float]] = []

    def recorded_train(config: Any, world: Any) -> bool:
        with recorded(steps):
            done = train.train(config, world)
        out.with_suffix(f".{world.rank}").write_text(json.dumps(steps))
        return done

    rank.run_rank(train.PPO, recorded_train, list(argv))


# The process that compares


def launch(script: list[str], ranks: int, port: int) -> None:
    own = ["deepspeed", "--master_port", str(port), "--num_accelerators", str(ranks)]
    start = [sys.executable, *script]
    if ranks > 1:
        start = [str(Path(sys.executable).with_name(own[0])), *own[1:]]
        start += ["--module", *script[1:]] if script[0] == "-m" else script
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    done = subprocess.run(
        start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(start)}\n{done.stdout[-4000:]}")


def predicted(constants: Path, case: Case, settings: list[str]) -> dict[str, float]:
    from fastppo.config import PPO, parse
    from fastppo.planner import this_machine
    from fastppo.planner.constants.values import read_constants
    from fastppo.planner.plan import make_plan
    from fastppo.planner.time.predict import lengths_of, predict

    config = parse(settings, PPO, ranks=case.ranks)
    plan = make_plan(config, this_machine(case.ranks, 1, cpu=True))
    step = predict(plan, read_constants(constants), lengths_of(config))
    return {phase.name: phase.seconds.total for phase in step.phases} | {"step": step.seconds}


def one_round(folder: Path, case: Case, settings: list[str], steps: int, port: int) -> dict[str, Any]:
    constants, out = folder / "constants.yaml", folder / "steps.json"
    launch(["-m", "fastppo.plan", "--measure", str(constants), *settings], case.ranks, port)
    own = ["--output", str(folder / "run"), "--steps", str(steps), "--eval.prompts", "0", "--checkpoint.every", "0"]
    own += ["--track.tensorboard", "false"]
    launch([str(HERE / "cost_model.py"), "--child", str(out), *settings, *own], case.ranks, port)
    ranks = [json.loads(out.with_suffix(f".{rank}").read_text())[1:] for rank in range(case.ranks)]
    return {"predicted": predicted(constants, case, settings), "ranks": ranks}


def compared(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; of steps in wall time only those of which every rank had its core."""
    found: dict[str, Any] = {name: {} for name in ("predicted", "cpu", "wall")}
    names = (*PHASES, "step")
    for name in names:
        found["predicted"][name] = statistics.median(one["predicted"][name] for one in rounds)
    steps = [step for one in rounds for step in zip(*one["ranks"], strict=True)]
    quiet = [step for step in steps if all(rank["cpu"] >= QUIET * rank["wall"] for rank in step)]
    for kind, used in (("cpu", steps), ("wall", quiet)):
        for name in names:
            key = kind if name == "step" else f"{kind}/{name}"
            values = [max(rank.get(key, 0.0) for rank in step) for step in used]
            found[kind][name] = statistics.median(values) if values else None
    found["steps"], found["quiet"] = len(steps), len(quiet)
    found["had"] = statistics.median(rank["cpu"] / rank["wall"] for step in steps for rank in step)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['steps']} steps, {found['quiet']} of them undisturbed; median share {found['had']:.0%}")
    for kind in ("predicted", "cpu", "wall"):
        cells = [f"{value:8.3f}" if value is not None else "       -" for value in found[kind].values()]
        print(f"  {kind:10} " + " ".join(cells))
    for kind in ("cpu", "wall"):
        if found[kind]["step"]:
            print(f"  predicted / {kind}: {found['predicted']['step'] / found[kind]['step']:.3f}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"] or any(x == "--child" for x in sys.argv):
        argv = [x for x in sys.argv[1:] if not x.startswith("--local_rank")]
        run_steps(Path(argv[1]), argv[2:])
        return
    parser = argparse.ArgumentParser(description="The cost model against measured steps.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument("--port", type=int, default=29750)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            settings = make_inputs(folder, CASES[name])
            rounds = [
                one_round(folder, CASES[name], settings, options.steps, options.port) for _ in range(options.rounds)
            ]
        result[name] = compared(rounds)
        show(name, result[name])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
