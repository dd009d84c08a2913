"""Compare the ops over the vocabulary with eager PyTorch, with torch.compile and, if installed, with Liger-Kernel.

    pytest bench/test_vocabulary.py --benchmark-only
    python bench/test_vocabulary.py            # a table of paired ratios, and one line of JSON

For the table, candidates run alternately in one process, so that other programs slow all of them equally. The ceiling
of a forward pass is one read of the logits; of a backward pass one more read and a write; of a policy loss its three
matrix products. Runs on the GPU if there is one, with the sizes of an 8B Llama.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch when it is imported

import functools
import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from ceilings import Ceilings, ceilings, seconds
from torch import Tensor

from fastppo import ops
from fastppo.ops import philox, registration
from fastppo.ops.eager import restrict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sizes of SmolLM2's head, or on a GPU of an 8B Llama's with enough rows to fill the card: tokens, vocabulary, width,
# and rows of a decode step.
M, V, H, ROWS = (256, 49_152, 576, 32) if DEVICE.type == "cpu" else (4096, 128_256, 4096, 256)
BLOCK = 128
TOP_P = 0.95
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Group(NamedTuple):
    """Candidates that compute the same result from the same arguments."""

    candidates: dict[str, Callable[..., Any]]
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    moved: Callable[[int], int]  # least possible bytes, given the bytes of an element
    flops: int = 0

    def calls(self, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        arguments = self.arguments(dtype)
        return {name: functools.partial(f, *arguments) for name, f in self.candidates.items()}


# Log probability and entropy


def eager_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def fastppo_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    stats = ops.token_logprobs(logits, targets)
    return stats.logprobs, stats.entropy


def both_passes(forward: Callable[..., Any], logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(forward(logits, targets), logits, (grad[0], grad[1]))[0]


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(M, V, device=DEVICE).to(dtype), torch.randint(V, (M,), device=DEVICE)


def rows_to_differentiate(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = rows(dtype)
    return logits.requires_grad_(), targets, torch.randn(2, M, device=DEVICE)


# Sampling


def eager_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Sampling by inverting the distribution function in two steps: the block that u is in, then the token."""
    x = logits.float()
    x = x - x.amax(-1, keepdim=True)
    e = x.exp().view(len(x), -1, BLOCK)
    block_cumulative = e.sum(-1).double().cumsum(-1)
    total = block_cumulative[:, -1:]
    threshold = philox.uniform(1, stream, offset)[:, None] * total
    block = (block_cumulative <= threshold).sum(-1, keepdim=True)
    before = torch.where(block > 0, block_cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    cumulative = e[torch.arange(len(x), device=x.device), block[:, 0]].double().cumsum(-1)
    prefix_states = cumulative[:, -1:].nextafter(torch.zeros_like(total))
    tokens = block * BLOCK + (cumulative <= torch.minimum(threshold - before, prefix_states)).sum(-1, keepdim=True)
    return tokens[:, 0], (x.gather(-1, tokens) - total.log())[:, 0].float()


def fastppo_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sample_tokens(logits, seed=1, stream=stream, offset=offset)


def sorted_nucleus_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The same draw after a sort of the vocabulary and sums of probabilities in fp64."""
    return fastppo_sample(restrict(logits, 1.0, 0, TOP_P), stream, offset)


def fastppo_nucleus_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sample_tokens(logits, top_p=TOP_P, seed=1, stream=stream, offset=offset)


def rows_to_draw_from(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(ROWS, V, device=DEVICE).to(dtype)
    return logits, torch.arange(ROWS, device=DEVICE), torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)


# The clipped loss from hidden states to their gradients, without a reference


def head_gradients(loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *tokens: Tensor) -> Any:
    return torch.autograd.grad(loss_of(hidden, weight, *tokens), [hidden, weight])


def eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    ratio = (log_p.gather(-1, targets[:, None])[:, 0] - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def fastppo_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    options = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2}
    normalizer = torch.tensor(float(len(hidden)), device=hidden.device)
    return ops.linear_policy_loss(hidden, weight, targets, old, advantages, **options, normalizer=normalizer)[0]


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The most similar loss there: GRPO's, with sequences of one token, so that each token has its own advantage."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=M, loss_type="bnpo")
    mask = torch.ones_like(targets)[:, None]
    return loss(hidden[:, None], weight, targets[:, None], mask, advantages, old_per_token_logps=old[:, None])[0]


def head(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(M, H, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=DEVICE) / H**0.5).to(dtype).requires_grad_()
    old = torch.full((M,), -11.0, device=DEVICE)
    return hidden, weight, torch.randint(V, (M,), device=DEVICE), old, torch.randn(M, device=DEVICE)


LOSSES = {"eager": eager_loss, "compiled": torch.compile(eager_loss, dynamic=False), "fastppo": fastppo_loss}
if find_spec("liger_kernel"):
    LOSSES["liger"] = liger_loss
COMPILED_FORWARD = torch.compile(eager_forward, dynamic=False)

GROUPS = {
    "logprob + entropy, forward": Group(
        {"eager": eager_forward, "compiled": COMPILED_FORWARD, "fastppo": fastppo_forward},
        rows,
        lambda size: M * V * size,
    ),
    "logprob + entropy, forward and backward": Group(
        {
            name: functools.partial(both_passes, forward)
            for name, forward in (
                ("eager", eager_forward),
                ("compiled", COMPILED_FORWARD),
                ("fastppo", fastppo_forward),
            )
        },
        rows_to_differentiate,
        lambda size: 3 * M * V * size,
    ),
    f"sample_tokens, {ROWS} rows": Group(
        {"eager": eager_sample, "compiled": torch.compile(eager_sample, dynamic=False), "fastppo": fastppo_sample},
        rows_to_draw_from,
        lambda size: ROWS * V * size,
    ),
    f"sample_tokens with top_p {TOP_P}, {ROWS} rows": Group(
        {
            "eager": sorted_nucleus_sample,
            "compiled": torch.compile(sorted_nucleus_sample, dynamic=False),
            "fastppo": fastppo_nucleus_sample,
        },
        rows_to_draw_from,
        lambda size: ROWS * V * size,
    ),
    "linear_policy_loss, forward and backward": Group(
        {name: functools.partial(head_gradients, loss) for name, loss in LOSSES.items()},
        head,
        lambda size: 2 * V * H * size,
        flops=6 * M * V * H,
    ),
}
CASES = [(group, dtype, candidate) for group in GROUPS for dtype in DTYPES for candidate in GROUPS[group].candidates]


@pytest.mark.parametrize(("group", "dtype", "candidate"), CASES)
def test_vocabulary(benchmark: Any, group: str, dtype: str, candidate: str) -> None:
    benchmark.group = f"{group}, {dtype}"
    call = GROUPS[group].calls(DTYPES[dtype])[candidate]
    benchmark.pedantic(seconds, args=(call, DEVICE), rounds=10, warmup_rounds=2)


def compare(group: str, dtype: str, rounds: int, most: Ceilings) -> dict[str, Any]:
    """Run a group's candidates alternately. Returns medians, and the median ratio of each to fastppo."""
    calls = GROUPS[group].calls(DTYPES[dtype])
    times = [{name: seconds(call, DEVICE) for name, call in calls.items()} for _ in range(rounds + 2)][2:]
    median = {name: statistics.median(t[name] for t in times) for name in calls}
    size = DTYPES[dtype].itemsize
    moved, flops = (
        GROUPS[group].moved(size),
        GROUPS[group].flops * (1 if dtype == "bf16" or DEVICE.type == "cpu" else 2),
    )
    return {
        "case": f"{group}, {dtype}",
        "ms": {name: 1e3 * t for name, t in median.items()},
        "times_faster": {n: statistics.median(t[n] / t["fastppo"] for t in times) for n in calls if n != "fastppo"},
        "gb_per_s": moved / median["fastppo"] / 1e9,
        "tflop_per_s": flops / median["fastppo"] / 1e12,
        "of_peak": most.share(median["fastppo"], moved=moved, flops=flops),
    }


def main(rounds: int = 30) -> None:
    most = ceilings(DEVICE)
    print(
        f"{most.device}, {registration.backend(DEVICE)}; medians of {rounds} rounds. Ceiling ({most.source}):", end=" "
    )
    print(f"{most.bandwidth / 1e9:,.0f} GB/s, {most.flops / 1e12:.2f} TFLOP/s in bf16\n")
    print("| | eager, ms | compiled, ms | fastppo, ms | times faster than eager | than compiled | GB/s | of ceiling |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for group in GROUPS:
        for dtype in DTYPES:
            found = compare(group, dtype, rounds if not GROUPS[group].flops else max(3, rounds // 6), most)
            results.append(found)
            ms, faster = found["ms"], found["times_faster"]
            extra = f" (Liger: {ms['liger']:.1f} ms)" if "liger" in ms else ""
            print(
                f"| {found['case']}{extra} | {ms['eager']:.2f} | {ms['compiled']:.2f} | {ms['fastppo']:.2f}"
                f" | {faster['eager']:.1f} | {faster['compiled']:.2f}"
                f" | {found['gb_per_s']:.1f} | {found['of_peak']:.0%} |",
                flush=True,
            )
    print(json.dumps({"device": most.device, "results": results}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
