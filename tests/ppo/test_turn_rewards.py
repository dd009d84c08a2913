"""What PPO makes of conversations with an environment: rewards where turns end, and all of it in checkpoints."""

from dataclasses import fields, replace

import finished_talks
import pytest
import tiny
import torch
from ppo_step import config_of, context_of, roles_of

from fastppo.config import PPOConfig
from fastppo.data.batch import Experience, Moments, Scored
from fastppo.data.microbatches import plan_step
from fastppo.data.packed import Packed
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.metrics import step_metrics
from fastppo.ppo.progress import PPOProgress, StepBatch
from fastppo.ppo.schedule import token_rewards
from fastppo.ppo.update import run_updates
from fastppo.rewards import shape

SECONDS = {f"time/{phase}": 1.0 for phase in ("sampling", "feedback", "experience", "learning")}
ENDS = torch.tensor([1.0, -2.0, 0.5])  # what the sources of reward said of each conversation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


def scored(rollout):
    of_turns = rollout.rewards_of_turns.float()
    both = torch.stack([ENDS, of_turns], dim=1)
    return Scored(rollout, both, ENDS + of_turns, torch.full((3,), torch.nan), ENDS)


def learned(model, found, *arguments):
    """The experience from scored responses, the updates on it, and the actor's parameters after them."""
    world, config = start_world(1), config_of(model, "--ppo.batch_size", "3", *arguments)
    roles = roles_of(config, world)
    roles.residency.enter("sampling")
    context = context_of(config, roles, world)
    plan = plan_step(found.rollout.packed.lengths, config, 0, 1, roles.attention)
    roles.residency.enter("experience")
    moments, cache = Moments().add(found.end_scores), PrefixStates()
    experience = compute_experience(found, moments, plan[0], cache, context)
    roles.residency.enter("learning")
    updates = list(run_updates(experience, plan, cache, context))
    after = {name: p.detach().clone() for name, p in roles.actor.module.named_parameters()}
    return experience, step_metrics(experience, updates, SECONDS, config.importance), after


@pytest.fixture(scope="module")
def with_turns(model):
    return learned(model, scored(finished_talks.rollout()), "--ppo.kl_coef", "0")


def test_rewards_stand_where_turns_and_responses_end(with_turns):
    experience, rollout = with_turns[0], finished_talks.rollout()
    expected = rollout.turn_rewards.clone()
    expected[[4, 6, 10]] += shape(scored(rollout), Moments().add(ENDS), PPOConfig())  # "ab" "cd<eos>" "e<eos>" "fghi"
    assert expected[[1, 4, 6, 7, 8, 10]].tolist() == [0.25, 0.0, 0.0, 0.0, 0.5, 0.625]
    assert experience.rewards.tolist() == expected.tolist() and torch.equal(
        experience.turn_rewards, rollout.turn_rewards
    )


def test_a_turns_reward_is_added_to_the_kl_penalty_of_its_token():
    kl, turns = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, -1.0])
    assert token_rewards(kl, torch.tensor([8.0]), torch.tensor([2]), 0.5, turns).tolist() == [0.0, -1.0, 5.0]


def test_metrics_tell_turns_observations_and_rewards_apart(with_turns):
    found = with_turns[1]
    assert (found["turns"], found["observed_tokens"]) == (2, pytest.approx(4 / 3))  # "?", "!!" and "?"
    assert found["turn_reward"] == pytest.approx((-0.75 + 2.0 + 0.625) / 3)
    assert found["turn1/reward"] == pytest.approx((0.25 + 2.0 + 0.0) / 3)
    assert found["turn2/reward"] == pytest.approx((-1.0 + 0.5) / 2) and found["turn3/reward"] == 0.125
    assert found["response_length"] == pytest.approx(11 / 3) and "turn4/reward" not in found


def test_a_mask_that_leaves_nothing_out_changes_no_bit(model):
    masked = finished_talks.rollout(said=[["abcd"], ["e"], ["fg"]], rewards=[[0.0]] * 3)
    plain = replace(masked, packed=replace(masked.packed, mask=None), turn_rewards=None, conversations=None)
    one, other = learned(model, scored(masked)), learned(model, replace(scored(plain), of_sources=None))
    for field in fields(Experience):
        if field.name not in ("packed", "turn_rewards", "judged", "advantage_std"):
            assert torch.equal(getattr(one[0], field.name), getattr(other[0], field.name)), field.name
    assert all(torch.equal(one[2][name], other[2][name]) for name in one[2])
    new = {"turns", "observed_tokens", "turn_reward", "turn1/reward"}
    assert one[1].keys() - other[1].keys() == new
    assert repr({name: one[1][name] for name in other[1]}) == repr(other[1])  # some figures are NaN


def test_checkpoints_hold_turns_and_those_from_before_there_were_any_still_load(with_turns):
    begun = PPOProgress()
    begun.add_experience(with_turns[0], Moments(), StepBatch(None, None, 1))
    state, found = begun.state(), PPOProgress()
    found.restore(state, begun.random)
    assert torch.equal(found.experience.turn_rewards, with_turns[0].turn_rewards)
    assert torch.equal(found.experience.packed.mask, with_turns[0].packed.mask)
    packed = {name: value for name, value in state["experience"]["packed"].items() if name != "mask"}
    old = {name: value for name, value in state["experience"].items() if name != "turn_rewards"} | {"packed": packed}
    found.restore(state | {"experience": old}, begun.random)
    assert found.experience.turn_rewards is None and found.experience.packed.mask is None
    assert {field.name for field in fields(Packed)} == {*packed, "mask"}
