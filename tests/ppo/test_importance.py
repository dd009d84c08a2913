"""The learner knows who sampled: weighted gradients against enumerated expectations, and the metrics of the weights."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import product
from types import SimpleNamespace

import made_up_batches as made_up
import numpy as np
import ppo_step
import pytest
import tiny
import torch
from ppo_step import config_of, context_of, roles_of, step

from fastppo import ops
from fastppo.config import Importance, PPOConfig
from fastppo.data.batch import Moments
from fastppo.data.microbatches import plan_step
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.models.roles import FusedHead
from fastppo.ops.eager import restrict
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.importance import importance_metrics, importance_weights
from fastppo.ppo.losses import TokenLoss, clip
from fastppo.ppo.terms import Targets, Totals, clip_term, loss_term
from fastppo.ppo.update import run_updates

# A policy over four tokens that sees the token before: logits by token and token before (V, V + 1), the last column at
# the start of a response. The sampler is another such table, with the same tokens.
V = 4
chance = torch.Generator().manual_seed(2)
POLICY, SAMPLER, VALUES = torch.randn(3, V, V + 1, generator=chance, dtype=torch.float64)
NONE, TOKEN, ICEPOP, SEQUENCE = (
    Importance(kind, *bounds)
    for kind, bounds in {"none": (0, 1e9), "token": (0, 1e9), "icepop": (1e-9, 1e9), "sequence": (0.8, 1.25)}.items()
)
TERMS = {"fused": clip_term, "plain": partial(loss_term, clip)}
CONFIG = dataclasses.replace(config_of("none"), ppo=PPOConfig())


def made(sampler, responses):
    """The experience of responses (lists of tokens) that the sampler drew and the policy scored, in fp64; where each
    token's logits are (M,), and its advantage (M,)."""
    before = torch.tensor([c for r in responses for c in (V, *r[:-1])])
    tokens = torch.tensor([y for r in responses for y in r])
    logprobs = [table.log_softmax(0)[tokens, before] for table in (POLICY, sampler)]
    experience = dataclasses.replace(made_up.batch(responses), old_logprobs=logprobs[0], sampler_logprobs=logprobs[1])
    return experience, before, VALUES[tokens, before]


def gradient(term, experience, before, advantages, importance, normalizer=1.0, config=CONFIG):
    """(V, V + 1): of the loss by the policy's logits, through the very term of an update."""
    head = FusedHead(torch.nn.Parameter(POLICY.clone()), None, None)
    hidden = torch.eye(V + 1, dtype=torch.float64)[before]
    targets = Targets(
        packed=SimpleNamespace(
            responses=experience.packed.responses, response_cu_seqlens=experience.packed.response_cu_seqlens
        ),
        old_logprobs=experience.old_logprobs,
        advantages=advantages,
        old_values=advantages,
        returns=advantages,
        divisors=Totals(normalizer, normalizer, 0),
        kl_reference={},
        weights=importance_weights(experience, importance),
    )
    loss, _ = term(SimpleNamespace(head=head), hidden, targets, config)
    return torch.autograd.grad(loss, head.weight)[0]


def expected(term, sampler, importance, length=1):
    """The expectation of the gradient over all responses of the sampler, each with its probability."""
    drawn = [r for r in product(range(V), repeat=length) if all(sampler[y, b] > -math.inf for b, y in with_before(r))]
    experience, before, advantages = made(sampler, drawn)
    whole = experience.sampler_logprobs.view(-1, length).sum(1).exp().repeat_interleave(length)
    return gradient(term, experience, before, advantages * whole, importance)


def with_before(response):
    return zip((V, *response[:-1]), response, strict=True)


def of_measure(measure, reach):
    """(V, V + 1): -sum over columns of reach * sum over tokens of measure * value * gradient of the log probability."""
    table = POLICY.clone().requires_grad_()
    objective = (reach * measure * VALUES * table.log_softmax(0)).nan_to_num(0.0).sum()
    return -torch.autograd.grad(objective, table)[0]


