"""Peak memory and time of `linear_policy_loss`, forward and backward.

    python bench/head.py --rounds 5
    python bench/head.py --bytes    # counted, without a GPU

M = 2,048 tokens, H = 576, V = 49,152, bf16, two threads. With a GPU it runs there, with M = 8,192, H = 4,096 and
V = 128,256. Memory is the peak of the process, or on a GPU of torch's allocator, divided by the memory of the inputs,
the gradients (the weight's in fp32) and the workspace; its ceiling is 1.1. Time is divided by the time of three matrix
products on the same chunks, with the weight's gradient summed in fp32, and a `torch.compile`d pass from logits to their
gradient between them (paired); its ceiling is 1.1.
Bytes are those that the op moves on a GPU outside its three products, with M = 4,096 and the head of Llama-3 8B: every
operation is seen by a dispatch mode, on tensors without memory. A product counts as far as it moves more than its two
factors and one result in their dtype. Next to it is the least: what the kernel between the products reads and writes.
"""

import argparse
import functools
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import torch
from ceilings import seconds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    for rows, _, filled in chunked_head.chunks(head, none, head.blocks(WORKSPACE)):
        ((_, logits, _),) = filled
        dz = compiled_pass(logits, *(x[rows] for x in tokens))
        torch.mm(dz, weight, out=d_hidden[rows])
        part = dz.t() @ hidden[rows]
        total = part.float() if total is None else total.add_(part)


class Moved(TorchDispatchMode):
    """Counts the bytes that each operation reads and writes, by its name, and runs no product."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | (kwargs or {})
        name = op._schema.name.partition("::")[2]
        is_product = name in ("mm", "addmm")
        made = given["out"] if is_product else op(*args, **(kwargs or {}))
        self.bytes[name] = self.bytes.get(name, 0) + (product if is_product else everything)(op, given, made)
        return made


def size(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def product(op: Any, given: dict[str, Any], made: Tensor) -> int:
    """What a product moves beyond its factors and one result in their dtype."""
    factor = given["mat1" if "mat1" in given else "self"]
    return size(given["self"] if "mat1" in given else None, made) - made.numel() * factor.element_size()


def everything(op: Any, given: dict[str, Any], made: Any) -> int:
    """All tensors that an operation reads and writes. Views, and memory that nobody has written to, cost nothing."""
    name, arguments = op._schema.name.partition("::")[2], op._schema.arguments
    if op.is_view or "empty" in name:
        return 0
    if name == "policy_loss_in_chunk":  # a read for the statistics, and a read and a write for the gradient
        return 3 * size(given["logits"]) + 2 * size(given["ref_logits"])
    if name == "scale_gradient":  # by 1
        return size(given["factor"])
    only_written = {a.name for a in arguments if a.is_write} if name in ("copy_", "zero_", "fill_") else set()
    makes_constants = "zeros" in name or "ones" in name or "full" in name
    read = 0 if makes_constants else size(*(x for key, x in given.items() if key not in only_written))
    written = [given[a.name] for a in arguments if a.is_write] or (made if isinstance(made, tuple) else [made])
    return read + size(*written)


def bytes_moved(tokens: int = 4_096, width: int = 4_096, vocabulary: int = 128_256) -> tuple[dict[str, int], int]:
    """Bytes outside the products by operation, of an update in bf16 on a GPU, and the least."""
    wanted, workspace = [True, True, False], ops.workspace_bytes(cpu=False)
    made = functools.partial(torch.empty, device="meta")
    hidden, weight = (made(rows, width, dtype=torch.bfloat16) for rows in (tokens, vocabulary))
    targets, one, none = made(tokens, dtype=torch.int64), made(()), None
    per_token = (made(tokens), made(tokens), one, none, none)
    reference, coefficients = (none, none, none), (1.0, none, 0.2, 0.2, none, 0.01, 0.0, "exact")
    with Moved() as moved:
        *_, d_hidden, d_weight, _ = chunked_head.linear_policy_loss(
            hidden, weight, none, targets, *per_token, *reference, *coefficients, workspace, wanted
        )
        for gradient in (d_hidden, d_weight):  # the backward pass, from a loss that is not scaled
            torch.ops.fastppo.scale_gradient(gradient, one)
    return {name: x for name, x in moved.bytes.items() if x}, 3 * tokens * vocabulary * 2


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
    parser.add_argument("--bytes", action="store_true", help="count what is moved on a GPU, and measure nothing")
    options = parser.parse_args()
    if options.bytes:
        moved, least = bytes_moved()
        for name, count in moved.items():
            print(f"{name:24} {count:>15,}")
        print(json.dumps({"bytes": sum(moved.values()), "least": least}))
        return
    rounds = options.rounds
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
