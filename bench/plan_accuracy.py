"""Compare the memory plan with the memory that runs use: `python bench/plan_accuracy.py`.

The runs of PPO, SFT and reward modelling differ in what fills the memory. Each is a separate process that trains for
two steps on the CPU. Its peak is VmHWM of the kernel above its value after the imports. The last line is JSON.

Large blocks are returned to the kernel when they are freed (MALLOC_MMAP_THRESHOLD_), so that the peak is what the run
holds, without blocks that glibc keeps for later.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# name -> (family, shape of the model, settings of the run)
CASES: dict[str, tuple[str, dict[str, int], dict[str, object]]] = {
    "fp32, separate critic, optimizer states": (
        "llama",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192},
        {"optim.dtype": "fp32", "zero.stage": 1, "ppo.microbatch_tokens": 512, "data.max_prompt_tokens": 96},
    ),
    "fp32, no critic": (
        "llama",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192},
        {
            "optim.dtype": "fp32",
            "zero.stage": 1,
            "ppo.microbatch_tokens": 512,
            "data.max_prompt_tokens": 96,
            "ppo.estimator": "reinforce++",
        },
    ),
    "bf16, shared critic, large vocabulary": (
        "qwen2",
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 65536},
        {
            "critic.kind": "shared",
            "zero.stage": 2,
            "ppo.microbatch_tokens": 1024,
            "data.max_prompt_tokens": 96,
            "sampling.max_new_tokens": 64,
        },
    ),
    "bf16, long sequences, activations": (
        "gpt2",
        {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 1024, "num_attention_heads": 8, "n_positions": 1024},
        {"critic.kind": "shared", "data.first_tokens": 448, "ppo.microbatch_tokens": 8192},
    ),
}

# The same of `train_reward` and `train_sft`.
OFFLINE_CASES: dict[str, tuple[str, dict[str, int], dict[str, object]]] = {
    "reward model in bf16": (
        "llama",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192},
        {"microbatch_tokens": 2048},
    ),
    "SFT in fp32, large vocabulary": (
        "qwen2",
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 65536},
        {"microbatch_tokens": 1024, "optim.dtype": "fp32"},
    ),
}


def settings(folder: Path, name: str) -> list[str]:
    """A model with random weights, prompts of equal length, and the command line of a run."""
    import tiny

    family, shape, changes = (CASES | OFFLINE_CASES)[name]
    heads = {} if family == "gpt2" else {"num_attention_heads": 8, "num_key_value_heads": 4}
    tiny.saved(folder / "model", tiny.causal(family, **{"max_position_embeddings": 1024} | heads | shape))
    lines = [json.dumps({"prompt": "what is planned " * 40 + str(i)}) for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(
        "def length(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
    )
    if name in OFFLINE_CASES:
        return [part for key, value in (_offline(folder) | changes).items() for part in (f"--{key}", str(value))]
    fixed = {
        "output": folder / "run",
        "steps": 2,
        "threads": 1,
        "actor.model": folder / "model",
        "rewards": json.dumps([{"function": f"{folder}/reward.py:length"}]),
        "data.path": folder / "prompts.jsonl",
        "data.first_tokens": 96,
        "data.max_prompt_tokens": 448,
        "sampling.max_new_tokens": 32,
        "sampling.ignore_eos": "true",
        "ppo.batch_size": 16,
        "ppo.epochs": 1,
        "eval.prompts": 0,
        "checkpoint.every": 0,
        "track.tensorboard": "false",
        "plan": "off",
    }
    return [part for key, value in (fixed | changes).items() for part in (f"--{key}", str(value))]


def _offline(folder: Path) -> dict[str, object]:
    """Settings of an SFT or reward-model run, and its data: all texts are cut to the maximum length."""
    rows = [{"prompt": f"{i} ", "chosen": "yes" * 99, "rejected": "not" * 99} for i in range(32)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": folder / "run",
        "steps": 2,
        "threads": 1,
        "model.path": folder / "model",
        "data.path": folder / "pairs.jsonl",
        "data.max_tokens": 128,
        "data.too_long": "cut",
        "batch_size": 16,
        "eval.examples": 8,
        "checkpoint.every": 0,
        "track.tensorboard": "false",
        "plan": "off",
    }


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def warm_up(config: Any) -> None:
    """One update of one layer: what libraries load at first use is not part of the plan, so do not measure it."""
    import torch

    from fastppo.distributed.engine import Engine
    from fastppo.models.loading.weights import DTYPES

    layer = torch.nn.Linear(8, 8, dtype=DTYPES[config.optim.dtype])
    engine = Engine(layer, [list(layer.parameters())], config.optim, config.zero)
    engine.backward(engine(torch.ones(1, 8, dtype=DTYPES[config.optim.dtype])).float().sum(), last=True)
    engine.step([0.0])


def measure(argv: list[str], name: str) -> None:
    """In a new process: the plan of a run, then the run itself."""
    from fastppo import train, train_reward, train_sft
    from fastppo.config.command_line import PPO, REWARD, SFT, Command, parse
    from fastppo.distributed.world import start_world, stop_world
    from fastppo.planner.machine import this_machine
    from fastppo.planner.plan import make_plan

    command: Command[Any] = PPO if name in CASES else REWARD if name.startswith("reward") else SFT
    module: Any = {PPO: train, REWARD: train_reward, SFT: train_sft}[command]
    if command is SFT:
        argv = [*argv, "--data.response", "chosen"]
    config = parse(argv, command)
    plan = make_plan(config, this_machine(1, 1, cpu=True))
    world = start_world(config.threads)
    warm_up(config)
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM to the current memory
    before = memory("VmRSS")
    module.train(config, world)
    peak = memory("VmHWM") - before
    stop_world()
    phase, places = plan.peak
    print(
        json.dumps(
            {
                "planned": places.gpu.total + places.host.total,
                "measured": peak,
                "phase": phase,
                "states": places.gpu.states,
            }
        )
    )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[3:], sys.argv[2])
        return
    results = {}
    wanted = sys.argv[1:]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if "MALLOC" not in environment:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in (*CASES, *OFFLINE_CASES):
        if wanted and not any(w in name for w in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", name, *settings(Path(folder), name)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            found = results[name] = json.loads(done.stdout.splitlines()[-1])
        found["off"] = found["planned"] / found["measured"] - 1
        planned, measured, phase = found["planned"] / 1e9, found["measured"] / 1e9, found["phase"]
        print(f"{name}: planned {planned:.3f} GB, measured {measured:.3f} GB, {found['off']:+.1%}, most in {phase}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