START = torch.eye(V + 1, dtype=torch.float64)[V]  # responses of one token
pi, mu = POLICY.softmax(0), SAMPLER.softmax(0)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("importance", [TOKEN, ICEPOP], ids=["token", "icepop"])
def test_with_full_support_and_no_bound_the_weighted_gradient_is_exact_and_the_unweighted_is_not(term, importance):
    exact = of_measure(pi, START)
    close(expected(term, SAMPLER, importance), exact)
    unweighted = expected(term, SAMPLER, NONE)
    close(unweighted, of_measure(mu, START))
    assert float((unweighted - exact).abs().max()) > 0.1


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_the_same_from_tokens_that_are_drawn_within_the_error_of_the_draw(term):
    count, exact = 40_000, of_measure(pi, START)[:, V]
    logits = SAMPLER[:, V].expand(count, V).contiguous()
    stream = torch.arange(count)
    tokens, logprobs = ops.sample_tokens(logits, seed=1, stream=stream, offset=torch.zeros_like(stream))
    experience, before, advantages = made(SAMPLER, [[int(y)] for y in tokens])
    experience = dataclasses.replace(experience, sampler_logprobs=logprobs)

    ys = torch.eye(V, dtype=torch.float64)  # the variance of one token's weighted gradient, by enumeration
    each = -(pi / mu * VALUES)[:, V, None] * (ys - pi[:, V])
    error = ((mu[:, V, None] * each.square()).sum(0) - exact.square()).sqrt() / math.sqrt(count)
    weighted, unweighted = (
        gradient(term, experience, before, advantages, i, float(count))[:, V] for i in (TOKEN, NONE)
    )
    assert float(((weighted - exact).abs() / error).max()) < 4
    assert float(((unweighted - exact).abs() / error).max()) > 20


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_where_a_bound_bites_it_is_the_expectation_with_the_bound(term):
    rho = pi / mu
    assert ((rho[:, V] > 1.25) | (rho[:, V] < 0.8)).any() and (rho[:, V] > 1.2).any()
    close(expected(term, SAMPLER, Importance("token", 0.0, 1.2)), of_measure(torch.minimum(pi, 1.2 * mu), START))
    inside = (rho >= 0.8) & (rho <= 1.25)
    assert 0 < inside[:, V].sum() < V
    close(expected(term, SAMPLER, Importance("icepop", 0.8, 1.25)), of_measure(pi * inside, START))
    close(expected(term, SAMPLER, SEQUENCE), of_measure(mu * inside, START))


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.6), (3, 0.9)])
def test_under_top_k_and_top_p_it_is_the_exact_one_without_what_could_not_be_drawn(term, top_k, top_p):
    kept = restrict(POLICY.t(), 1.0, top_k, top_p).t()
    drawn = kept > -math.inf
    assert 0 < drawn[:, V].sum() < V
    truncated = expected(term, kept, TOKEN)
    close(truncated, of_measure(pi * drawn, START))
    assert float((truncated - of_measure(pi, START)).abs().max()) > 0.01  # no weight brings the others back


@pytest.mark.parametrize("importance", [TOKEN, ICEPOP], ids=["token", "icepop"])
def test_in_longer_responses_a_token_is_weighted_after_the_prefix_that_the_sampler_wrote(importance):
    reach = START.clone()
    reach[:V] = mu[:, V]  # how often each first token stands before the second: by the sampler
    found = expected(clip_term, SAMPLER, importance, length=2)
    close(found, of_measure(pi, reach))
    reach[:V] = pi[:, V]
    assert float((found - of_measure(pi, reach)).abs().max()) > 0.01


def test_a_sequence_is_kept_or_left_out_by_the_geometric_mean_of_its_ratios():
    responses = [[0], [1, 2], [3, 0, 1], [2, 2]]
    rhos = [[1.2], [4.0, 0.25], [1.3, 1.3, 1.2], [0.7, 0.9]]  # means 1.2, 1, 1.266, 0.794
    experience = with_rho(made_up.batch(responses), [x for r in rhos for x in r])
    assert importance_weights(experience, SEQUENCE).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    wide = Importance("sequence", 0.79, 1.27)
    assert importance_weights(experience, wide).tolist() == [1.0] * 8
    assert importance_metrics(experience, SEQUENCE)["importance_outside"] == 5 / 8


