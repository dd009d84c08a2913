"""The memory of sampling with `rollout.partial_tokens`: two batches together, of which one has been begun."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from test_memory import _Live, _outline

from fastppo.config import Config, DataConfig, EvalConfig, PPOConfig, PPORolloutConfig, PPOSamplingConfig
from fastppo.data.batch import Begun, Prompts
from fastppo.models.roles import Policy, fuse_head
from fastppo.planner.batch import Batch
from fastppo.planner.footprint import Footprint
from fastppo.planner.memory import sampling_needs
from fastppo.rollout.inprocess import sample

PROMPT, NEW = 6, 30


def settings(rows: int, by: int | None) -> Config:
    return Config(
        ppo=PPOConfig(batch_size=24, minibatches=1),
        data=DataConfig(first_tokens=PROMPT),
        sampling=PPOSamplingConfig(rows=rows, max_new_tokens=NEW),
        rollout=PPORolloutConfig(partial_tokens=by),
        eval=EvalConfig(prompts=0),
    )


@pytest.mark.parametrize("rows", [4, 48])
def test_what_a_round_allocates_is_counted(tmp_path, rows):
    model = tiny.causal(vocab_size=1500)
    outline = Policy(_outline(tiny.saved(tmp_path, model), torch.float32))
    size, actor = Footprint(outline, torch.float32, cpu=True), Policy(fuse_head(model))
    config, before = settings(rows, 2), NEW - 2
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 257, (48, PROMPT), generator=random).tolist()
    written = torch.randint(1, 257, (24, before), generator=random)
    begun = [Begun(one, torch.ones(before, dtype=torch.bool), torch.zeros(before)) for one in written]
    prompts = replace(Prompts.of(tokens, range(48)), begun=(*begun, *[None] * 24), extend_by=2)
    live = _Live(*model.parameters(), *model.buffers())
    with live:
        rollout = sample(actor, prompts, config.sampling, stop_ids=(), seed=0)
    assert rollout.complete.tolist() == [True] * 24 + [False] * 24
    planned = sampling_needs(size, config, Batch.of(config, 1))
    assert 0.4 * planned.total < live.peak <= planned.total


def test_two_batches_are_sampled_together_and_one_is_learned_from():
    one, two = Batch.of(settings(64, None), 1), Batch.of(settings(64, 2), 1)
    assert (one.rows, two.rows) == (24, 48) and (one.continued, two.continued) == (0, PROMPT + NEW)
    assert (one.tokens, one.sequences, one.length) == (two.tokens, two.sequences, two.length)
