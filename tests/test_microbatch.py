import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.microbatch import pack_even, plan_epochs


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120), st.integers(1, 3))
def test_every_sequence_is_in_one_microbatch_within_the_budget(lengths, budget, ranks):
    lengths = torch.tensor(lengths * ranks)  # as many sequences as ranks divide
    sequences = torch.randperm(len(lengths))
    parts = pack_even(sequences, lengths, budget, ranks)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    assert all(0 < int(lengths[p].sum()) <= budget for p in parts)
    assert len(parts) % ranks == 0


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
        assert len(minibatch.of_rank(0, 2)) == len(minibatch.of_rank(1, 2))
