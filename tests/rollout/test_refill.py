"""Rows that end are refilled and prompts are computed once: less is computed, and the responses are the same.

The oracle is decoding in fixed groups: every prompt is computed for every sample, and no row is used twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heapreplace
from itertools import pairwise

import pytest
import tiny
import torch
from flash_stand_in import FlashStandIn
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_stand_in import VarlenStandIn

from fastppo import ops
from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.data.packed import segment_offsets
from fastppo.distributed import Stopped, stop
from fastppo.models.attention import compute_with
from fastppo.models.cache import Cache
from fastppo.models.roles import Policy, fuse_head
from fastppo.ops.eager import restrict
from fastppo.rollout.decoder import Decoder, bucket
from fastppo.rollout.decoding import FEWEST_TOKENS
from fastppo.rollout.inprocess import sample

Responses = list[tuple[list[int], list[float], bool]]

STOPS = range(0, 257, 23)
SEED = 7


def by_groups(policy: Policy, prompts: Prompts, config: SamplingConfig, stop_ids: Sequence[int] = STOPS) -> Responses:
    found: Responses = []
    with torch.no_grad():
        for start in range(0, len(prompts), config.rows):
            group = prompts.select(range(start, min(start + config.rows, len(prompts))))
            found += group_of(policy, group, config, torch.tensor(stop_ids, dtype=torch.int64))
    return found


def group_of(policy: Policy, group: Prompts, config: SamplingConfig, stop_ids: torch.Tensor) -> Responses:
    filled = [min(i, len(group) - 1) for i in range(bucket(len(group)))]
    tokens, rows = [group.tokens[i] for i in filled], torch.arange(len(filled))
    counts = torch.tensor([len(prompt) for prompt in tokens])
    text = policy.model.config.get_text_config()
    cache = Cache(text, len(filled), int(counts.max()) + config.max_new_tokens, policy.model.dtype, policy.device)
    cache.begin_prefill(counts.tolist(), rows.tolist())
    packed = torch.tensor([token for prompt in tokens for token in prompt])
    hidden = policy.prefill(packed, segment_offsets(counts), cache)[counts.cumsum(0) - 1]
    cache.begin_decode()
    drawn, said = [], []
    for position in range(config.max_new_tokens):
        logits = policy.head(hidden)
        if position < config.min_new_tokens:
            logits = logits.index_fill(1, stop_ids, float("-inf"))
        logits = restrict(logits, config.temperature, config.top_k, config.top_p)
        at, streams = torch.full_like(rows, position), group.streams[filled]
        newest, logprobs = ops.sample_tokens(
            logits, temperature=config.temperature, seed=SEED, stream=streams, offset=at
        )
        drawn, said = [*drawn, newest], [*said, logprobs]
        cache.begin_step(rows)
        if position + 1 < config.max_new_tokens:
            hidden = policy.step(newest, cache.lengths[rows], cache)
        cache.end_step()
    found = []
    for row in range(len(group)):
        response, logprobs = torch.stack(drawn)[:, row], torch.stack(said)[:, row]
        ends = torch.isin(response, stop_ids).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(response)
        found.append((response[:length].tolist(), logprobs[:length].tolist(), bool(ends)))
    return found


def refilled(policy: Policy, prompts: Prompts, config: SamplingConfig, stop_ids: Sequence[int] = STOPS) -> Responses:
    found = sample(policy, prompts, config, stop_ids=stop_ids, seed=SEED)
    lengths = found.packed.response_lengths.tolist()
    tokens, logprobs = (x.split(lengths) for x in (found.packed.responses, found.logprobs))
    return [(t.tolist(), p.tolist(), e) for t, p, e in zip(tokens, logprobs, found.ended.tolist(), strict=True)]


def prompts_of(count: int, samples: int = 1, shortest: int = 1, longest: int = 30) -> Prompts:
    """Prompts of mixed lengths; some follow on others of the same length, and some on equal ones."""
    random = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=random).tolist()
    for i in range(3, count, 7):
        lengths[i] = lengths[i - 1]
    tokens = [torch.randint(1, 257, (length,), generator=random).tolist() for length in lengths]
    for i in range(5, count, 11):
        tokens[i] = tokens[i - 1]
    return Prompts.of(tokens, range(count), first=3, samples=samples)


def list_schedule(lengths: Sequence[int], rows: int, unread: int = 1) -> int:
    """Decode steps where each response, in order, takes the row that is free first; the prefill gives its first token.

    A row is free when the host looks, after every `unread` steps. Graham, 1966.
    """
    free_at = [0] * rows
    for length in lengths:
        heapreplace(free_at, free_at[0] + -(-(length - 1) // unread) * unread)
    return max(free_at)


@pytest.fixture
def actor():
    return Policy(fuse_head(tiny.causal()))


@pytest.fixture
def calls(actor, monkeypatch):
    """(method, number of tokens) of each forward pass of the actor."""
    seen, step, prefill = [], actor.step, actor.prefill
    monkeypatch.setattr(actor, "step", lambda tokens, *rest: seen.append(("step", len(tokens))) or step(tokens, *rest))
    monkeypatch.setattr(
        actor, "prefill", lambda tokens, *rest: seen.append(("prefill", len(tokens))) or prefill(tokens, *rest)
    )
    return seen


@contextmanager
def attention_by(kind: type[FlashStandIn | VarlenStandIn] | None) -> Iterator[None]:
    """A backend's stand-in; None: PyTorch."""
    stand_in = kind() if kind else None
    compute_with(stand_in.backend() if stand_in else None)
    try:
        yield
    finally:
        compute_with(None)
    assert stand_in is None or stand_in.cached_calls


