"""Peak memory and time of `linear_policy_loss`, forward and backward.

    python bench/head.py --rounds 5

M = 2,048 tokens, H = 576, V = 49,152, bf16, two threads. With a GPU it runs there, with M = 8,192, H = 4,096 and
V = 128,256. Memory is the peak of the process, or on a GPU of torch's allocator, divided by the memory of the inputs,
the gradients (the weight's in fp32) and the workspace; its ceiling is 1.1. Time is divided by the time of three matrix
products on the same chunks, with the weight's gradient summed in fp32, and a `torch.compile`d pass from logits to their
gradient between them (paired); its ceiling is 1.1.
"""

import argparse
import functools
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import torch
from ceilings import seconds
from torch import Tensor

from fastppo import ops
from fastppo.ops import chunked_head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, H, V = (2_048, 576, 49_152) if DEVICE.type == "cpu" else (8_192, 4_096, 128_256)
WORKSPACE = ops.workspace_bytes(cpu=DEVICE.type == "cpu")
OPTIONS = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.01}


def inputs(tokens: int) -> tuple[Tensor, ...]:
    """hidden, weight, targets, old logprobs, advantages"""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, H, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    weight = (torch.randn(V, H, dtype=torch.bfloat16, device=DEVICE) / H**0.5).requires_grad_()
    targets, old = torch.randint(V, (tokens,), device=DEVICE), torch.full((tokens,), -11.0, device=DEVICE)
    return hidden, weight, targets, old, torch.randn(tokens, device=DEVICE)


def update(hidden: Tensor, weight: Tensor, *tokens: Tensor) -> None:
    """The update with fastppo's op."""
    normalizer = torch.tensor(float(len(hidden)), device=DEVICE)
    loss, _ = ops.linear_policy_loss(hidden, weight, *tokens, **OPTIONS, normalizer=normalizer)
    torch.autograd.grad(loss, [hidden, weight])


@torch.compile(dynamic=False)
def compiled_pass(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The gradient of the clipped loss with entropy bonus with respect to the logits, for torch.compile."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    ratio = (log_p.gather(-1, targets[:, None])[:, 0] - old).exp()
    inside = torch.where(advantages > 0, ratio < 1 + OPTIONS["clip_high"], ratio > 1 - OPTIONS["clip_low"])
    slope = torch.where(inside, -advantages * ratio, 0.0)[:, None]
    d = -slope * p + OPTIONS["entropy_coef"] * p * (log_p + entropy)
    columns = torch.arange(V, device=DEVICE)
    return ((d + torch.where(columns == targets[:, None], slope, 0.0)) / M).to(logits.dtype)


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor, *tokens: Tensor) -> None:
    """The same chunks with torch only."""
    d_hidden, total = torch.empty_like(hidden), None
    head, none = chunked_head.Head(hidden, weight, None), chunked_head.Head(None, None, None)
    for rows, logits, _ in chunked_head.chunks(head, none, WORKSPACE):
        dz = compiled_pass(logits, *(x[rows] for x in tokens))
        torch.mm(dz, weight, out=d_hidden[rows])
        part = dz.t() @ hidden[rows]
        total = part.float() if total is None else total.add_(part)


def in_use(most: bool = False) -> int:
    """Resident bytes of this process, or on a GPU bytes of tensors: now, or the maximum since `mark`."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    kind = "VmHWM" if most else "VmRSS"
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def mark() -> None:
    """Reset the maximum of `in_use`."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory(tokens: tuple[Tensor, ...]) -> float:
    """Peak of an update divided by inputs, gradients and workspace. A small update runs first, as warm-up."""
    update(*inputs(64))
    size = sum(x.numel() * x.element_size() for x in tokens)
    before = in_use()  # includes the inputs
    mark()
    update(*tokens)
    gradients = tokens[0].numel() * 2 + tokens[1].numel() * 4
    return (in_use(most=True) - before + size) / (size + gradients + WORKSPACE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of linear_policy_loss.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    tokens = inputs(M)
    used = memory(tokens)
    calls = [functools.partial(call, *tokens) for call in (update, products)]
    pairs = [[seconds(call, DEVICE) for call in calls] for _ in range(rounds + 1)][1:]
    mine, theirs = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(m / t for m, t in pairs)
    print(f"peak memory, of inputs + gradients + workspace: {used:.2f}")
    print(f"fastppo {mine:.3f} s, products and a compiled pass {theirs:.3f} s, ratio {ratio:.2f} (paired median)")
    result = {"memory": round(used, 3), "seconds": round(mine, 4), "ratio": round(ratio, 3), "device": DEVICE.type}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
