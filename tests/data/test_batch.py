from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastppo.data.batch import Experience, Moments, Prompts, Rollout, concatenate
from fastppo.data.packed import Packed, cumulative, end_to_end, pack, pack_turns, segment_rows

PACKED = pack([(5, 6, 7, 8), (9, 10), (11, 12, 13)], [2, 1, 2])


def test_predictors_are_the_rows_before_each_response_token():
    assert PACKED.predictors.tolist() == [1, 2, 4, 6, 7]
    assert PACKED.responses.tolist() == [7, 8, 10, 12, 13]


def test_experience_is_data_alone():
    """What a checkpoint can hold as it is, and any rank would make the same."""
    types = get_type_hints(Experience)
    assert {types[field.name] for field in fields(Experience)} == {Packed, torch.Tensor, torch.Tensor | None, float}


def test_positions_restart_in_every_sequence():
    assert PACKED.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_last_rows_and_last_response_tokens_are_where_scores_belong():
    assert PACKED.last_rows.tolist() == [3, 5, 8]
    assert PACKED.last_response_tokens.tolist() == [1, 2, 4]


def test_selected_sequences_keep_their_tokens_and_their_order():
    part = PACKED.select(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [11, 12, 13, 5, 6, 7, 8]
    assert part.responses.tolist() == [12, 13, 7, 8]
    per_token = torch.arange(5.0)
    assert PACKED.select_tokens(per_token, torch.tensor([2, 0])).tolist() == [3, 4, 0, 1]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8), st.randoms())
def test_selecting_in_any_order_and_back_is_the_identity(shapes, random):
    sequences = [[random.randrange(100) for _ in range(p + r)] for p, r in shapes]
    packed = pack(sequences, [r for _, r in shapes])
    order = list(range(len(shapes)))
    random.shuffle(order)
    back = torch.tensor(order).argsort()
    again = packed.select(torch.tensor(order)).select(back)
    for name in ("tokens", "cu_seqlens", "response_cu_seqlens"):
        assert torch.equal(getattr(again, name), getattr(packed, name))


def test_no_sequences_make_empty_tensors():
    empty = pack([], [])
    assert len(empty) == 0 and empty.predictors.shape == empty.tokens.shape == (0,)


def test_cumulative_starts_at_zero_and_is_int32():
    starts = cumulative(torch.tensor([2, 3]))
    assert starts.tolist() == [0, 2, 5] and starts.dtype == torch.int32


def test_segment_rows_of_no_segments_are_none():
    assert segment_rows(torch.tensor([0, 2, 5]), torch.tensor([], dtype=torch.int64)).tolist() == []


def test_prompts_answered_twice_have_streams_of_their_own():
    prompts = Prompts.of([(1, 2), (3,)], [1, 0], first=10, samples=2)
    assert prompts.tokens == ((3,), (3,), (1, 2), (1, 2))
    assert prompts.streams.tolist() == [20, 21, 22, 23]
    assert prompts.sources.tolist() == [1, 1, 0, 0]


def test_ranks_take_consecutive_parts_of_the_prompts():
    prompts = Prompts.of([(i,) for i in range(5)], range(5))
    parts = [prompts.of_rank(rank, 2) for rank in range(2)]
    assert [t for part in parts for t in part.tokens] == list(prompts.tokens)


def test_rollouts_of_ranks_concatenate_to_the_whole():
    def rollout(packed: Packed, first: int) -> Rollout:
        b, m = len(packed), len(packed.responses)
        return Rollout(packed, torch.arange(m) + 0.5, torch.ones(b, dtype=torch.bool), torch.arange(b) + first)

    whole = concatenate([rollout(PACKED.select(torch.tensor(s)), s[0]) for s in ([0, 1], [2])])
    assert torch.equal(whole.packed.tokens, PACKED.tokens)
    assert torch.equal(whole.packed.response_cu_seqlens, PACKED.response_cu_seqlens)
    assert whole.sources.tolist() == [0, 1, 2]


def test_moments_of_parts_are_those_of_the_whole_where_sums_would_cancel():
    x = 1e6 + torch.randn(300, generator=torch.Generator().manual_seed(0))
    merged = Moments().add(x[:7]).add(x[7:260]).add(x[260:])
    assert merged.count == 300
    assert merged.mean == pytest.approx(float(x.double().mean()), rel=1e-12)
    assert merged.std == pytest.approx(float(x.double().std(correction=0)), rel=1e-9)


def test_batches_with_and_without_a_mask_are_one_with_a_mask():
    turns = pack_turns([(1, 2, 3, 4, 5)], [(False, True, False, True, True)])
    both = end_to_end([PACKED, turns])
    assert both.mask.tolist() == [False, False, True, True, False, True, False, True, True, *turns.mask.tolist()]
    assert both.responses.tolist() == [7, 8, 10, 12, 13, 2, 4, 5]
    assert end_to_end([PACKED, PACKED]).mask is None
