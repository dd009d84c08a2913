"""How a head's rows are divided, what that may not change, and what is moved and held for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LinearCase, assert_as_good, in_fp64
from hypothesis import given
from hypothesis import strategies as st
from test_ops import names, policy_update
from torch import Tensor

from fastppo import ops
from fastppo.ops import chunked_head, eager
from fastppo.ops.chunked_head import Blocks, blocks, divided

ROOT = Path(__file__).parents[2]
TOKENS, VOCABULARY, WIDTH = 63, 127, 64
INPUTS = ["hidden", "weight", "bias"]


@given(tokens=st.integers(0, 20_000), most=st.integers(1, 5_000))
def test_parts_are_few_and_of_nearly_equal_size(tokens, most):
    parts = divided(tokens, most)
    sizes = [part.stop - part.start for part in parts]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert sum(sizes) == tokens and len(parts) == -(-tokens // most)
    if tokens:
        assert max(sizes) <= most and min(sizes) >= max(sizes) - max(1, most // 4)


def test_parts_meet_at_the_tiles_of_a_product_where_there_is_room():
    assert [part.stop for part in divided(4_100, 2_093)] == [2_048, 4_100]
    assert [part.stop for part in divided(4_186, 2_093)] == [2_093, 4_186]
    assert [part.stop for part in divided(2_094, 2_093)] == [1_024, 2_094]
    assert [part.stop for part in divided(10, 3)] == [2, 5, 7, 10]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("workspace", [32 << 20, 1 << 30])
@pytest.mark.parametrize("tokens", [0, 1, 4_096, 8_192, 50_000])
@pytest.mark.parametrize(("vocabulary", "width"), [(32_000, 64), (49_152, 576), (128_256, 4_096)])
def test_one_chunk_never_takes_more_memory_than_several_and_their_sum(vocabulary, width, tokens, workspace, size):
    row = vocabulary * size
    summed, frozen = (blocks(tokens, vocabulary, width, size, workspace, summed=x) for x in (True, False))
    assert summed.rows == frozen.rows  # or the policy that sampled would have other logits than the one that learns
    assert 2 * frozen.largest * row <= workspace and frozen.chunk == frozen.largest
    in_fp32 = 4 * vocabulary * width
    assert summed.chunk * row + in_fp32 * (not summed.one_chunk) <= frozen.largest * row + in_fp32


def test_an_8b_llama_s_head_is_one_chunk_up_to_8192_tokens():
    def of(tokens: int) -> Blocks:
        return blocks(tokens, 128_256, 4_096, 2, ops.workspace_bytes(cpu=False), summed=True)

    assert (len(of(4_096).rows), of(4_096).one_chunk, of(4_096).chunk) == (2, True, 4_096)
    assert of(8_192).one_chunk and not of(16_384).one_chunk


def workspace_for(rows: int, dtype: torch.dtype) -> int:
    """Bytes with which a block has so many rows."""
    return 2 * rows * dtype.itemsize * chunked_head.stride(VOCABULARY, dtype.itemsize)


def case(width: int = WIDTH, reference: str | None = None) -> LinearCase:
    return LinearCase("blocks", TOKENS, VOCABULARY, width, 0.7, bias=True, reference=reference, mask="some")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("width", [WIDTH, 8])
@pytest.mark.parametrize("rows", [TOKENS, 20, 7])
def test_the_gradients_are_as_good_however_the_rows_are_divided(monkeypatch, rows, width, dtype):
    """bf16 with width 64 is one chunk, all else with several blocks several."""
    monkeypatch.setattr(ops, "WORKSPACE_BYTES", workspace_for(rows, dtype))
    summed = dtype == torch.bfloat16
    parts = blocks(TOKENS, VOCABULARY, width, dtype.itemsize, ops.WORKSPACE_BYTES, summed=summed)
    assert len(parts.rows) == -(-TOKENS // rows) and parts.one_chunk == (rows == TOKENS or (summed and width == WIDTH))
    made = case(width)
    logprobs = eager.linear_logprobs(**in_fp64(made.build(dtype))).logprobs
    arguments = made.build_loss(dtype, logprobs)
    tested = policy_update(ops.linear_policy_loss, arguments, INPUTS)
    same_dtype = policy_update(eager.linear_policy_loss, arguments, INPUTS)
    assert_as_good(tested, same_dtype, policy_update(eager.linear_policy_loss, in_fp64(arguments), INPUTS), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("rows", [20, 7])
@pytest.mark.parametrize("against", [None, "own", "same weights"])
def test_a_chunk_of_several_blocks_has_ratio_one_bit_for_bit_and_no_kl(monkeypatch, against, rows, dtype):
    """The old logprobs come from a pass without gradients and reference, the loss has both."""
    monkeypatch.setattr(ops, "WORKSPACE_BYTES", workspace_for(rows, dtype))
    arguments = case(reference="own" if against == "own" else None).build(dtype)
    policy = {name: x for name, x in arguments.items() if not name.startswith("ref_")}
    if against == "same weights":
        arguments |= {f"ref_{name}": arguments[name].clone() for name in INPUTS}
    with torch.no_grad():
        old = ops.linear_logprobs(**policy).logprobs
    leaves = {name: arguments[name].clone().requires_grad_() for name in INPUTS}
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": 63.0, "advantages": torch.ones(TOKENS)}
    options |= {"old_logprobs": old, "kl_coef": 0.0 if against is None else 0.5}
    _, stats = ops.linear_policy_loss(**arguments | leaves, **options)
    assert stats.ratio_max == 1 and stats.sums[3] == 0 and stats.sums[6] == TOKENS
    assert against != "same weights" or abs(stats.sums[2]) < 1e-9


def loss_and_leaves(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    arguments = case().build_loss(dtype, torch.full((TOKENS,), -5.0))
    leaves = {name: arguments[name].requires_grad_() for name in INPUTS}
    loss, _ = ops.linear_policy_loss(**arguments | leaves)
    return loss, list(leaves.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
def test_a_kept_graph_gives_its_gradients_again_and_again(backend, dtype):
    """They are handed out without a copy once nobody will ask again, and are scaled where they lie."""
    loss, leaves = loss_and_leaves(dtype)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    before = [g.clone() for g in expected]
    for turn in range(3):
        made = torch.autograd.grad(2.0 * loss, leaves, retain_graph=turn < 2)
        torch.testing.assert_close(list(made), [2 * g for g in before])
    assert all(torch.equal(x, y) for x, y in zip(expected, before, strict=True))
    loss, leaves = loss_and_leaves(dtype)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, once in zip(leaves, before, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * once)


@pytest.mark.parametrize("factor", [1 / 3, 1e-4, 1000.0])
def test_a_factor_of_the_loss_is_not_rounded_to_the_gradient_s_dtype(factor):
    loss, leaves = loss_and_leaves(torch.bfloat16)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    for found, g in zip(torch.autograd.grad(factor * loss, leaves), plain, strict=True):
        assert torch.equal(found, (g.float() * factor).bfloat16())


def test_the_gradients_take_no_copy_when_the_loss_is_not_scaled():
    arguments = case().build_loss(torch.bfloat16, torch.full((TOKENS,), -5.0))
    weight = arguments["weight"].requires_grad_()
    loss, _ = ops.linear_policy_loss(**arguments)
    (saved,) = [x for x in loss.grad_fn.saved_tensors if x is not None and x.shape == weight.shape]
    where = saved.data_ptr()
    del saved
    (found,) = torch.autograd.grad(3.0 * loss, weight)
    assert found.data_ptr() == where


@pytest.mark.slow
def test_a_third_of_what_it_once_moved_is_moved_outside_of_the_products():
    """With d_weight summed over two chunks in fp32, cast and then multiplied by 1 it was 16.9 GB."""
    run = [sys.executable, "bench/head.py", "--bytes"]
    out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counted = json.loads(out.splitlines()[-1])
    assert counted["least"] <= counted["bytes"] <= 1.001 * counted["least"]
    assert 3 * counted["bytes"] <= 16_878_010_420
