"""The kernels of passes, against FLOP and bytes counted by hand for a model small enough to do so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from fastppo.config import Config, LoraConfig, PPOConfig
from fastppo.models.loading.trained import set_trainable
from fastppo.models.lora import add_adapters
from fastppo.models.roles import Policy, fuse_head
from fastppo.planner.footprint import Footprint
from fastppo.planner.time.passes import Passes, head_asks, head_learns, value_work

H, INNER, HEADS, KV, W, V, LAYERS = 32, 64, 4, 2, 8, 257, 3
LAYER = 2 * (H * HEADS * W + 2 * H * KV * W + HEADS * W * H + 3 * H * INNER)  # FLOP of the products of a token
N, L = 3, 20  # sequences of a pass, tokens of each
ATTENTION = 2 * N * L * L * HEADS * W  # of a layer


def on_meta(family="llama", **settings):
    with torch.device("meta"):
        model = tiny.causal(family, **settings)
    return Policy(fuse_head(model))


def size_of(train="all", lora=0, family="llama", **settings):
    policy = on_meta(family, **settings)
    set_trainable(policy, train)
    if lora:
        add_adapters(policy.model, "actor", LoraConfig(rank=lora), seed=0, source="")
    return Footprint(policy, torch.float32, cpu=False)


def test_a_pass_forward_takes_two_flop_for_each_weight_and_token_and_half_of_all_pairs_in_attention():
    work = Passes(size_of()).forward(N, L)
    assert work.flops("products") == LAYERS * LAYER * N * L
    assert work.flops("attention") == LAYERS * ATTENTION


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_layers_beyond_three_are_the_same_again(depth):
    work = Passes(size_of(num_hidden_layers=depth)).forward(N, L)
    assert work.flops("products") == pytest.approx(depth * LAYER * N * L)
    assert work.flops("attention") == pytest.approx(depth * ATTENTION)


def test_a_backward_pass_takes_twice_the_products_and_two_and_a_half_times_the_attention():
    work = Passes(size_of()).learn(N, L, kept=False, recomputed=0)
    assert work.flops("products") == 3 * LAYERS * LAYER * N * L
    assert work.flops("attention") == 3.5 * LAYERS * ATTENTION


def test_recomputed_layers_are_computed_forward_once_more():
    passes = Passes(size_of())
    more = passes.learn(N, L, kept=False, recomputed=2) - passes.learn(N, L, kept=False, recomputed=0)
    assert more.flops("products") == pytest.approx(2 * LAYER * N * L)


@pytest.mark.parametrize(("kept", "below"), [(True, 0), (False, 2)])
def test_frozen_lower_layers_have_no_backward_pass_and_none_forward_where_their_outputs_are_kept(kept, below):
    work = Passes(size_of(train=1)).learn(N, L, kept=kept, recomputed=0)
    assert work.flops("products") == pytest.approx((3 + below) * LAYER * N * L)


def test_with_adapters_no_gradient_of_the_frozen_weights_is_computed():
    passes = Passes(size_of(lora=2))
    forward, both = (
        passes.forward(N, L).flops("products"),
        passes.learn(N, L, kept=False, recomputed=0).flops("products"),
    )
    adapters = forward - LAYERS * LAYER * N * L
    assert adapters > 0
    # Forward, twice backward in adapters and once in what is frozen; the lowest layer's input needs no gradient.
    assert 2 * LAYERS * LAYER * N * L * 0.85 < both - 3 * adapters < 2 * LAYERS * LAYER * N * L


def test_windows_of_every_other_layer_are_counted():
    window, found = 6, Passes(size_of(family="gemma2", num_hidden_layers=4)).forward(N, L).flops("attention")
    inside = 4 * N * window * (L - window / 2) * HEADS * W
    assert found == pytest.approx(2 * ATTENTION + 2 * inside)


def test_on_a_cpu_short_sequences_are_plain_products():
    work = Passes(Footprint(on_meta(), torch.float32, cpu=True)).forward(N, L)
    assert work.flops("attention") == 0
    assert work.flops("products") == LAYERS * (LAYER * N * L + 2 * ATTENTION)  # all pairs


def test_the_head_reads_the_tokens_it_is_given_and_its_gradient_takes_two_more_products():
    size, product = size_of(), 2 * 50 * H * V
    assert head_asks(size, 50).flops() == product
    assert head_asks(size, 50, reference=True).flops() == 2 * product
    assert head_learns(size, 50, PPOConfig()).flops() == 3 * product
    assert head_learns(size, 50, None).flops() == 4 * product  # logits once more in the backward pass
    assert head_learns(size, 50, PPOConfig(loss="gspo")).flops() == 4 * product
    assert head_learns(size_of(train=1, tie_word_embeddings=True), 50, PPOConfig()).flops() == 2 * product


def test_a_value_head_is_a_product_with_one_column():
    assert value_work(size_of(), 50, gradient=False).flops() == 2 * 50 * H


def test_a_prompt_is_computed_once_for_all_its_samples_and_a_step_reads_every_weight_and_the_cache():
    config = replace(Config(), sampling=replace(Config().sampling, rows=8, samples_per_prompt=4))
    prompt, new, rows = 16, 10, 8
    found = Passes(size_of()).sampler(config, rows, 8, prompt, new)
    head = 2 * rows * H * V
    assert found.prefill.flops("products") == pytest.approx(LAYERS * LAYER * 2 * prompt + head)
    assert found.step.flops("products") == pytest.approx(LAYERS * LAYER * rows + head)
    cached, row = prompt + new // 2, 2 * KV * W * 4
    assert found.step.moved("attention") == pytest.approx(LAYERS * rows * (cached * row + 2 * (HEADS + KV) * W * 4))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_sequences_divide_products_and_attention(ranks):
    size = size_of()
    whole, part = (Passes(size, sequence=n).learn(N, L, kept=False, recomputed=0) for n in (1, ranks))
    for kind in ("products", "attention"):
        assert part.flops(kind) == pytest.approx(whole.flops(kind) / ranks)
