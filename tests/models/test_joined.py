"""Projections that read the same states are one product where their weights are neighbours; nothing else changes."""

import logging

import pytest
import tiny
import torch
from torch import nn

from fastppo.config import SamplingConfig
from fastppo.data import pack
from fastppo.data.batch import Prompts
from fastppo.errors import log_once
from fastppo.models import SamplingWeights, joined_projections
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout.inprocess import sample

TEXT = pack([tuple(range(5, 25)), tuple(range(30, 37))], [1, 1])


def policy(family="llama", **settings):
    return Policy(fuse_head(tiny.causal(family, **settings)))


def flattened(policy):
    """The policy with its parameters one after another in one buffer, as DeepSpeed has those that it trains."""
    weights = list(policy.parameters())
    flat = torch.cat([p.detach().flatten() for p in weights])
    for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        p.data = part.view(p.shape)
    return policy


class Products:
    """Names of the linear modules that compute on their own, and the widths of the products of `F.linear`."""

    def __init__(self, monkeypatch):
        self.widths = []
        plain = nn.functional.linear

        def linear(states, weight, bias=None):
            self.widths.append(weight.shape[0])
            return plain(states, weight, bias)

        monkeypatch.setattr(nn.functional, "linear", linear)

    def of(self, run):
        self.widths.clear()
        run()
        return list(self.widths)


@torch.no_grad()
def products_of_a_pass(actor, monkeypatch):
    products = Products(monkeypatch)
    apart = products.of(lambda: actor.hidden(TEXT))
    with joined_projections(actor):
        together = products.of(lambda: actor.hidden(TEXT))
    assert products.of(lambda: actor.hidden(TEXT)) == apart  # afterwards all is as before
    return len(apart) / tiny.LAYERS, len(together) / tiny.LAYERS


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_seven_products_of_a_layer_are_four_where_weights_are_neighbours(family, monkeypatch):
    assert products_of_a_pass(flattened(policy(family)), monkeypatch) == (7, 4)


def test_weights_that_are_apart_and_have_biases_stay_products_of_their_own(monkeypatch):
    assert products_of_a_pass(policy("llama"), monkeypatch) == (7, 7)
    # Qwen2 has biases at queries, keys and values: gate and up alone are joined.
    assert products_of_a_pass(flattened(policy("qwen2")), monkeypatch) == (7, 6)


def test_weights_that_have_moved_apart_are_noticed(monkeypatch):
    actor = flattened(policy("llama"))
    assert products_of_a_pass(actor, monkeypatch) == (7, 4)
    for layer in actor.model.model.layers:
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.detach().clone()
    assert products_of_a_pass(actor, monkeypatch) == (7, 6)  # gate and up


def test_a_joined_projection_reads_the_weights_as_they_are_now():
    actor = flattened(policy())
    layer = actor.model.model.layers[0].self_attn
    states = torch.randn(6, tiny.WIDTH)
    with torch.no_grad(), joined_projections(actor):
        before = [m(states).clone() for m in (layer.q_proj, layer.k_proj, layer.v_proj)]
        layer.k_proj.weight.mul_(2.0)
        after = [m(states.clone()) for m in (layer.q_proj, layer.k_proj, layer.v_proj)]
        again = [m(states) for m in (layer.v_proj, layer.v_proj, layer.q_proj)]
    torch.testing.assert_close(after[1], 2 * before[1])
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(again[0], before[2])
    torch.testing.assert_close(again[1], before[2])


PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), (23, 24, 25)]


def drawn(actor, chosen=range(5), first=0, **settings):
    config = SamplingConfig(**{"max_new_tokens": 12} | settings)
    rollout = sample(actor, Prompts.of(PROMPTS, list(chosen), first=first), config, stop_ids=(), seed=3)
    tokens = [part.tolist() for part in rollout.packed.responses.split(rollout.packed.response_lengths.tolist())]
    return tokens, rollout.logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_joined_sampling_draws_the_same_and_a_response_does_not_depend_on_its_neighbours(dtype, caplog):
    log_once.cache_clear()
    apart = drawn(policy(dtype=dtype))
    with caplog.at_level(logging.INFO, logger="fastppo"):
        actor = flattened(policy(dtype=dtype))
        tokens, logprobs = drawn(actor)
    assert f"{5 * tiny.LAYERS} projections are computed as {2 * tiny.LAYERS} products" in caplog.text
    assert tokens == apart[0]
    torch.testing.assert_close(logprobs, apart[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert [drawn(actor, [row], first=row)[0][0] for row in range(5)] == tokens
    assert drawn(actor, rows=2)[0] == tokens


def test_the_copy_that_is_gathered_has_each_layer_in_one_storage(monkeypatch):
    actor = policy("llama")
    weights = SamplingWeights(actor, 3)
    assert not any(p.untyped_storage().nbytes() for p in weights.states())
    copy = weights.gather()
    assert products_of_a_pass(copy, monkeypatch) == (7, 4)
    for (name, source), (other, p) in zip(actor.named_parameters(), copy.named_parameters(), strict=True):
        assert name == other and torch.equal(source, p) and p.data_ptr() % 16 == 0
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in copy.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in copy.parameters())
    assert len(held) < len(list(copy.parameters()))