# The same responses

# In bf16 PyTorch has another kernel for up to 4,096 multiplications, that rounds differently. No product of this model
# is so small, neither of four rows nor, for prompts of nine tokens or more, in attention.
WIDE_ENOUGH = {"hidden_size": 64, "head_dim": 16}
PATHS = {
    "plain": ("llama", torch.float32, None),
    "bf16": ("llama", torch.bfloat16, None),
    "window": ("mistral", torch.float32, None),
    "window and soft cap": ("gemma2", torch.float32, None),
    "learned positions": ("gpt2", torch.float32, None),
    "flash-attn": ("mistral", torch.bfloat16, FlashStandIn),
    "flash-attn and soft cap": ("gemma2", torch.bfloat16, FlashStandIn),
    "varlen_attn": ("mistral", torch.bfloat16, VarlenStandIn),
}


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("path", PATHS)
def test_responses_are_those_of_fixed_groups_bit_for_bit_for_any_number_of_rows(path, samples):
    family, dtype, backend = PATHS[path]
    size = {} if dtype == torch.float32 else WIDE_ENOUGH
    policy = Policy(fuse_head(tiny.causal(family, dtype=dtype, **size)))
    count = 32 if backend else 64  # the stand-in is slow
    prompts = prompts_of(count // samples, samples, shortest=9 if size else 1)
    settings = {"max_new_tokens": 24, "min_new_tokens": 2, "top_p": 0.95, "temperature": 0.9}
    with attention_by(backend):
        expected = by_groups(policy, prompts, SamplingConfig(rows=64, **settings))
        for rows in (4, 24):
            assert refilled(policy, prompts, SamplingConfig(rows=rows, **settings)) == expected
    lengths = [len(tokens) for tokens, _, _ in expected]
    assert 3 <= min(lengths) <= 5 and max(lengths) == 24 and len(set(lengths)) > 8
    assert {ended for _, _, ended in expected} == {True, False}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_too_long_for_plain_products_give_the_same_responses_too(family):
    """PyTorch's fused attention, and beyond a window plain products."""
    policy, prompts = Policy(fuse_head(tiny.causal(family))), prompts_of(6, 3, shortest=129, longest=140)
    config = SamplingConfig(rows=4, max_new_tokens=12)
    assert refilled(policy, prompts, config) == by_groups(policy, prompts, config)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_fewer_prompts_than_rows_give_the_same_responses_too(actor, count):
    prompts, config = prompts_of(count), SamplingConfig(rows=64, max_new_tokens=40)
    assert refilled(actor, prompts, config) == by_groups(actor, prompts, config)


@pytest.mark.parametrize("samples", [1, 3])  # with three, others take the row of a prompt that has samples left
def test_where_all_rows_end_at_once_the_responses_are_the_same_too(actor, samples):
    prompts, config = prompts_of(11, samples), SamplingConfig(rows=4, max_new_tokens=9, min_new_tokens=3)
    found = refilled(actor, prompts, config, stop_ids=())
    assert found == by_groups(actor, prompts, config, stop_ids=())
    assert {(len(tokens), ended) for tokens, _, ended in found} == {(9, False)}


def test_responses_of_one_token_free_their_rows_without_a_decode_step(actor, calls):
    prompts, config = prompts_of(30), SamplingConfig(rows=4, max_new_tokens=9)
    found = refilled(actor, prompts, config, stop_ids=range(257))
    assert {(len(tokens), ended) for tokens, _, ended in found} == {(1, True)}
    assert {method for method, _ in calls} == {"prefill"}
    calls.clear()
    assert refilled(actor, prompts, SamplingConfig(rows=4, max_new_tokens=1), stop_ids=())[3][0] == [
        *by_groups(actor, prompts, SamplingConfig(rows=4, max_new_tokens=1), stop_ids=())[3][0]
    ]
    assert {method for method, _ in calls} == {"prefill"}


def test_no_prompts_compute_nothing(actor, calls):
    assert refilled(actor, prompts_of(0), SamplingConfig()) == [] == calls


# What is computed


@pytest.mark.parametrize("unread", [1, 8])  # where each kernel is launched on its own, and where steps are recorded
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("rows", [4, 16, 64])
def test_decode_steps_are_those_of_a_list_schedule(actor, calls, monkeypatch, rows, samples, unread):
    prompts = prompts_of(100 // samples, samples)
    config = SamplingConfig(rows=rows, max_new_tokens=48)
    monkeypatch.setattr(Decoder, "steps_unread", unread)
    found = refilled(actor, prompts, config)
    lengths = [len(tokens) for tokens, _, _ in found]
    steps = [count for method, count in calls if method == "step"]
    assert len(steps) == list_schedule(lengths, bucket(rows), unread)
    groups = [lengths[i : i + rows] for i in range(0, 100, rows)]
    assert len(steps) < sum(max(group) - 1 for group in groups) + unread - 1  # what fixed groups take


@pytest.mark.parametrize("unread", [2, 3, 8, 100])  # 100: longer than any response
@pytest.mark.parametrize("samples", [1, 3])
def test_when_the_host_looks_changes_no_response(actor, monkeypatch, samples, unread):
    prompts, config = prompts_of(30, samples), SamplingConfig(rows=8, max_new_tokens=21, min_new_tokens=1, top_p=0.9)
    expected = refilled(actor, prompts, config)
    monkeypatch.setattr(Decoder, "steps_unread", unread)
    assert refilled(actor, prompts, config) == expected
    assert len({len(tokens) for tokens, _, _ in expected}) > 8 and max(len(tokens) for tokens, _, _ in expected) == 21


def test_a_list_schedule_takes_the_longest_where_rows_suffice_and_the_mean_where_there_is_no_tail():
    assert list_schedule([3, 9, 1], rows=4) == 8
    assert list_schedule([5] * 12, rows=4) == 3 * 4
    assert list_schedule([9, 3, 3, 3, 3], rows=2) == 8
    assert list_schedule([9, 10, 1, 2], rows=1, unread=8) == 8 + 16 + 0 + 8


def test_rows_leave_the_batch_only_when_no_prompt_is_left(actor, calls):
    refilled(actor, prompts_of(60), SamplingConfig(rows=16, max_new_tokens=48))
    last_start = max(i for i, (method, _) in enumerate(calls) if method == "prefill")
    assert {count for method, count in calls[:last_start] if method == "step"} == {16}
    left = [count for method, count in calls[last_start:] if method == "step"]
    assert left == sorted(left, reverse=True) and {16, 8, 4} == set(left)


@pytest.mark.parametrize("samples", [1, 4, 8])
@pytest.mark.parametrize("rows", [4, 16])
def test_a_prompt_is_computed_once_for_all_its_samples(actor, calls, rows, samples):
    prompts = prompts_of(9, samples, shortest=FEWEST_TOKENS)
    refilled(actor, prompts, SamplingConfig(rows=rows, max_new_tokens=20))
    once = [tokens for i, tokens in enumerate(prompts.tokens) if i == 0 or tokens != prompts.tokens[i - 1]]
    assert sum(count for method, count in calls if method == "prefill") == sum(map(len, once))


def test_a_prefill_of_few_tokens_is_filled_up(actor, calls):
    """Products of fewer rows round differently on some numbers of threads."""
    refilled(actor, prompts_of(9, longest=7), SamplingConfig(rows=4, max_new_tokens=20))
    counts = [count for method, count in calls if method == "prefill"]
    assert len(counts) > 3 and FEWEST_TOKENS <= min(counts) < FEWEST_TOKENS + 7


def test_the_samples_of_a_prompt_get_its_keys_and_values_in_one_copy():
    cache = Cache(tiny.causal().config, 6, 9, torch.float32, torch.device("cpu"))
    before = [x.normal_().clone() for x in cache.states()]
    cache.lengths += 1
    with counted("index_copy_") as copies:
        cache.copy_row(2, [0, 2, 5], 4)
    assert copies == [2]  # keys and values
    assert cache.lengths.tolist() == [4, 1, 4, 1, 1, 4]
    for now, old in zip(cache.states(), before, strict=True):
        for row in range(6):
            assert torch.equal(now[:, row, :, 4:], old[:, row, :, 4:])
            assert torch.equal(now[:, row, :, :4], old[:, 2 if row in (0, 5) else row, :, :4])
    cache.copy_row(2, [1], 3)  # a row that is running gives its prompt to another, and goes on
    assert cache.lengths.tolist() == [4, 3, 4, 1, 1, 4]


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """How often an op of this name is called within the context."""
    calls = [0]

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[0] += function.overloadpacket.__name__ == name
            return function(*args, **kwargs or {})

    with Counting():
        yield calls


# Being asked to stop


def test_sampling_can_be_stopped_before_each_forward_pass(actor, calls, monkeypatch):
    passes = []

    def check() -> None:
        passes.append(len(calls))
        if len(passes) == 30:
            raise Stopped

    monkeypatch.setattr(stop, "check_alone", check)
    with pytest.raises(Stopped):
        refilled(actor, prompts_of(40), SamplingConfig(rows=4, max_new_tokens=20))
    assert len(passes) == 30 and all(after - before <= 1 for before, after in pairwise([*passes, len(calls)]))
    assert {method for method, _ in calls} == {"prefill", "step"}
