"""The memory of ranks that split packed rows, and what the plan makes of it."""

import pytest
import tiny
import torch

from fastppo.config import OptimConfig
from fastppo.models.roles import Policy, fuse_head
from fastppo.planner.batch import Batch
from fastppo.planner.footprint import Footprint
from fastppo.planner.memory import Role, asking_needs, learning_needs


@pytest.fixture(scope="module")
def role():
    with torch.device("meta"):
        model = tiny.causal(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    size = Footprint(Policy(fuse_head(model)), torch.float32, cpu=True)
    return Role("actor", size, True, size.parameters)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_a_rank_needs_for_a_microbatch_falls_with_the_ranks_that_split_it(role, ranks):
    whole, part = (Batch(3, 200, 3 * 150, split=split) for split in (1, ranks))
    optim = OptimConfig(activation_checkpointing=False)
    kept = [role.size.passes(3, 200, gradient=True, split=split).kept for split in (1, ranks)]
    assert kept[1] * ranks == pytest.approx(kept[0], rel=0.15)
    for needs in (
        lambda batch: learning_needs(role, batch, optim, head=True).total,
        lambda batch: asking_needs(role, batch, head=True).total,
    ):  # with what is not split: the gradient of the head's weight, and buffers of the exchange beside its result
        assert needs(whole) / ranks <= needs(part) < 1.35 * needs(whole) / ranks


def test_fewer_key_heads_than_ranks_cost_their_repetition(role):
    alone, split = (role.size.passes(2, 200, gradient=True, split=ranks).kept for ranks in (1, 8))
    assert 1.02 * alone / 8 < split < 1.2 * alone / 8  # two copies of each
