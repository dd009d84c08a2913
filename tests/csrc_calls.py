"""Calls of the C++ kernels, for the tests of csrc, and what holds for each of them."""

from collections.abc import Callable
from typing import Any

import torch
from cases import LinearCase, in_fp64
from torch import Tensor

import fastppo._C  # noqa: F401  (registers torch.ops.fastppo.*)
from fastppo.ops import eager

kernels = torch.ops.fastppo
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward(case: dict[str, Any]) -> Tensor:
    return kernels.vocabulary_forward(
        case["logits"], case["targets"], case["temperature"], case["softcap"], case.get("ref_logits")
    )


def backward(case: dict[str, Any], stats: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(case["logits"]) if out is None else out
    scale = (case["temperature"], case["softcap"], case.get("ref_logits"))
    kernels.vocabulary_backward(case["logits"], case["targets"], stats, grad, *scale, out)
    return out


def chunk_arguments(case: LinearCase, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `policy_loss_in_chunk`, except the logits and what is made from them, by name."""
    logprobs = eager.linear_logprobs(**in_fp64(case.build(dtype))).logprobs
    made = case.build_loss(dtype, logprobs)
    made["logits"] = torch.nn.functional.linear(made["hidden"], made["weight"], made["bias"])
    if case.reference:
        made["ref_logits"] = torch.nn.functional.linear(made["ref_hidden"], made["ref_weight"], made["ref_bias"])
    defaults = {"dual_clip": None, "entropy_coef": 0.0, "kl_coef": 0.0, "kl_kind": "exact", "mask": None}
    return defaults | {"ref_logits": None} | made


def update_in_chunk(a: dict[str, Any], gradient: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Loss, sums, largest ratio and d_logits; and token_stats, columns of a larger buffer."""
    logits, token_stats = a["logits"].clone(), torch.full((8, len(a["logits"]) + 2), 9.0)
    kernels.policy_loss_in_chunk(
        logits,
        a["targets"],
        a["old_logprobs"],
        a["advantages"],
        a["normalizer"],
        a["temperature"],
        a["softcap"],
        a["clip_low"],
        a["clip_high"],
        a["dual_clip"],
        a["entropy_coef"],
        a["kl_coef"],
        a["kl_kind"],
        a["ref_logprobs"],
        a["ref_logits"],
        a["mask"],
        gradient,
        token_stats[:, 1:-1],
    )
    assert (token_stats[:, [0, -1]] == 9.0).all()
    token_stats = token_stats[:, 1:-1]
    loss, sums, ratio_max = kernels.sum_tokens(token_stats, a["entropy_coef"], a["kl_coef"], a["normalizer"])
    return {"loss": loss, "sums": sums, "ratio_max": ratio_max, "d_logits": logits}, token_stats


def draw(
    logits: Tensor, stream: Tensor | None = None, temperature: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    stream = torch.arange(len(logits)) if stream is None else stream
    return kernels.sample_tokens(logits, stream, torch.full_like(stream, 3), temperature, seed)


def assert_repeats(run: Callable[[], list[Tensor]]) -> None:
    """The same bits again, and for any number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def assert_rows_stand_alone(run: Callable[[slice], list[Tensor]], rows: int) -> None:
    """A row's results, which lie along the last dimension, are the same bits with and without its neighbours."""
    together = run(slice(None))
    for row in range(rows):
        alone = run(slice(row, row + 1))
        assert all(torch.equal(x, y[..., row : row + 1]) for x, y in zip(alone, together, strict=True))


def some_rows(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    count = len(arguments["logits"])
    return {name: x[rows] if isinstance(x, Tensor) and x.shape[:1] == (count,) else x for name, x in arguments.items()}