def with_rho(experience, rho):
    log_rho = torch.tensor(rho, dtype=torch.float64).log()
    return dataclasses.replace(
        experience,
        old_logprobs=experience.sampler_logprobs.double() + log_rho,
        sampler_logprobs=experience.sampler_logprobs.double(),
    )


def test_the_weights_of_tokens_by_hand():
    rho = [0.0, 0.49, 0.5, 1.0, 2.0, 2.5, 5.0, 5.01, math.inf]
    experience = with_rho(made_up.batch([[0]] * 9), rho)
    token = importance_weights(experience, dataclasses.replace(CONFIG, ppo=PPOConfig(importance="token")).importance)
    assert token.tolist() == pytest.approx([0.0, 0.49, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    icepop = importance_weights(experience, Importance("icepop", 0.499, 5.001))
    assert icepop.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0, 2.5, 5.0, 0.0, 0.0])
    assert importance_weights(experience, NONE) is None


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_what_is_left_out_counts_in_the_mean(term):
    """Four tokens, two of which IcePop leaves out: a quarter of the sum over the others, not a half."""
    experience, before, advantages = made(SAMPLER, [[0], [1], [2], [3]])
    shifted = torch.tensor([0.0, 9.0, -9.0, 0.0], dtype=torch.float64)
    experience = dataclasses.replace(experience, sampler_logprobs=experience.old_logprobs + shifted)
    found = gradient(term, experience, before, advantages, Importance("icepop", 0.5, 5.0), 4.0)
    kept = gradient(term, experience, before, advantages * (shifted == 0), NONE, 1.0)
    close(found, kept / 4)


def test_in_a_run_what_is_left_out_counts_in_the_mean_too(model, world, monkeypatch):
    """At ratio 1 the loss is minus the mean of weight times advantage over all tokens."""
    stray(monkeypatch, 0.5)
    done = step(config_of(model, "--ppo.importance", "icepop", "--ppo.importance_low", "0.7"), world)
    weights = importance_weights(done.experience, Importance("icepop", 0.7, 5.0))
    assert 0.1 < float((weights == 0).float().mean()) < 0.5
    by_hand = float(-(weights * done.experience.advantages).mean())
    assert done.updates[0].policy_loss == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


# Through whole updates


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


real = ppo_step.responses


def responses_of_another(roles, samples=1, *, spread):
    """What the actor drew, with logprobs as of another sampler."""
    scored = real(roles, samples)
    noise = torch.randn(len(scored.rollout.logprobs), generator=torch.Generator().manual_seed(0))
    rollout = dataclasses.replace(scored.rollout, logprobs=scored.rollout.logprobs + spread * noise)
    return dataclasses.replace(scored, rollout=rollout)


def stray(monkeypatch, spread):
    monkeypatch.setattr(ppo_step, "responses", partial(responses_of_another, spread=spread))


SEVERAL = ["--ppo.minibatches", "2", "--ppo.epochs", "2", "--ppo.microbatch_tokens", "40"]
SHARED = ["--critic.kind", "shared"]
EXACT_KL = ["--ppo.kl_in", "loss", "--ppo.kl_kind", "exact", "--ppo.kl_coef", "1"]
TERMS_AND_MODELS = {
    "entropy bonus, exact KL, shared critic": ["--ppo.entropy_coef", "0.1", *EXACT_KL, *SHARED],
    "k3 in the loss": ["--ppo.kl_in", "loss", "--ppo.kl_kind", "k3", "--ppo.kl_coef", "1"],
    "dual clip, shared critic": ["--ppo.dual_clip", "1.01", *SHARED],
    "LoRA, exact KL": ["--actor.lora.rank", "4", "--critic.lora.rank", "2", *EXACT_KL],
    "text mixed in, shared critic": ["--ptx.coef", "0.5", "--ptx.path", "TEXTS", "--ptx.max_tokens", "30", *SHARED],
    "bf16, upper layers": ["--optim.dtype", "bf16", "--actor.train", "2"],
    "a loss of the user's": ["--ppo.loss", "LOSS:reinforce", "--ppo.entropy_coef", "0.1"],
}
LOSS = """
from fastppo.ppo import TokenLoss

def reinforce(logprobs, old_logprobs, advantages, cu_seqlens, ppo):
    bounded = (logprobs - old_logprobs).detach().exp().clamp(max=1.1)
    return TokenLoss(-bounded * advantages * logprobs)
"""
KINDS = {
    "token": ["--ppo.importance", "token", "--ppo.importance_high", "1.1"],
    "icepop": ["--ppo.importance", "icepop", "--ppo.importance_low", "0.8", "--ppo.importance_high", "1.5"],
    "sequence": ["--ppo.importance", "sequence", "--ppo.importance_low", "0.9"],
}


