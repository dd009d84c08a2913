"""Whether a rollout is one: what an engine returns is checked before anything is learned from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastppo.data import Packed, Prompts, Rollout
from fastppo.errors import FastPPOError

ROUNDING = 1e-6  # nats by which a logprob may be above 0


class SamplerError(FastPPOError):
    """A rollout engine that is missing, fails, or returns something else than a response to each prompt."""


def check_rollout(rollout: Any, prompts: Prompts, setting: str, *, longest: int, vocabulary: int) -> None:
    """Raises SamplerError for the first thing in which it is no rollout of these prompts.

    setting: as errors name the engine; longest: tokens of a response; vocabulary: tokens that the actor embeds.
    """
    for problem in _problems(rollout, prompts, longest, vocabulary):
        raise SamplerError(f"{setting} returned {problem}.")


def _problems(rollout: Any, prompts: Prompts, longest: int, vocabulary: int) -> Iterator[str]:
    """Each check may rely on those before it, since only the first problem is wanted."""
    if not isinstance(rollout, Rollout) or not isinstance(rollout.packed, Packed):
        yield f"{type(rollout).__name__}, and not a fastppo.data.Rollout"
    yield from _wrong_tensors(rollout, prompts)
    yield from _wrong_counts(rollout, len(prompts))
    yield from _wrong_lengths(rollout, prompts, longest)
    yield from _wrong_tokens(rollout, prompts, vocabulary)
    yield from _wrong_logprobs(rollout)


def _wrong_tensors(rollout: Rollout, prompts: Prompts) -> Iterator[str]:
    packed = rollout.packed
    tensors: tuple[tuple[str, Any, torch.dtype], ...] = (
        ("packed.tokens", packed.tokens, torch.int64),
        ("packed.cu_seqlens", packed.cu_seqlens, torch.int32),
        ("packed.response_cu_seqlens", packed.response_cu_seqlens, torch.int32),
        ("logprobs", rollout.logprobs, torch.float32),
        ("ended", rollout.ended, torch.bool),
        ("sources", rollout.sources, torch.int64),
    )
    if packed.mask is not None:
        tensors += (("packed.mask", packed.mask, torch.bool), ("turn_rewards", rollout.turn_rewards, torch.float32))
    if prompts.extend_by is not None:
        tensors += (("complete", rollout.complete, torch.bool),)
    for name, tensor, dtype in tensors:
        if not isinstance(tensor, Tensor):
            yield f"{name} of the type {type(tensor).__name__}; it must be a tensor of {dtype}"
        elif (tensor.dtype, tensor.dim(), tensor.device.type) != (dtype, 1, "cpu"):
            kind = f"{tensor.dim()} dimension(s) of {tensor.dtype} on {tensor.device}"
            yield f"{name} with {kind}; it must have 1 of {dtype} on the CPU"


def _wrong_counts(rollout: Rollout, count: int) -> Iterator[str]:
    packed = rollout.packed
    for name, rows in (
        ("", len(packed)),
        ("packed.response_cu_seqlens of ", len(packed.response_cu_seqlens) - 1),
        ("ended of ", len(rollout.ended)),
        ("sources of ", len(rollout.sources)),
        ("complete of ", count if rollout.complete is None else len(rollout.complete)),
    ):
        if rows != count:
            yield f"{name}{rows} responses to {count} prompts"
    for name, starts in (("packed.cu_seqlens", packed.cu_seqlens), ("response_cu_seqlens", packed.response_cu_seqlens)):
        if starts[0] != 0:
            yield f"{name} that begins at {int(starts[0])}, and not at 0"


def _wrong_lengths(rollout: Rollout, prompts: Prompts, longest: int) -> Iterator[str]:
    packed = rollout.packed
    if len(packed.tokens) != int(packed.cu_seqlens[-1]):
        yield f"{len(packed.tokens)} tokens in packed.tokens, of which cu_seqlens counts {int(packed.cu_seqlens[-1])}"
    if packed.mask is not None:
        yield from _wrong_mask(packed, rollout.complete)
    lengths = packed.lengths
    responses = packed.response_lengths if packed.mask is None else lengths - packed.prompt_lengths
    for i in ((responses < 1) | (responses > longest)).nonzero().flatten().tolist():
        yield f"{int(responses[i])} tokens as response {i}; it must have 1 to sampling.max_new_tokens = {longest}"
    expected = torch.tensor([len(tokens) for tokens in prompts.tokens], dtype=torch.int64)
    for i in (lengths != expected + responses).nonzero().flatten().tolist():
        yield (
            f"{int(lengths[i])} tokens as sequence {i}, whose prompt has {int(expected[i])} and whose response"
            f" {int(responses[i])}"
        )


def _wrong_mask(packed: Packed, complete: Tensor | None) -> Iterator[str]:
    assert packed.mask is not None
    if len(packed.mask) != len(packed.tokens):
        yield f"packed.mask of {len(packed.mask)} numbers for {len(packed.tokens)} tokens"
    written = [int(part.sum()) for part in packed.mask.split(packed.lengths.tolist())] if len(packed) else []
    for i, (marked, count) in enumerate(zip(written, packed.response_lengths.tolist(), strict=True)):
        if marked != count or count < 1:
            yield f"a mask with {marked} written tokens in sequence {i}, of which response_cu_seqlens counts {count}"
    observed_last = ~packed.mask[packed.last_rows]  # as it may be where the conversation goes on
    for i in (observed_last if complete is None else observed_last & complete).nonzero().flatten().tolist():
        yield f"a sequence {i} that does not end with a token that the actor wrote"


def _wrong_tokens(rollout: Rollout, prompts: Prompts, vocabulary: int) -> Iterator[str]:
    packed = rollout.packed
    for i in (rollout.sources != prompts.sources).nonzero().flatten().tolist():
        yield f"row {int(rollout.sources[i])} as the source of response {i}; that of its prompt is {prompts.sources[i]}"
    sequences = packed.tokens.split(packed.lengths.tolist()) if len(packed) else ()
    prefixes = prompts.tokens_so_far
    for i, (prompt, prefix, sequence) in enumerate(zip(prompts.tokens, prefixes, sequences, strict=True)):
        if tuple(sequence[: len(prompt)].tolist()) != prompt:
            yield f"a sequence {i} that does not begin with its prompt"
        if tuple(sequence[: len(prefix)].tolist()) != prefix:
            yield f"a response {i} that does not go on behind its earlier tokens"
        beyond = [token for token in sequence[len(prompt) :].tolist() if not 0 <= token < vocabulary]
        if beyond:
            yield f"token {beyond[0]} in response {i}, beyond the actor's vocabulary of {vocabulary}"


def _wrong_logprobs(rollout: Rollout) -> Iterator[str]:
    logprobs, count = rollout.logprobs, int(rollout.packed.response_cu_seqlens[-1])
    if len(logprobs) != count:
        yield f"{len(logprobs)} logprobs for {count} response tokens"
    if rollout.turn_rewards is not None and len(rollout.turn_rewards) != count:
        yield f"{len(rollout.turn_rewards)} turn_rewards for {count} response tokens"
    for i in (~(logprobs <= ROUNDING) | logprobs.isinf()).nonzero().flatten().tolist():
        response = int(torch.searchsorted(rollout.packed.response_cu_seqlens, i, right=True)) - 1
        yield f"{float(logprobs[i])} as a logprob in response {response}; it must be a finite number, at most 0"
