"""PPO on conversations: what the policy did not write is read, and neither learned nor counted."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import tiny
import torch
from ppo_step import PROMPTS, SHAPES, config_of, context_of, conversations, learn, responses, roles_of
from test_update import METHODS, SEVERAL, difference

from fastppo.data.batch import Moments
from fastppo.data.microbatches import Minibatch
from fastppo.data.packed import Packed, segment_rows
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.update import run_updates

SHUFFLED = [[Minibatch((torch.tensor([7, 2]), torch.tensor([0, 5, 4]), torch.tensor([6, 1, 3])))]]


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


@pytest.mark.parametrize("method", ["gae", *METHODS])
def test_with_a_mask_of_ones_everything_is_as_without_one_bit_for_bit(model, world, method):
    settings = [*METHODS.get(method, []), *SEVERAL]
    config = config_of(model, *settings, "--ppo.microbatch_tokens", "40")
    plain = responses(roles_of(config, world), config.sampling.samples_per_prompt)
    packed = plain.rollout.packed
    behind = torch.arange(len(packed.tokens)) >= (packed.cu_seqlens[:-1] + packed.prompt_lengths).repeat_interleave(
        packed.lengths
    )
    no_rewards = torch.zeros_like(plain.rollout.logprobs)
    masked = replace(plain.rollout, packed=replace(packed, mask=behind), turn_rewards=no_rewards)
    one, other = learn(config, world, plain), learn(config, world, replace(plain, rollout=masked))
    assert difference(one.parameters, other.parameters) == 0
    assert [str(update) for update in one.updates] == [str(update) for update in other.updates]  # NaN is NaN
    for field in dataclasses.fields(one.experience):
        value, again = (getattr(step.experience, field.name) for step in (one, other))
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), again.nan_to_num()), field.name


@pytest.mark.parametrize("settings", [[], ["--ppo.loss", "gspo"], ["--critic.kind", "shared"]], ids=str)
def test_no_gradient_comes_from_logits_that_predict_an_observation(model, world, settings):
    """Nor from values there: the last layer's states get gradients where a written token is predicted, and exactly 0
    elsewhere."""
    config, scored = config_of(model, *settings), conversations()
    roles, seen = roles_of(config, world), []

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(gradient[0].clone()))

    roles.policy.model.model.norm.register_forward_hook(watch)
    plan = [[Minibatch((torch.arange(8),))]]
    context, cache = context_of(config, roles, world), PrefixStates()
    experience = compute_experience(scored, Moments().add(scored.end_scores), plan[0], cache, context)
    list(run_updates(experience, plan, cache, context))
    (gradient,), packed = seen, scored.rollout.packed
    predicts = torch.zeros(len(packed.tokens), dtype=torch.bool)
    predicts[packed.predictors] = True
    assert (gradient[predicts] != 0).any(1).all()
    assert (gradient[~predicts] == 0).all() and (~predicts).sum() > len(packed) + 21  # prompts and observations


def by_hand(rewards, values, gamma, lam):
    """Backwards over the written tokens, whatever lies between them."""
    found, next_value, next_advantage = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        found.insert(0, next_advantage)
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (0.7, 0.0)])
def test_advantages_carry_from_turn_to_turn(model, world, gamma, lam):
    settings = ["--ppo.gamma", str(gamma), "--ppo.lam", str(lam), "--ppo.whiten_advantages", "false"]
    settings += ["--ppo.kl_coef", "0"]
    experience = learn(config_of(model, *settings), world, conversations()).experience
    packed = experience.packed
    assert packed.turn_counts.tolist() == [1, 2, 3, 2, 1, 3, 2, 2]
    for i in range(len(packed)):
        rows = segment_rows(packed.response_cu_seqlens, torch.tensor([i]))
        rewards, values = experience.rewards[rows].tolist(), experience.values[rows].tolist()
        expected = by_hand(rewards, values, gamma, lam)
        torch.testing.assert_close(experience.advantages[rows], torch.tensor(expected), rtol=1e-5, atol=1e-6)
        returns = torch.tensor(expected) + experience.values[rows]
        torch.testing.assert_close(experience.returns[rows], returns, rtol=1e-5, atol=1e-6)


def test_a_turns_reward_is_on_its_last_written_token_and_the_score_on_the_last_of_all(model, world):
    experience = learn(config_of(model, "--ppo.kl_coef", "0"), world, conversations()).experience
    second = experience.packed.response_cu_seqlens[1:3].tolist()  # the conversation (2, -4, 1)
    of_turns, score = experience.turn_rewards[slice(*second)], torch.linspace(-1, 1, 8)[1]
    assert of_turns[0] == of_turns[2] == 0.0 != of_turns[1]
    torch.testing.assert_close(experience.rewards[slice(*second)], torch.stack([score * 0, of_turns[1], score]))


@pytest.mark.parametrize("method", ["gae", *METHODS])
def test_an_update_from_conversations_does_not_depend_on_microbatches_order_or_packing(model, world, method):
    settings = METHODS.get(method, [])
    samples = config_of(model, *settings).sampling.samples_per_prompt
    scored = conversations(samples)
    whole = learn(config_of(model, *settings), world, scored)
    assert difference(whole.parameters, learn(config_of(model, *settings), world, scored, SHUFFLED).parameters) < 2e-5
    cut = learn(config_of(model, *settings, "--ppo.microbatch_tokens", "26"), world, scored)
    assert difference(whole.parameters, cut.parameters) < 5e-5


def test_what_an_observation_says_matters_to_what_follows_alone(model, world):
    config, scored = config_of(model), conversations()
    packed = scored.rollout.packed
    tokens = packed.tokens.clone()
    observed = ~packed.mask & (torch.arange(len(tokens)) == int(packed.cu_seqlens[1] + packed.prompt_lengths[1] + 2))
    assert observed.sum() == 1
    tokens[observed] += 1
    other = replace(scored, rollout=replace(scored.rollout, packed=replace(packed, tokens=tokens)))
    one, two = (learn(config, world, each).experience.old_logprobs for each in (scored, other))
    changed = (one != two).nonzero().flatten().tolist()
    assert changed == [int(packed.last_response_tokens[1])]  # the second turn of (2, -4, 1)


def test_turns_are_runs_of_written_tokens():
    packed: Packed = conversations().rollout.packed
    assert packed.turns.tolist() == [n for shape in SHAPES for n, k in enumerate(shape[::2]) for _ in range(k)]
    assert packed.turn_lengths.tolist() == [k for shape in SHAPES for k in shape[::2]]
    assert packed.prompt_lengths.tolist() == list(map(len, PROMPTS))
    part = packed.select(torch.tensor([5, 1]))
    assert part.turns.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert part.prompt_lengths.tolist() == [len(PROMPTS[5]), len(PROMPTS[1])]