def updated(config, world, by_hand=False, rest_only=0):
    """The weights of the actor, and its updates. by_hand: with weighted advantages and no setting; rest_only: updates
    that are taken from a first go over the batch."""
    roles = roles_of(config, world)
    scored = ppo_step.responses(roles)
    plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
    context, prefix_cache = context_of(config, roles, world), PrefixStates()
    experience = compute_experience(scored, Moments().add(scored.scores), plan[0], prefix_cache, context)
    if by_hand:
        weights = importance_weights(experience, config.importance)
        assert weights.min() < 1
        experience = dataclasses.replace(experience, advantages=weights * experience.advantages)
        plain = dataclasses.replace(config.ppo, importance="none", importance_low=None, importance_high=None)
        context = dataclasses.replace(context, config=dataclasses.replace(config, ppo=plain))
    updates = run_updates(experience, plan, prefix_cache, context)
    done = [next(updates) for _ in range(rest_only)] if rest_only else []
    done += list(run_updates(experience, plan, prefix_cache, context, done) if rest_only else updates)
    return {name: p.detach().clone() for name, p in roles.policy.named_parameters()}, done


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What settings name as TEXTS and LOSS."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "{"abc" * n}"}}\n' for n in range(1, 9)))
    (folder / "mine.py").write_text(LOSS)
    return {"TEXTS": str(folder / "texts.jsonl"), "LOSS:reinforce": f"{folder}/mine.py:reinforce"}


@pytest.mark.parametrize(
    ("terms", "kind"),
    [
        *product(list(TERMS_AND_MODELS)[:1], KINDS),  # each with all kinds, and the others with one
        *zip(list(TERMS_AND_MODELS)[1:], (*KINDS, *KINDS), strict=True),
    ],
)
def test_an_update_with_weights_is_one_with_weighted_advantages(model, world, files, monkeypatch, kind, terms):
    """Over two epochs of two updates, all with the same weights. And so the value loss, the entropy bonus and the KL
    term are those without weights, and a run that goes on within a batch weights it in the same way."""
    stray(monkeypatch, 0.3)
    settings = [files.get(word, word) for word in TERMS_AND_MODELS[terms]]
    config = config_of(model, *SEVERAL, *KINDS[kind], *settings)
    parameters, updates = updated(config, world)
    fused = config.ppo.loss == "clip"
    alike = partial(
        torch.testing.assert_close, rtol=0, atol=0 if fused else 1e-5
    )  # a weight behind or before a product
    for other in (updated(config, world, by_hand=True), updated(config, world, rest_only=2)):
        for one, two in zip(updates, other[1], strict=True):
            exactly = dict(rel=0, abs=0) if fused else dict(rel=1e-4, abs=1e-5)
            assert dataclasses.asdict(two) == pytest.approx(dataclasses.asdict(one), nan_ok=True, **exactly)
        for name, p in other[0].items():
            alike(p, parameters[name])
    without = updated(config_of(model, *SEVERAL, *settings), world)[1]
    assert without[0].policy_loss != pytest.approx(updates[0].policy_loss, rel=1e-2)
    for name in ("entropy", "value_loss", "kl_loss", "ptx_loss", "approx_kl"):
        assert getattr(without[0], name) == getattr(updates[0], name)


