"""Decode steps as CUDA graphs: what is recorded, what a replay reads, and that sampling does not change by it.

Without a GPU a stand-in records: it runs the step again at each replay, into the tensor of the first run.
"""

import logging

import pytest
import tiny
import torch
from flash_stand_in import FlashStandIn

from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.errors import log_once
from fastppo.models import attention
from fastppo.models.attention import compute_with, decodes_without_sync
from fastppo.models.flash import FlashAttention, choose_flash
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout import graphs
from fastppo.rollout.inprocess import sample

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), *[(i, i + 1) for i in range(12)]]


def responses(actor, **settings):
    prompts = Prompts.of(PROMPTS, range(len(PROMPTS)))
    config = SamplingConfig(**{"max_new_tokens": 20, "rows": 16} | settings)
    return sample(actor, prompts, config, stop_ids=range(0, 257, 6), seed=3)


@pytest.fixture
def reads():
    """Attention by flash-attn's stand-in; for each decode step and layer, its rows and where their lengths lie."""
    stand_in, seen = FlashStandIn(), []

    def with_kvcache(*args, cache_seqlens, cache_batch_idx, **kwargs):
        seen.append((len(cache_seqlens), cache_seqlens.data_ptr(), cache_batch_idx.data_ptr()))
        return stand_in.flash_attn_with_kvcache(
            *args, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, **kwargs
        )

    compute_with(FlashAttention(stand_in.flash_attn_varlen_func, with_kvcache))
    yield seen
    compute_with(None)


@pytest.fixture
def recorded(monkeypatch):
    """Rows of each step that the stand-in has recorded."""
    rows = []

    def record(run):
        out = run()
        rows.append(len(out))
        return lambda: out.copy_(run())

    monkeypatch.setattr(attention, "decodes_without_sync", lambda model: True)
    monkeypatch.setattr(graphs, "record", record)
    return rows


@pytest.fixture
def actor():
    return Policy(fuse_head(tiny.causal(dtype=torch.bfloat16)))


@pytest.mark.parametrize("rows", [16, 8])  # of 16 prompts; 8 are refilled
def test_sampling_is_the_same_and_each_number_of_rows_is_recorded_once(actor, reads, recorded, rows):
    found = responses(actor, rows=rows)
    assert recorded == sorted(set(recorded), reverse=True) and len(recorded) == rows // 8 + 1  # rows left the batch
    plain = responses(actor, cuda_graphs=False)
    assert len(set(found.packed.response_lengths.tolist())) > 3
    assert torch.equal(found.packed.tokens, plain.packed.tokens) and torch.equal(found.logprobs, plain.logprobs)


@pytest.mark.parametrize("rows", [16, 8])
def test_every_replay_reads_the_tensors_that_were_recorded(actor, reads, recorded, rows):
    responses(actor, rows=rows)
    places = {rows: {read for read in reads if read[0] == rows} for rows in recorded}
    assert all(len(found) == 1 for found in places.values())
    assert len(reads) > 2 * tiny.LAYERS * len(recorded)  # they were replayed


def test_a_step_that_cannot_be_recorded_is_launched_kernel_by_kernel_and_the_log_says_so(
    actor, reads, recorded, monkeypatch, caplog
):
    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "record", record)
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastppo"):
        found = responses(actor)
    assert torch.equal(found.packed.tokens, responses(actor, cuda_graphs=False).packed.tokens)
    assert [r.getMessage().partition("(")[2] for r in caplog.records] == [
        "operation not permitted when stream is capturing)"
    ]


def test_without_flash_attn_on_a_gpu_nothing_is_recorded(actor, reads):
    assert not decodes_without_sync(actor.model)  # on the CPU
    compute_with(None)
    assert not decodes_without_sync(actor.model)


@pytest.mark.gpu
def test_on_a_gpu_sampling_is_the_same(actor):
    if choose_flash("auto", torch.bfloat16, torch.device("cuda")) is None:
        pytest.skip("needs flash-attn")
    actor = actor.to("cuda")
    compute_with(choose_flash("flash", torch.bfloat16, torch.device("cuda")))
    try:
        found, plain = responses(actor), responses(actor, cuda_graphs=False)
    finally:
        compute_with(None)
    assert torch.equal(found.packed.tokens, plain.packed.tokens)
