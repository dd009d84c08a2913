"""Decode steps as CUDA graphs: what is recorded, what a replay reads, and that sampling does not change by it.

Without a GPU a stand-in records: it runs the step again at each replay, into the tensor of the first run.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import COMPILED
from flash_stand_in import FlashStandIn
from torch import Tensor
from varlen_stand_in import VarlenStandIn

from fastppo.config import SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.errors import FastPPOError, log_once
from fastppo.models import attention
from fastppo.models.attention import compute_with, decodes_without_sync
from fastppo.models.backends.flash import FlashAttention
from fastppo.models.backends.varlen import VarlenAttention
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout import graphs
from fastppo.rollout.inprocess import sample

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), *[(i, i + 1) for i in range(12)]]


def responses(actor, **settings):
    prompts = Prompts.of(PROMPTS, range(len(PROMPTS)))
    config = SamplingConfig(**{"max_new_tokens": 20, "rows": 16} | settings)
    return sample(actor, prompts, config, stop_ids=range(0, 257, 6), seed=3)


def of_flash(seen: list[tuple[int, ...]]) -> FlashAttention:
    stand_in = FlashStandIn()

    def with_kvcache(*args: Any, cache_seqlens: Tensor, cache_batch_idx: Tensor, **kwargs: Any) -> Tensor:
        seen.append((len(cache_seqlens), cache_seqlens.data_ptr(), cache_batch_idx.data_ptr()))
        return stand_in.flash_attn_with_kvcache(
            *args, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, **kwargs
        )

    return FlashAttention(stand_in.flash_attn_varlen_func, with_kvcache)


def of_varlen(seen: list[tuple[int, ...]]) -> VarlenAttention:
    stand_in = VarlenStandIn()

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if (used := kwargs.get("seqused_k")) is not None:
            seen.append((len(used), used.data_ptr(), starts_q.data_ptr(), starts_k.data_ptr()))
        return stand_in.varlen_attn(q, k, v, starts_q, starts_k, *args, **kwargs)

    return VarlenAttention(varlen_attn)


@pytest.fixture(params=[of_flash, of_varlen])
def reads(request):
    """Attention by a stand-in; for each decode step and layer, its rows and where their lengths and places lie."""
    seen = []
    compute_with(request.param(seen))
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


def test_steps_are_recorded_on_cuda_alone_whatever_computes_attention(actor, reads):
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    assert decodes_without_sync(on_cuda) and not decodes_without_sync(actor.model)
    compute_with(None)
    assert decodes_without_sync(on_cuda) and not decodes_without_sync(actor.model)


@COMPILED
def test_the_kernels_of_a_gpu_draw_the_tokens_of_the_cpu_s(request):
    policy = Policy(fuse_head(tiny.causal("gemma2")))  # a soft cap, and a window in every second layer
    prompts, config = Prompts.of(PROMPTS[:3], range(3)), SamplingConfig(max_new_tokens=6, rows=4)
    expected = sample(policy, prompts, config, stop_ids=(), seed=3)
    request.getfixturevalue("triton_on_cpu")
    found = sample(policy, prompts, config, stop_ids=(), seed=3)
    assert torch.equal(found.packed.tokens, expected.packed.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["flash", "varlen"])
@pytest.mark.parametrize("rows", [16, 8])
def test_on_a_gpu_sampling_is_the_same(actor, setting, rows):
    try:
        attention.choose_attention(setting, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    except FastPPOError as error:
        pytest.skip(str(error))
    try:
        actor = actor.to("cuda")
        assert decodes_without_sync(actor.model)
        found, plain = responses(actor, rows=rows), responses(actor, rows=rows, cuda_graphs=False)
    finally:
        compute_with(None)
    assert torch.equal(found.packed.tokens, plain.packed.tokens)
