"""Frozen lower layers: computed once a batch, without changing a bit of what is learned."""

import pytest
import tiny
import torch
from ppo_step import config_of, step
from test_roles import PACKED

from fastppo.distributed.world import start_world
from fastppo.models import frozen_prefix, roles
from fastppo.models.loading.trained import set_trainable
from fastppo.models.roles import Policy, enable_prefix_states, fuse_head

ALL = torch.arange(len(PACKED))


def policy_of(family="llama", train=1, **settings):
    policy = Policy(fuse_head(tiny.causal(family, **settings)))
    set_trainable(policy, train)
    return policy


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_states_give_the_same_hidden_states_bit_for_bit(family):
    policy = policy_of(family)
    enable_prefix_states(policy)
    assert policy.prefix_depth == 2
    assert torch.equal(policy.hidden(PACKED, policy.prefix(PACKED)), policy.hidden(PACKED))


@pytest.mark.parametrize(
    ("train", "depth"),
    [("all", 0), (3, 0), (2, 1), (1, 2), ("*.layers.1.mlp.*", 1), ("*embed_tokens*", 0), ("model.norm.weight", 2)],
)
def test_the_prefix_is_what_lies_below_the_lowest_trained_parameter(train, depth):
    policy = policy_of(train=train)
    enable_prefix_states(policy)
    assert policy.prefix_depth == depth


def test_embeddings_that_train_through_a_tied_head_leave_no_frozen_prefix():
    policy = policy_of(train="lm_head*,*.layers.2.*")
    enable_prefix_states(policy)
    assert policy.prefix_depth == 2
    tied = policy_of(train="*.embed_tokens.*,*.layers.2.*", tie_word_embeddings=True)
    enable_prefix_states(tied)
    assert tied.prefix_depth == 0


def test_a_model_that_cannot_pass_layers_over_is_computed_whole(monkeypatch, caplog):
    monkeypatch.setattr(frozen_prefix.SkippedLayer, "forward", lambda self, states, *_, **__: states + 1)
    policy = policy_of()
    with caplog.at_level("INFO", logger="fastppo"):
        enable_prefix_states(policy)
    assert policy.prefix_depth == 0 and "computed in every pass" in caplog.text


def test_the_model_is_whole_again_after_a_pass():
    policy = policy_of()
    names = [name for name, _ in policy.named_parameters()]
    enable_prefix_states(policy)
    policy.prefix(PACKED)
    assert [name for name, _ in policy.named_parameters()] == names


def test_states_are_computed_once_for_a_sequence_in_any_packing(monkeypatch):
    policy = policy_of()
    enable_prefix_states(policy)
    states, calls = frozen_prefix.PrefixStates(), []
    monkeypatch.setattr(
        Policy, "prefix", lambda self, packed: calls.append(len(packed)) or roles.Backbone.prefix(self, packed)
    )
    whole = states(policy, PACKED, ALL)
    some = torch.tensor([3, 0])
    part = states(policy, PACKED.select(some), some)
    assert torch.equal(part, torch.cat([whole[-3:], whole[:8]])) and calls == [4]


@pytest.mark.parametrize("critic", [["shared"], ["separate", "--critic.train", "1"]], ids=["shared", "separate"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_an_update_is_the_same_with_and_without_kept_states(tmp_path, monkeypatch, critic, kl_in):
    world, model = start_world(1), tiny.saved(tmp_path, tiny.causal())
    settings = ["--actor.train", "1", "--ppo.epochs", "2", "--critic.kind", *critic]
    settings += ["--ppo.kl_in", kl_in, "--ppo.kl_kind", "exact", "--ppo.minibatches", "2"]
    kept = step(config_of(model, *settings), world)
    monkeypatch.setattr(frozen_prefix.PrefixStates, "__call__", lambda *_: None)
    whole = step(config_of(model, *settings), world)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(kept.parameters[name], parameter, rtol=0, atol=2e-5)
