"""Refilled rows where they could go wrong: what a row held before, odd sizes and places of prompts, ranks, experts.

The oracle is that of `test_refill`, decoding in fixed groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from test_refill import PATHS, SEED, STOPS, WIDE_ENOUGH, Responses, attention_by, by_groups, prompts_of, refilled

from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.models.cache import Cache
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout.inprocess import sample

OFTEN = range(0, 257, 2)  # half of all tokens end a response
LONG, SHORT = tuple(range(40, 70)), (7,)


def policy_of(family: str = "llama", **settings: Any) -> Policy:
    return Policy(fuse_head(tiny.causal(family, **settings)))


def alternating(count: int) -> Prompts:
    """Long prompts and those of one token, so that a row takes one after the other."""
    tokens = [(*LONG[: 9 + i % 20], i) if i % 3 else (*SHORT, *SHORT[: i % 2]) for i in range(1, count + 1)]
    return Prompts.of(tokens, range(count))


# What a row held before


def spoil(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let rows hold large numbers wherever nothing was written since they were last taken; counts the rows so taken."""
    made, prefill, copy, taken = Cache.__init__, Cache.begin_prefill, Cache.copy_row, []

    def spoilt(cache: Cache, row: int, start: int) -> None:
        taken.append(row)
        for buffer in (cache.keys, cache.values):
            buffer[:, row, :, start:] = 1e4

    def init(cache: Cache, *given: Any) -> None:
        made(cache, *given)
        for row in range(len(cache.lengths)):
            spoilt(cache, row, 0)

    def begin_prefill(cache: Cache, lengths: Sequence[int], rows: Sequence[int]) -> None:
        for row in rows:
            spoilt(cache, row, 0)
        prefill(cache, lengths, rows)

    def copy_row(cache: Cache, source: int, targets: Sequence[int], length: int) -> None:
        copy(cache, source, targets, length)
        for row in targets:
            spoilt(cache, row, length)

    for name, replaced in (("__init__", init), ("begin_prefill", begin_prefill), ("copy_row", copy_row)):
        monkeypatch.setattr(Cache, name, replaced)
    return taken


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_shows_nothing_of_what_it_held_before(monkeypatch, path, samples):
    """Short prompts follow on long responses, beyond a window and within; soft-capped scores hide nothing large."""
    family, dtype, kind = PATHS[path]
    policy = policy_of(family, dtype=dtype, **({} if dtype == torch.float32 else WIDE_ENOUGH))
    prompts = alternating(12) if samples == 1 else prompts_of(6, samples)
    config = SamplingConfig(rows=4, max_new_tokens=15)
    with attention_by(kind):
        expected = refilled(policy, prompts, config)
        taken = spoil(monkeypatch)
        assert refilled(policy, prompts, config) == expected
    assert min(taken.count(row) for row in range(4)) >= 3  # the beginning, and two responses or more


# Prompts of odd sizes, numbers and places

# name -> (prompts, settings, stop ids)
EDGES: dict[str, tuple[Prompts, dict[str, Any], Sequence[int]]] = {
    "prompts of one token": (Prompts.of([(i,) for i in range(5, 30)], range(25)), {}, STOPS),
    "one token after long prompts": (alternating(30), {}, STOPS),
    "one prompt far longer": (Prompts.of([SHORT, LONG * 3, SHORT, SHORT, LONG], range(5)), {}, STOPS),
    "one token to write": (prompts_of(10, 3), {"max_new_tokens": 1}, ()),
    "one token to write, which may not end it": (prompts_of(10, 3), {"max_new_tokens": 1, "min_new_tokens": 1}, STOPS),
    "two tokens to write": (prompts_of(10, 3), {"max_new_tokens": 2}, OFTEN),
    "nothing ends a response": (prompts_of(9, 3), {}, ()),
    "more rows than prompts": (prompts_of(3, 2), {"rows": 100}, STOPS),
    "as many rows as prompts": (prompts_of(8, 2), {"rows": 16}, STOPS),
    "three samples in four rows": (prompts_of(9, 3), {}, STOPS),
    "five samples in eight rows": (prompts_of(9, 5), {"rows": 8}, STOPS),
    "seven samples in four rows": (prompts_of(5, 7), {}, STOPS),
    "rows that are no bucket": (prompts_of(9, 4), {"rows": 11}, STOPS),
    "one prompt for all": (Prompts.of([LONG], [0], samples=30), {}, OFTEN),
    "equal prompts apart": (Prompts.of([LONG, SHORT, LONG[:9]], [0, 1, 0, 2, 0, 0, 1, 1, 2] * 3), {}, STOPS),
    "equal prompts apart, with samples": (Prompts.of([LONG, SHORT], [0, 1, 0, 0, 1], samples=3), {}, OFTEN),
    "a row that ends many times beside one that does not": (prompts_of(60), {"max_new_tokens": 40}, OFTEN),
}


@pytest.mark.parametrize("name", EDGES)
def test_odd_prompts_have_the_responses_of_fixed_groups(name):
    prompts, settings, stops = EDGES[name]
    policy, config = policy_of("mistral"), SamplingConfig(**{"rows": 4, "max_new_tokens": 16} | settings)
    found = refilled(policy, prompts, config, stop_ids=stops)
    assert found == by_groups(policy, prompts, config, stop_ids=stops)
    if config.max_new_tokens > 2 and stops:
        assert len({len(tokens) for tokens, _, _ in found}) > 1


# Ranks


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("ranks", [2, 3, 7, 120])
def test_responses_are_the_same_on_ranks_with_uneven_numbers_of_prompts(ranks, samples):
    """A rank may begin amid the samples of a prompt, and have no prompt at all."""
    policy, prompts = policy_of(), prompts_of(100 // samples, samples)
    config = SamplingConfig(rows=16, max_new_tokens=12)
    shares = [prompts.of_rank(rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == (1 if 100 % ranks == 0 else 2)
    together: Responses = []
    for share in shares:
        together += refilled(policy, share, config)
    assert together == refilled(policy, prompts, config)


# Experts


def experts(name: str, family: str) -> tuple[Responses, list[Responses]]:
    """Responses of fixed groups, and with refilled rows of several numbers; name: of transformers' way to compute."""
    policy, prompts = policy_of(family), prompts_of(20, 2)
    policy.model.set_experts_implementation(name)
    config = [SamplingConfig(rows=rows, max_new_tokens=16) for rows in (64, 4, 16)]
    return by_groups(policy, prompts, config[0]), [refilled(policy, prompts, each) for each in config]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_with_experts_tokens_are_the_same_and_logprobs_up_to_rounding(family):
    """How many rows an expert's product has is decided by all tokens of a step; nothing else is shared by the rows."""
    expected, found = experts("grouped_mm", family)  # transformers' choice
    for responses in found:
        for (tokens, logprobs, ended), (others, theirs, end) in zip(responses, expected, strict=True):
            assert (tokens, ended) == (others, end)
            assert logprobs == pytest.approx(theirs, abs=5e-6)
    expected, found = experts("batched_mm", family)  # a product a token
    assert found == [expected] * 3


def test_with_experts_the_same_rows_give_the_same_responses_bit_for_bit():
    """So that a run that resumes is the same."""
    policy, prompts, config = policy_of("mixtral"), prompts_of(20, 2), SamplingConfig(rows=4, max_new_tokens=16)
    one, other = (sample(policy, prompts, config, stop_ids=STOPS, seed=SEED) for _ in range(2))
    assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.packed.tokens, other.packed.tokens)
