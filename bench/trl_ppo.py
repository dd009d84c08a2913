"""TRL's PPOTrainer at the work that fastppo is compared with: seconds a step.

Needs trl==0.29.1, and nothing of fastppo: run it with the interpreter of an environment of its own.

    python bench/trl_ppo.py --dtype bf16 --steps 5 --json

A step: 64 prompts of 32 random tokens, 64 new tokens each with no stop token, scores, values and reference logprobs,
4 epochs of one minibatch of 64. Policy, reference, critic and reward model are random 4-layer Llamas. The settings are
the fastest for TRL that we found: one microbatch, no gradient checkpointing, fused AdamW, and with bf16 the two frozen
models held in bf16, since TRL's autocast covers the four epochs alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import argparse
import json
import platform
import statistics
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
BATCH, PROMPT, RESPONSE = 64, 32, 64  # prompts a step, tokens, tokens


class Clock(TrainerCallback):
    """Notes the time at the end of every step, one batch of 64 prompts with its four epochs."""

    def __init__(self) -> None:
        self.ends: list[float] = []  # seconds, of an arbitrary origin

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id of the model, and a pad that is none of them.

    TRL masks every pad it meets and stops a response there. A pad outside the model's vocabulary is never sampled, so
    every response keeps its 64 tokens. TRL also counts EOS tokens and fails without one, so EOS is that same id.
    """
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[PAD]": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[PAD]")


def build_trainer(dtype: str, steps: int, folder: str, clock: Clock) -> PPOTrainer:
    """A trainer that stops after `steps` batches; `dtype` is "fp32", or "bf16" for autocast over fp32 weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None, num_labels=1,
    )  # fmt: skip
    frozen = torch.bfloat16 if dtype == "bf16" else torch.float32
    prompts = torch.randint(VOCABULARY, (BATCH * steps, PROMPT)).tolist()
    policy = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_config(shape, dtype=frozen)
    reference.load_state_dict(policy.state_dict())
    dataset = Dataset.from_dict({"input_ids": prompts})
    return PPOTrainer(
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
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[clock],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds a step of TRL's PPOTrainer on the CPU.")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--steps", type=int, default=5, help="batches to run; the first is not counted (at least 2)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first step is not counted, give at least 2")
    if trl.__version__ != VERSION:
        parser.error(f"trl {trl.__version__} is installed here: the comparison is with trl=={VERSION}")

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(options.dtype, options.steps, folder, clock).train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    median = statistics.median(seconds)
    if not options.json:
        print(f"TRL {trl.__version__}, {options.dtype}: {median:.2f} s a step, the median of {len(seconds)}")
    print(
        json.dumps(
            {
                "trainer": "trl",
                "dtype": options.dtype,
                "seconds": [round(second, 3) for second in seconds],
                "median": round(median, 3),
                "threads": torch.get_num_threads(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "trl": trl.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
