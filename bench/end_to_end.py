"""Time whole PPO steps of fastppo and each phase, and compare with TRL's PPOTrainer.

    python bench/end_to_end.py --dtype bf16 --steps 5
    python bench/end_to_end.py --dtype bf16 --steps 5 --trl OTHER_ENVIRONMENT/bin/python

A step: 64 prompts of 32 random tokens, 64 new tokens each with no stop token, 4 epochs of one minibatch. Policy,
reference, critic and reward model are random 4-layer Llamas (hidden 256, intermediate 512, 4 heads, vocabulary 4,096).
With `--size 1b`, for a GPU, they have the shape of Llama-3.2-1B, and a step has 128 prompts of 128 tokens and 256 new
tokens each, 1 epoch. With `--size tiny` a step takes milliseconds.
`--trl` takes a Python interpreter with trl==0.29.1. Runs of fastppo and TRL then alternate; each pair gives a ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Size(NamedTuple):
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    epochs: int
    microbatch_tokens: int


SIZES = {
    "tiny": Size(512, 32, 64, 2, 4, 2, 8, 8, 8, 2, 64),
    "small": Size(4_096, 256, 512, 4, 4, 4, 64, 32, 64, 4, 8_192),
    "1b": Size(128_256, 2048, 8192, 16, 32, 8, 128, 128, 256, 1, 8_192),
}


def llama(size: Size) -> Any:
    """The config of the models, transformers' LlamaConfig."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1, dtype="bfloat16",
    )  # fmt: skip


def make_inputs(folder: Path, size: Size) -> None:
    """Write random models and prompts to files, so that the benchmark runs the same command as a user."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    shape = llama(size)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, unk_token="w0"))
    from tokenizers.pre_tokenizers import Whitespace

    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for name, kind in (("actor", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind.from_config(shape)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        del model
    torch.cuda.empty_cache()  # free it: the run is another process and needs the memory
    tokens = torch.randint(size.vocabulary, (size.prompts * 4, size.prompt_tokens)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{t}" for t in row)}) for row in tokens]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def arguments(folder: Path, size: Size, dtype: str, steps: int, **changes: object) -> list[str]:
    """The command line of the run on the inputs in `folder`; changes are given as track__tensorboard="true"."""
    settings = {
        "output": str(folder / "run"), "steps": steps, "threads": 2, "actor.model": str(folder / "actor"),
        "rewards": json.dumps([{"model": str(folder / "reward")}]), "data.path": str(folder / "prompts.jsonl"),
        "data.max_prompt_tokens": size.prompt_tokens, "sampling.max_new_tokens": size.response_tokens,
        "sampling.ignore_eos": "true", "sampling.rows": size.prompts, "ppo.batch_size": size.prompts,
        "ppo.epochs": size.epochs, "ppo.minibatches": 1, "ppo.microbatch_tokens": size.microbatch_tokens,
        "optim.dtype": dtype, "eval.prompts": 0, "track.tensorboard": "false",
    }  # fmt: skip
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run_fastppo(folder: Path, size: Size, dtype: str, steps: int) -> list[dict[str, float]]:
    """The metrics of each step except the first."""
    command = [sys.executable, "-m", "fastppo.train", *arguments(folder, size, dtype, steps)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1:]


def run_trl(python: str, dtype: str, steps: int) -> list[float]:
    """Seconds of each step except the first."""
    command = [python, str(HERE / "trl_ppo.py"), "--dtype", dtype, "--steps", str(steps), "--json"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return list(json.loads(found.strip().splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a PPO step and of its phases.")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run; the first is not counted (at least 2)")
    parser.add_argument("--rounds", type=int, default=1, help="number of runs, alternating with runs of TRL")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--trl", help="a Python interpreter with trl==0.29.1")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")

    steps: list[dict[str, float]] = []
    theirs: list[float] = []
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), SIZES[options.size])
        for _ in range(options.rounds):
            mine = run_fastppo(Path(folder), SIZES[options.size], options.dtype, options.steps)
            steps += mine
            if options.trl:
                seconds = run_trl(options.trl, options.dtype, options.steps)
                theirs += seconds
                ratios.append(statistics.median(seconds) / statistics.median(s["time/step"] for s in mine))
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = [name for name in steps[0] if name.startswith("time/")]
    result: dict[str, Any] = {"size": options.size, "dtype": options.dtype, "device": device}
    result |= {name: round(statistics.median(s[name] for s in steps), 3) for name in names}
    for name in names:
        print(f"{name:<20} {result[name]:8.3f} s")
    if options.trl:
        result |= {"trl": round(statistics.median(theirs), 3), "times_faster": round(statistics.median(ratios), 2)}
        print(f"{'TRL 0.29.1':<20} {result['trl']:8.3f} s, {result['times_faster']:.2f} times as long (paired median)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