def test_what_a_loss_of_the_users_returns_is_weighted_whatever_it_does_with_advantages():
    """Here nothing."""

    def square(logprobs, *rest):
        return TokenLoss(logprobs.square())

    experience, before, advantages = made(SAMPLER, [[0], [1, 2], [3, 3, 1]])
    found = gradient(partial(loss_term, square), experience, before, advantages, Importance("token", 0.0, 1.3))
    table = POLICY.clone().requires_grad_()
    logprobs = table.log_softmax(0)[experience.packed.responses, before]
    rho = (experience.old_logprobs - experience.sampler_logprobs).exp()
    assert rho.min() < 1 and rho.max() > 1.3
    loss = (rho.clamp(max=1.3) * logprobs.square()).sum()
    close(found, torch.autograd.grad(loss, table)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_updates_by_a_plain_loss_have_the_weights_of_the_fused_op(model, world, monkeypatch, kind):
    stray(monkeypatch, 0.3)
    settings = [*SEVERAL, *SHARED, *KINDS[kind], "--ppo.dual_clip", "1.01"]
    fused = updated(config_of(model, *settings), world)
    plain = updated(config_of(model, *settings, "--ppo.loss", "fastppo.ppo.losses:clip"), world)
    assert fused[1][-1].clip_fraction > 0.1 and fused[1][-1].approx_kl > 1e-3
    for one, other in zip(plain[1], fused[1], strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other), rel=1e-3, abs=1e-5)
    for name, parameter in fused[0].items():
        torch.testing.assert_close(plain[0][name], parameter, rtol=0, atol=1e-4)


# In process without truncation


@pytest.mark.parametrize(("dtype", "mean", "worst"), [("fp32", 1e-5, 1e-4), ("bf16", 0.05, 0.35)])
def test_in_process_and_from_the_whole_distribution_rho_is_one(model, world, dtype, mean, worst):
    experience = step(config_of(model, "--optim.dtype", dtype), world).experience
    found = importance_metrics(experience, TOKEN)
    assert found["sampler_error"] < mean and found["sampler_error_max"] < worst
    assert found["effective_samples"] > 1 - worst**2 and 0 <= found["sampler_kl"] < worst**2
    weights = importance_weights(experience, CONFIG.importance._replace(kind="icepop"))
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=math.expm1(worst))


def test_by_default_nothing_is_weighted_in_process(model, world, monkeypatch):
    """Whatever the sampler says, bit for bit."""
    ours = updated(config_of(model, *SEVERAL, *SHARED), world)
    stray(monkeypatch, 0.3)
    theirs = updated(config_of(model, *SEVERAL, *SHARED), world)
    assert ours[1] == theirs[1] and all(torch.equal(ours[0][name], p) for name, p in theirs[0].items())


# Metrics


def numpy_metrics(old, drawn, lengths, importance):
    d = np.asarray(old, np.float64) - np.asarray(drawn, np.float64)
    rho = np.exp(d)
    judged = rho
    if importance.kind == "sequence":
        parts = np.split(d, np.cumsum(lengths)[:-1])
        judged = np.concatenate([np.full(len(p), math.exp(p.mean())) for p in parts])
    return {
        "sampler_error": np.abs(d).mean(),
        "sampler_error_max": np.abs(d).max(),
        "sampler_kl": (rho - 1 - d).mean(),
        "importance_outside": ((judged < importance.low) | (judged > importance.high)).mean(),
        "effective_samples": rho.sum() ** 2 / (len(rho) * (rho**2).sum()),
    }


@pytest.mark.parametrize(
    "importance",
    [Importance("none", 0.5, 5.0), Importance("token", 0.0, 2.0), Importance("icepop", 0.5, 5.0), SEQUENCE],
    ids=lambda importance: importance.kind,
)
@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
def test_metrics_are_those_of_numpy(importance, spread):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, 40)
    responses = [draw.integers(0, 50, n).tolist() for n in lengths]
    drawn = draw.normal(-3, 1, lengths.sum()).astype(np.float32)
    old = (drawn + draw.normal(0, spread, len(drawn))).astype(np.float32)
    experience = dataclasses.replace(
        made_up.batch(responses), old_logprobs=torch.tensor(old), sampler_logprobs=torch.tensor(drawn)
    )
    found = importance_metrics(experience, importance)
    oracle = numpy_metrics(old, drawn, lengths, importance)
    assert found == pytest.approx(oracle, rel=1e-9, abs=1e-12)
    assert found["importance_outside"] > 0 or spread < 0.5
