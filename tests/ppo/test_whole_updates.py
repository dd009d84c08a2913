"""A step from its responses to its gradient, against the formulas in fp64: every estimator with every loss.

The truth is computed response by response from a plain model of transformers in fp64, the oracles of `ops.eager` and
the formulas of the losses. The settings beside estimator and loss change from case to case.
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from ppo_step import config_of, context_of, conversations, responses, roles_of
from transformers import AutoModelForCausalLM

from fastppo.config.learning import IMPORTANCE_BOUNDS
from fastppo.data.batch import Moments
from fastppo.data.microbatches import plan_step
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.ops import eager
from fastppo.ops.eager import estimators as oracle
from fastppo.ops.eager import losses
from fastppo.ppo.advantages import ESTIMATORS, adaptive_lambda
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.losses import LOSSES
from fastppo.ppo.update import run_updates

BESIDE = (
    {},  # k1 in the reward
    {"entropy_coef": 0.2, "kl_in": "loss", "kl_kind": "k3", "kl_coef": 0.7},
    {"kl_in": "loss", "kl_kind": "exact", "kl_coef": 0.7, "nll_coef": 0.5, "nll_above": 0.1},
    {"kl_kind": "exact", "kl_coef": 0.5},
    {"kl_in": "loss", "kl_kind": "k2", "kl_coef": 0.7, "score_clip": 0.4},
    {"entropy_coef": 0.2, "nll_coef": 0.5, "nll_above": -0.2, "kl_kind": "k3"},
)
CLIPS = {"clip": ("clip_low", "clip_high"), "gspo": ("gspo_clip_low", "gspo_clip_high")}
LOW, HIGH, TEMPERATURE, LONGEST = 0.1, 0.4, 0.7, 10  # the clips, and what `config_of` has as max_new_tokens


def case_of(e, estimator, i, loss):
    """Settings of `ppo`, and whether the responses are conversations."""
    low, high = CLIPS.get(loss, CLIPS["clip"])
    found = {"estimator": estimator, "loss": loss, low: LOW, high: HIGH, **BESIDE[(e + 2 * i) % 6]}
    found |= {
        "aggregate": ("token", "sequence", "constant")[(e + i) % 3],
        "importance": [*IMPORTANCE_BOUNDS][(e + i) % 4],
    }
    if estimator in ("gae", "reinforce++"):
        found["gamma"] = 0.9
    if estimator == "gae":
        found |= ({"lam": 0.8}, {"lam": "adaptive", "lam_alpha": 0.4}, {"lam": 0.8, "lam_critic": 1.0})[i]
    if loss != "cispo" and e % 2:
        found["dual_clip"] = 1.3
    return found, (e + i) % 2 == 1


CASES = {
    f"{estimator}, {loss}": case_of(e, estimator, i, loss)
    for (e, estimator), (i, loss) in itertools.product(enumerate(ESTIMATORS), enumerate(LOSSES))
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the actor and of another model as its reference, and both in fp64."""
    folder = tmp_path_factory.mktemp("models")
    paths = [tiny.saved(folder / f"{seed}", tiny.causal(seed=seed)) for seed in (0, 5)]
    return *paths, *(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)


def rows_of(model, packed):
    """Of each response the log probabilities (k, V) that its k tokens are drawn from, and these tokens."""
    lengths, found = packed.lengths.tolist(), []
    for tokens, written in zip(packed.tokens.split(lengths), packed.written.split(lengths), strict=True):
        logits = model(tokens[None]).logits[0, :-1][written[1:]]
        found.append(((logits / TEMPERATURE).log_softmax(-1), tokens[1:][written[1:]]))
    return found


def at(rows, tokens):
    return rows.gather(1, tokens[:, None])[:, 0]


def kl_of(kind, rows, reference, tokens):
    apart = at(rows, tokens) - at(reference, tokens)
    exact = (rows.exp() * (rows - reference)).sum(-1)
    return {"k1": apart, "k2": apart**2 / 2, "k3": (-apart).exp() - 1 + apart, "exact": exact}[kind]


