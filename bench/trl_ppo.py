"""Seconds per step of TRL's PPOTrainer, at the work at which fastppo is compared with it.

Needs trl==0.29.1 and does not need fastppo: run it with the interpreter of a separate environment (tested with
torch 2.13.0 and transformers 4.57.6 and 5.23.0).

    python bench/trl_ppo.py --dtype bf16 --steps 5 --json

A step: 64 prompts of 32 random tokens, 64 new tokens each with no stop token, scores, values and reference logprobs,
4 epochs of one minibatch of 64. Policy, reference, critic and reward model are random 4-layer Llamas. Settings that
make TRL faster are used: one microbatch, no gradient checkpointing, a cache only for generation, fused AdamW, and with
bf16 the two frozen models in bf16, because TRL's autocast covers only the four epochs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

VERSION = "0.29.1"
VOCABULARY = 4_096
BATCH, PROMPT, RESPONSE = 64, 32, 64  # prompts per step, tokens of a prompt, new tokens


class Clock(TrainerCallback):
    """Records the time at the end of every step, which is one batch of 64 prompts with its four epochs."""

    def __init__(self) -> None:
        self.wall: list[float] = []  # seconds, of an arbitrary origin
        self.cpu: list[float] = []  # seconds, of all threads together

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id of the model, and a pad token outside the model's vocabulary.

    TRL masks every pad token and ends a response there. A pad token outside the vocabulary is never sampled, so every
    response keeps its 64 tokens. TRL also counts EOS tokens and fails without one, so EOS is the same id.
    """
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[PAD]": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[PAD]")


def build_trainer(dtype: str, steps: int, folder: str, clock: Clock) -> PPOTrainer:
    """A trainer that stops after `steps` batches; `dtype` is "fp32", or "bf16" for autocast over fp32 weights."""
    # PPOTrainer makes its own Accelerator; since transformers 5 only this variable sets bf16 there.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == "bf16" else "no"
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1,
    )  # fmt: skip
    frozen = torch.bfloat16 if dtype == "bf16" else torch.float32
    policy = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    shape.use_cache = False  # each model has a copy of the config: only the policy generates
    reference = AutoModelForCausalLM.from_config(shape, dtype=frozen)
    reference.load_state_dict(policy.state_dict())
    prompts = Dataset.from_dict({"input_ids": torch.randint(VOCABULARY, (BATCH * steps, PROMPT)).tolist()})
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder, use_cpu=True, bf16=dtype == "bf16", seed=0, total_episodes=BATCH * steps,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=4,
            local_rollout_forward_batch_size=BATCH, response_length=RESPONSE, temperature=1.0, stop_token=None,
            gradient_checkpointing=False, optim="adamw_torch_fused", num_sample_generations=0, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        processing_class=tiny_tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=AutoModelForSequenceClassification.from_config(shape, dtype=frozen),
        value_model=AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32),
        train_dataset=prompts,
        eval_dataset=prompts,  # required, but never used to generate
        callbacks=[clock],
    )  # fmt: skip
    if trainer.accelerator.mixed_precision != os.environ["ACCELERATE_MIXED_PRECISION"]:
        raise RuntimeError(f"asked for {dtype}, TRL runs with mixed precision {trainer.accelerator.mixed_precision}")
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per step of TRL's PPOTrainer on the CPU.")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--steps", type=int, default=5, help="batches to run; the first is not counted (at least 2)")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first step is not counted, give at least 2")
    if trl.__version__ != VERSION:
        parser.error(f"trl {trl.__version__} is installed here: the comparison is with trl=={VERSION}")

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # TRL prints its metrics
        build_trainer(options.dtype, options.steps, folder, clock).train()
    seconds, cpu_seconds = (
        [round(end - start, 3) for start, end in itertools.pairwise(ends)] for ends in (clock.wall, clock.cpu)
    )
    median = round(statistics.median(seconds), 3)
    if not options.json:
        print(f"TRL {trl.__version__}, {options.dtype}: {median:.2f} s per step, the median of {len(seconds)}")
    result = {
        "trainer": "trl",
        "dtype": options.dtype,
        "median": median,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
