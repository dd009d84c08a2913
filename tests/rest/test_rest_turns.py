"""ReST on conversations with an environment: of what was said, an Improve learns what the policy wrote."""

from dataclasses import fields, replace

import finished_talks
import torch

from fastppo.checkpoint import random_state
from fastppo.data.batch import Measured
from fastppo.data.examples import Examples
from fastppo.data.packed import pack
from fastppo.rest.grow import joined
from fastppo.rest.improves import learned_from
from fastppo.rest.metrics import step_metrics
from fastppo.rest.progress import RestProgress
from fastppo.rest.selection import Selection

DEMONSTRATIONS = Examples(pack([[7, 8, 9]], [1]), 1, torch.zeros(1))


def grown():
    experience = finished_talks.experience()
    return Measured(**{field.name: getattr(experience, field.name) for field in fields(Measured)})


def test_batches_of_a_grow_keep_their_turns():
    whole = joined([grown(), grown()])
    assert whole.turn_rewards.tolist() == grown().turn_rewards.tolist() * 2
    assert whole.packed.mask.tolist() == grown().packed.mask.tolist() * 2
    plain = replace(grown(), turn_rewards=None)
    assert joined([plain, plain]).turn_rewards is None


def test_an_improve_learns_written_tokens_beside_demonstrations():
    packed = learned_from(grown(), Selection(torch.tensor([0, 1]), 0.0, 2), DEMONSTRATIONS).packed
    rollout = finished_talks.rollout().packed
    assert packed.responses.tolist() == [*rollout.responses[:7].tolist(), 9]  # "ab" "cd<eos>" "e<eos>"
    assert packed.response_lengths.tolist() == [5, 2, 1]


def test_metrics_and_checkpoints_have_turns():
    metrics = step_metrics(grown(), [], 0, {"time/sampling": 1.0})
    assert metrics["turns"] == 2 and metrics["turn3/reward"] == 0.125
    begun, found = RestProgress(), RestProgress()
    begun.add_batch(grown())
    state = begun.state()
    found.restore(state, random_state())
    assert torch.equal(found.grown[0].turn_rewards, grown().turn_rewards)
    assert torch.equal(found.grown[0].packed.mask, grown().packed.mask)
    del state["grown"][0]["turn_rewards"], state["grown"][0]["packed"]["mask"]  # as before there were turns
    found.restore(state, random_state())
    assert found.grown[0].turn_rewards is None and found.grown[0].packed.mask is None
