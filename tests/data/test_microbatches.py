from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastppo.data.microbatches import Minibatch, imbalance, pack_even, plan_epochs, work
from fastppo.models.roles import attention_ratio

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
ATTENTION = st.sampled_from([0.0, 0.01, 1.0])


@settings(deadline=None)
@given(LENGTHS, st.integers(50, 120), st.integers(1, 4), ATTENTION)
def test_every_sequence_is_in_one_microbatch_within_the_budget_and_ranks_have_as_many(
    lengths, budget, ranks, attention
):
    lengths = torch.tensor(lengths * ranks)  # as many sequences as ranks divide
    parts = pack_even(torch.randperm(len(lengths)), lengths, budget, ranks, attention)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    assert all(0 < int(lengths[p].sum()) <= budget for p in parts)
    shares = [Minibatch(parts).of_group(rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(torch.cat([p for share in shares for p in share]).tolist()) == list(range(len(lengths)))


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 4), ATTENTION)
def test_no_rank_has_more_than_the_mean_and_one_sequence_where_the_budget_does_not_bind(lengths, ranks, attention):
    """Graham's bound: when the fullest got its last sequence it was the emptiest, so at most at the mean."""
    lengths = torch.tensor(lengths * ranks)
    parts = pack_even(torch.arange(len(lengths)), lengths, 10_000, ranks, attention)
    costs = work(lengths, attention)
    loads = [float(costs[p].sum()) for p in parts]
    mean = sum(loads) / ranks
    assert len(parts) == ranks and max(loads) <= mean + float(costs.max()) * (1 + 1e-9)
    found = imbalance([[Minibatch(parts)]], lengths, ranks, attention)
    assert found == pytest.approx(max(loads) / mean) and 1 - 1e-9 <= found <= 1 + float(costs.max()) / mean + 1e-9


@settings(deadline=None)
@given(LENGTHS, st.integers(50, 120), st.integers(2, 4), ATTENTION)
def test_what_is_computed_side_by_side_is_alike(lengths, budget, ranks, attention):
    """No microbatch of a round has less work than one of a later round."""
    lengths = torch.tensor(lengths * ranks)
    parts = pack_even(torch.arange(len(lengths)), lengths, budget, ranks, attention)
    loads = [float(work(lengths[p], attention).sum()) for p in parts]
    rounds = [loads[i : i + ranks] for i in range(0, len(loads), ranks)]
    assert all(min(now) >= max(later) - 1e-6 for now, later in pairwise(rounds))


def test_long_sequences_weigh_more_than_their_tokens():
    """Eight tokens in one sequence look back four times as far as in four of two."""
    lengths = torch.tensor([8, 2, 2, 2, 2, 2, 2, 2])
    assert work(lengths[:2], 0.5).tolist() == [8 + 32, 2 + 2]
    by_tokens = [lengths[p].tolist() for p in pack_even(torch.arange(8), lengths, 100, 2)]
    by_work = [lengths[p].tolist() for p in pack_even(torch.arange(8), lengths, 100, 2, attention=0.5)]
    assert by_tokens == [[8, 2, 2], [2] * 5]
    assert by_work == [[8], [2] * 7]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_ratio_of_attention_to_weights_is_that_of_the_counted_flops(family):
    """FLOPs of a forward pass as torch counts them; plain attention computes the whole square, of which half counts."""
    model = tiny.causal(family, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.arange(100)[None], use_cache=False)
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = flops.pop("aten.bmm") / 2
    tokens = work(torch.tensor([100]), attention_ratio(model)) / 100
    assert 1 + attention / sum(flops.values()) == pytest.approx(float(tokens), rel=0.02)


def test_imbalance_is_what_the_slowest_rank_of_each_round_takes():
    lengths = torch.tensor([6, 4, 1, 3])
    plan = [[Minibatch(tuple(torch.tensor([i]) for i in range(4)))]]  # rounds (6, 4) and (1, 3)
    assert imbalance(plan, lengths, 2, 0.0) == pytest.approx((6 + 3) / (14 / 2))
    assert imbalance(plan, lengths, 1, 0.0) == pytest.approx(1.0)


def test_tokens_are_spread_evenly():
    lengths = torch.tensor([100, 90, 50, 40, 30, 30, 20, 10, 10, 10, 5, 5])
    loads = [int(lengths[p].sum()) for p in pack_even(torch.arange(12), lengths, budget=210, ranks=2)]
    assert len(loads) == 2 and max(loads) - min(loads) <= 10


def test_sequences_of_equal_length_stand_together():
    lengths = torch.tensor([3, 9, 3, 9, 5, 3])
    (part,) = pack_even(torch.arange(6), lengths, budget=100, ranks=1)
    assert lengths[part].tolist() == [9, 9, 5, 3, 3, 3]


def test_a_sequence_over_the_budget_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match=r"200 tokens does not fit into ppo.microbatch_tokens = 100"):
        pack_even(torch.arange(2), torch.tensor([200, 5]), 100, 1)


def plan(seed=0, ranks=1, budget=64, **changes):
    lengths = torch.randint(4, 20, (24,), generator=torch.Generator().manual_seed(5))
    arguments = {"epochs": 3, "minibatches": 4, "budget": budget, "ranks": ranks} | changes
    return plan_epochs(lengths, **arguments, generator=torch.Generator().manual_seed(seed))


def members(minibatch):
    return sorted(torch.cat(minibatch.microbatches).tolist())


def test_each_epoch_visits_every_sequence_once_in_a_new_order():
    epochs = plan()
    for minibatches in epochs:
        assert sorted(i for m in minibatches for i in members(m)) == list(range(24))
        assert [len(members(m)) for m in minibatches] == [6, 6, 6, 6]
    assert members(epochs[0][0]) != members(epochs[1][0])


def test_minibatches_do_not_depend_on_ranks_or_budget():
    for other in (plan(ranks=2), plan(budget=20), plan(ranks=3, budget=1000)):
        assert [[members(m) for m in e] for e in other] == [[members(m) for m in e] for e in plan()]


def test_the_same_seed_makes_the_same_plan():
    first, second = plan(seed=3), plan(seed=3)
    assert all(
        torch.equal(a, b)
        for e, f in zip(first, second, strict=True)
        for m, n in zip(e, f, strict=True)
        for a, b in zip(m.microbatches, n.microbatches, strict=True)
    )


def test_ranks_take_as_many_microbatches_each():
    for minibatch in plan(ranks=2, budget=40)[0]:
        assert len(minibatch.of_group(0, 2)) == len(minibatch.of_group(1, 2))
