"""One microbatch of learning, forward and backward, with fused layers and without: time, kernels and activations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import peak_memory
import torch
from ceilings import ceilings

from gpu_parts import trace as traces
from gpu_parts.decode import has_fused_layers, load
from gpu_parts.report import Report, line, table
from gpu_parts.roofline import forward, head
from gpu_parts.step import size_of

ROUNDS = 5


def run(report: Report) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, settings in ways(report).items():
        policy = load(report, device, *settings)
        rows.append({"layers": name} | measure(report, policy, name, device))
        report.add("microbatch", line(rows[-1]), **rows[-1])
        del policy
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if len(rows) == 2:
        faster = rows[1]["ms"] / rows[0]["ms"]
        saved = rows[1]["kept_gb"] - rows[0]["kept_gb"]
        text = f"fused layers: {faster:.2f} times faster, {saved:.2f} GB of activations less, kernels"
        text += f" {rows[1]['kernels']:,} -> {rows[0]['kernels']:,}\n{table(rows)}"
        report.add("fused layers", text, times_faster=faster, saved_gb=saved)


def ways(report: Report) -> dict[str, list[str]]:
    """Settings of the runs that are compared."""
    if not has_fused_layers():
        report.skip("fused layers", "this checkout has no setting model.fused")
        return {"as loaded": []}
    return {"fused": ["--model.fused", "true"], "the model's own": ["--model.fused", "false"]}


def measure(report: Report, policy: Any, name: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a microbatch, its kernels, and bytes that forward keeps for backward."""
    size, most = size_of(report), ceilings(device)
    length = size.prompt_tokens + size.response_tokens
    sequences = size.microbatch_tokens // length
    kept = [0]
    once = microbatch(policy, size.vocabulary, [size.prompt_tokens] * sequences, size.response_tokens, kept)
    taken = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        once()
        _wait(device)
        taken.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(taken[1:])
    work = (forward(size, sequences, length) + head(size, sequences * size.response_tokens)) * 3
    spans = traces.kernels_of(once, device)
    busy = sum(span.length for span in spans) / 1e3
    found = traces.by_name(spans, 12)
    what = "kernels" if device.type == "cuda" else "operators on the CPU"
    report.add("profile", f"{what} of a microbatch, {name}, by time\n{table(found)}", layers=name, spans=found)
    least = 1e3 * work.seconds(most)
    row = {"tokens": sequences * length, "ms": milliseconds, "least_ms": least, "times_least": milliseconds / least}
    return row | {"kernels": len(spans), "kernels_ms": busy, "kept_gb": kept[0] / 1e9}


def microbatch(
    policy: Any, vocabulary: int, prompts: list[int], response_tokens: int, kept: list[int]
) -> Callable[[], None]:
    """A call that computes PPO's loss of random sequences and its gradients. kept: gets the bytes that are alive
    between the passes beside what was before."""
    from fastppo import ops
    from fastppo.data import pack

    device = policy.device
    sequences = [torch.randint(vocabulary, (count + response_tokens,)).tolist() for count in prompts]
    packed = pack(sequences, [response_tokens] * len(prompts)).to(device)
    count = len(prompts) * response_tokens
    old, advantages = torch.full((count,), -11.0, device=device), torch.randn(count, device=device)
    normalizer = torch.tensor(float(count), device=device)
    options = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2}

    def once() -> None:
        policy.zero_grad(set_to_none=True)
        before = peak_memory.in_use(device)
        hidden = policy(packed, lambda _, hidden: hidden)
        kept[0] = peak_memory.in_use(device) - before
        loss, _ = policy.head(
            hidden, ops.linear_policy_loss, packed.responses, old, advantages, normalizer=normalizer, **options
        )
        loss.backward()

    return once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