def experience_of(ppo, scored, kl, values, samples):
    """Advantages, whitened where they are, and returns, both (M,) fp64. kl: (M,) of each token."""
    packed, scores = scored.rollout.packed, scored.end_scores.double()
    bound = ppo.score_clip or math.inf
    rewards = -(ppo.kl_coef if ppo.kl_in == "reward" else 0.0) * kl
    rewards[packed.last_response_tokens] += scores.clamp(-bound, bound)
    if scored.rollout.turn_rewards is not None:
        rewards = rewards + scored.rollout.turn_rewards
    starts, groups, returns = packed.response_cu_seqlens, torch.arange(len(scores)) // samples, None
    if ppo.estimator == "gae":
        found = []
        for own in map(slice, starts[:-1].tolist(), starts[1:].tolist()):
            length = own.stop - own.start
            lam = adaptive_lambda(length, ppo.lam_alpha) if ppo.lam == "adaptive" else ppo.lam
            alone = partial(eager.gae, rewards[own], values[own], torch.tensor([0, length]), gamma=ppo.gamma)
            other = lam if ppo.lam_critic is None else ppo.lam_critic
            found.append((alone(lam=lam)[0], alone(lam=other)[1]))
        advantages, returns = (torch.cat(parts) for parts in zip(*found, strict=True))
    elif ppo.estimator == "reinforce++":
        advantages = oracle.rewards_to_go(rewards, starts, gamma=ppo.gamma)
    elif ppo.estimator == "reinforce++_baseline":
        advantages = oracle.less_group_mean(rewards, groups, starts, gamma=ppo.gamma)
    else:
        advantages = getattr(oracle, ppo.estimator)(rewards, groups, starts)
    if "gae" in ppo.estimator or "reinforce" in ppo.estimator:
        advantages = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
    return advantages, returns


def weights_of(kind, old, drawn):
    """Of one response, of its tokens' probabilities under trainer and sampler."""
    rho, (low, high) = (old - drawn).exp(), IMPORTANCE_BOUNDS[kind]
    if kind == "sequence":
        return torch.full_like(rho, float(low <= float((old - drawn).mean().exp()) <= high))
    return {"none": torch.ones_like(rho), "token": rho.clamp(max=high), "icepop": rho * ((rho >= low) & (rho <= high))}[
        kind
    ]


def surrogate(ppo, logprobs, old, advantages):
    """The loss of each token of one response."""
    apart = logprobs - old
    if ppo.loss == "cispo":
        return -apart.exp().detach().clamp(1 - LOW, 1 + HIGH) * advantages * logprobs
    ratio = apart.exp() if ppo.loss == "clip" else apart.mean().exp().detach() * (logprobs - logprobs.detach()).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
    if ppo.dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, ppo.dual_clip * advantages), objective)
    return -objective


def loss_of(ppo, experience, sequences, actor, reference):
    """Of a minibatch, and of it what `Update` has: policy_loss, entropy, kl_loss, nll_loss."""
    packed = experience.packed.select(sequences)
    policy, entropy, kl, good = [], [], [], []
    of_tokens = ("old_logprobs", "sampler_logprobs", "advantages")
    old, drawn, advantages = (
        experience.packed.select_tokens(getattr(experience, name).double(), sequences).split(
            packed.response_lengths.tolist()
        )
        for name in of_tokens
    )
    with torch.no_grad():
        others = rows_of(reference, packed)
    for i, (rows, tokens) in enumerate(rows_of(actor, packed)):
        logprobs = at(rows, tokens)
        policy.append(weights_of(ppo.importance, old[i], drawn[i]) * surrogate(ppo, logprobs, old[i], advantages[i]))
        entropy.append(-(rows.exp() * rows).sum(-1))
        kl.append(kl_of(ppo.kl_kind, rows, others[i][0], tokens))
        good += [logprobs] if experience.scores[sequences[i]] > ppo.nll_above else []
    how = partial(losses.aggregated, cu_seqlens=packed.response_cu_seqlens, how=ppo.aggregate, longest=LONGEST)
    nll = -torch.cat(good).mean()
    loss = how(torch.cat(policy)) - ppo.entropy_coef * how(torch.cat(entropy)) + ppo.nll_coef * nll
    if ppo.kl_in == "loss":
        loss = loss + ppo.kl_coef * how(torch.cat(kl))
    said = {
        "policy_loss": how(torch.cat(policy)),
        "entropy": torch.cat(entropy).mean(),
        "kl_loss": torch.cat(kl).mean() * (ppo.kl_in == "loss"),
        "nll_loss": nll * (ppo.nll_coef > 0),
    }
    return loss, said


