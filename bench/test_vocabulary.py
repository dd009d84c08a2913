"""The C++ kernels over the vocabulary against eager PyTorch and torch.compile of it.

`pytest bench/test_vocabulary.py --benchmark-only`, or `python bench/test_vocabulary.py` for a table of paired ratios:
the candidates take turns in one process, so that what else the machine does slows all of them alike.

The ceiling of a forward pass is one read of the logits, of a forward and backward pass two reads and one write.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastppo._C  # registers torch.ops.fastppo.*
from fastppo import eager

M, V, ROWS = 256, 49_152, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
kernels = torch.ops.fastppo


def eager_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of the target, and entropy."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def both_passes(forward: Callable, logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(forward(logits, targets), logits, (grad[0], grad[1]))[0]


def kernel_forward(logits: Tensor, targets: Tensor) -> Tensor:
    return kernels.vocabulary_forward(logits, targets, 1.0, None, None)


def kernel_both_passes(logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    stats, out = kernel_forward(logits, targets), torch.empty_like(logits)
    kernels.vocabulary_backward(logits, targets, stats, grad, 1.0, None, None, out)
    return out


class Group(NamedTuple):
    """Candidates that compute the same from the same."""

    eager: Callable
    fastppo: Callable
    arguments: Callable[[torch.dtype], tuple]
    least_bytes: Callable[[int], int]  # moved, given the bytes of an element

    def candidates(self, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        arguments = self.arguments(dtype)
        compiled = torch.compile(self.eager, dynamic=False)
        functions = {"eager": self.eager, "compiled": compiled, "fastppo": self.fastppo}
        return {name: functools.partial(function, *arguments) for name, function in functions.items()}


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(M, V).to(dtype), torch.randint(V, (M,))


def rows_to_differentiate(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = rows(dtype)
    return logits.requires_grad_(), targets, torch.randn(4, M)


def rows_to_draw_from(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(ROWS, V).to(dtype), torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)


GROUPS = {
    "forward": Group(eager_forward, kernel_forward, rows, lambda size: M * V * size),
    "forward and backward": Group(
        functools.partial(both_passes, eager_forward),
        kernel_both_passes,
        rows_to_differentiate,
        lambda size: 3 * M * V * size,
    ),
    "sample_tokens": Group(
        lambda logits, stream, offset: eager.sample_tokens(logits, seed=1, stream=stream, offset=offset),
        lambda logits, stream, offset: kernels.sample_tokens(logits, stream, offset, 1.0, 1),
        rows_to_draw_from,
        lambda size: ROWS * V * size,
    ),
}
CASES = [(group, dtype) for group in GROUPS for dtype in DTYPES]


@pytest.mark.parametrize("candidate", ["eager", "compiled", "fastppo"])
@pytest.mark.parametrize(("group", "dtype"), CASES)
def test_vocabulary(benchmark, group, dtype, candidate):
    benchmark.group = f"{group}, {dtype}"
    benchmark.pedantic(GROUPS[group].candidates(DTYPES[dtype])[candidate], rounds=10, warmup_rounds=2)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main(rounds: int = 40) -> None:
    print(f"{torch.get_num_threads()} threads, SIMD {fastppo._C.built()['simd_used']}, medians of {rounds} rounds")
    print("| | eager, ms | compiled, ms | fastppo, ms | GB/s | times eager | times compiled |")
    print("|---|---|---|---|---|---|---|")
    for group, dtype in CASES:
        candidates = GROUPS[group].candidates(DTYPES[dtype])
        for call in candidates.values():
            milliseconds(call), milliseconds(call)
        times = [{name: milliseconds(call) for name, call in candidates.items()} for _ in range(rounds)]
        median = {name: statistics.median(t[name] for t in times) for name in candidates}
        ratio = {name: statistics.median(t[name] / t["fastppo"] for t in times) for name in candidates}
        rate = GROUPS[group].least_bytes(DTYPES[dtype].itemsize) / median["fastppo"] / 1e6
        columns = [f"{median[name]:.2f}" for name in candidates] + [f"{rate:.1f}"]
        columns += [f"{ratio[name]:.1f}" for name in ("eager", "compiled")]
        print(f"| {group}, {dtype} | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
