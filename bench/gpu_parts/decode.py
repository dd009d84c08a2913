"""Milliseconds of a decode step of the 1B Llama, by rows, with CUDA graphs and without, against one read of weights and
cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from ceilings import ceilings
from end_to_end import Size

from gpu_parts import trace as traces
from gpu_parts.report import Report, line, table
from gpu_parts.roofline import decode_step
from gpu_parts.step import inputs, size_of

ROWS = (64, 128, 256, 512)
STEPS, ROUNDS = 16, 3  # of each round, in a row as in sampling; the host waits after each round
PREFILLED = 64  # prompts at a time


def load(report: Report, device: torch.device, *settings: str) -> Any:
    """The actor of the step, as a run loads it; settings: of `train_sft`, which loads one model and no more."""
    from fastppo import models
    from fastppo.config import SFT, parse

    path = inputs(report) / "actor"
    needed = ["--model.path", str(path), "--data.path", "none", "--optim.dtype", "bf16", "--output", "none"]
    config = parse([*needed, *settings], SFT)
    models.choose_attention(config.attention, models.DTYPES[config.optim.dtype], device)
    if has_fused_layers():
        models.choose_layers(fused=config.model.fused)
    return models.load_policy(config.model, config.optim, config.seed, device)


def has_fused_layers() -> bool:
    """Whether this checkout has the setting model.fused."""
    from fastppo.config import SFTConfig

    return hasattr(SFTConfig().model, "fused")


@torch.no_grad()
def run(report: Report) -> None:
    from fastppo.models import attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, most = size_of(report), ceilings(device)
    policy = load(report, device).eval()
    graphs = [False, True] if attention.decodes_without_sync(policy.model) else [False]
    if graphs == [False]:
        report.skip("CUDA graphs of decode steps", f"this attention on {device} cannot be recorded")
    rows = []
    for count in (4, 8) if report.small else ROWS:
        least = 1e3 * decode_step(size, count, size.prompt_tokens + STEPS).seconds(most)
        row: dict[str, Any] = {"rows": count, "least_ms": least}
        for recorded in graphs:
            decoder, at = begun(policy, size, count, recorded=recorded)
            row["graphs_ms" if recorded else "eager_ms"] = 1e3 * step_seconds(decoder, at)
            if not recorded:
                row |= one_profiled(decoder, at)
            del decoder
        best = min(value for name, value in row.items() if name in ("graphs_ms", "eager_ms"))
        rows.append(row | {"of_ceiling": least / best})
        report.add("decode", line(rows[-1]), **rows[-1])
    text = f"decode steps with about {size.prompt_tokens + STEPS} positions a row, bf16, ms a step; least: one read of"
    report.add(
        "decode steps", f"{text} weights and cache at {most.bandwidth / 1e9:,.0f} GB/s\n{table(rows)}", rows=rows
    )


def begun(policy: Any, size: Size, rows: int, *, recorded: bool) -> tuple[Any, torch.Tensor]:
    """A decoder whose rows hold a prompt and the first token of a response each, and the rows."""
    from fastppo.config import SamplingConfig
    from fastppo.rollout.decoder import Decoder

    sampling = SamplingConfig(max_new_tokens=8 * STEPS, ignore_eos=True, rows=rows)
    length = size.prompt_tokens + sampling.max_new_tokens
    decoder = Decoder(policy, rows, length, sampling, [], recorded=recorded)
    decoder.begin(sampling, 1, length)
    states = []
    for first in range(0, rows, PREFILLED):
        at = list(range(first, min(first + PREFILLED, rows)))
        tokens = torch.randint(size.vocabulary, (len(at) * size.prompt_tokens,), device=policy.device)
        positions = torch.arange(size.prompt_tokens, device=policy.device).repeat(len(at))
        decoder.cache.begin_prefill([size.prompt_tokens] * len(at), at)
        hidden = policy.prefill(tokens, positions, decoder.cache)
        decoder.cache.begin_decode()
        states.append(hidden[size.prompt_tokens - 1 :: size.prompt_tokens])
    at = torch.arange(rows, device=policy.device)
    written, limits = torch.zeros_like(at), torch.full_like(at, sampling.max_new_tokens)
    decoder.start(at, at, torch.cat(states), written, limits)
    return decoder, at


def step_seconds(decoder: Any, at: torch.Tensor) -> float:
    """Seconds of a step, the median of some rounds after one that is not counted."""
    taken = []
    for _ in range(ROUNDS + 1):
        _wait(at.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            decoder.step(at)
        _wait(at.device)
        taken.append((time.perf_counter() - start) / STEPS)
    return statistics.median(taken[1:])


def one_profiled(decoder: Any, at: torch.Tensor) -> dict[str, float]:
    """How many kernels a step has, and how long they take together."""
    spans = traces.kernels_of(lambda: decoder.step(at), at.device)
    return {"kernels": len(spans), "kernels_ms": sum(span.length for span in spans) / 1e3}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