@pytest.mark.parametrize("case", CASES)
def test_experience_loss_and_gradient_are_those_of_the_formulas(models, case):
    ppo, talk = CASES[case]
    path, other, actor, reference = models
    samples = 4 if ppo["estimator"] != "gae" else 1
    settings = {f"ppo.{name}": value for name, value in ppo.items()} | {
        "ppo.minibatches": 2,
        "ppo.microbatch_tokens": 60,
    }
    # Adam's first step is lr g / (|g| + eps): its inverse is the gradient
    settings |= {"optim.eps": 1, "optim.max_grad_norm": 0, "actor.lr": 1, "zero.stage": 0, "reference.model": other}
    settings |= {"sampling.samples_per_prompt": samples, "sampling.temperature": TEMPERATURE}
    settings |= {"rollout.environment": "made:up"} if talk else {}
    config, world = (
        config_of(path, *(str(x) for pair in settings.items() for x in (f"--{pair[0]}", pair[1]))),
        start_world(1),
    )
    roles, cache, noise = roles_of(config, world), PrefixStates(), torch.Generator().manual_seed(1)
    scored = conversations(samples) if talk else responses(roles, samples)
    scored = scored.select(torch.arange(8))
    packed = scored.rollout.packed
    plan, context = plan_step(packed.lengths, config, 0, 1, roles.attention), context_of(config, roles, world)
    experience = compute_experience(scored, Moments().add(scored.end_scores), plan[0], cache, context)

    with torch.no_grad():
        pairs = zip(rows_of(actor, packed), rows_of(reference, packed), strict=True)
        kl = torch.cat([kl_of(config.ppo.kl_kind, rows, others, tokens) for (rows, tokens), (others, _) in pairs])
    values = None if experience.values is None else experience.values.double()
    advantages, returns = experience_of(config.ppo, scored, kl, values, samples)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3, check_dtype=False)
    close(experience.advantages, advantages)
    if returns is not None:
        close(experience.returns, returns)

    # As if the policy had moved since it drew, and another sampler had drawn: ratios and weights beyond every bound.
    old = experience.old_logprobs + 0.5 * torch.randn(len(kl), generator=noise)
    moved = replace(experience, old_logprobs=old, sampler_logprobs=old + torch.randn(len(kl), generator=noise))
    before = {name: p.detach().clone() for name, p in roles.policy.model.named_parameters()}
    (update,) = run_updates(moved, [plan[0][:1]], cache, context)
    loss, said = loss_of(config.ppo, moved, torch.cat(plan[0][0].microbatches), actor, reference)
    for name, value in said.items():
        assert getattr(update, name) == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-4), name
    gradients = torch.autograd.grad(loss, list(actor.parameters()))
    largest = max(float(g.abs().max()) for g in gradients)
    for (name, _), gradient in zip(actor.named_parameters(), gradients, strict=True):
        step = (before[name] - roles.policy.model.get_parameter(name).detach()).double()
        close(step / (1 - step.abs()), gradient, rtol=1e-3, atol=1e-3 * max(largest, 0.1))
