"""GSPO, CISPO, and how tokens add up to a loss: against fp64 oracles, gradients included, and by hand."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_step import config_of

from fastppo import ops
from fastppo.config import PPOConfig
from fastppo.models.roles import FusedHead
from fastppo.ops.eager import losses as oracle
from fastppo.ppo.losses import LOSSES, checked_loss, cispo, clip, gspo
from fastppo.ppo.terms import Targets, Totals, clip_term, loss_term

LENGTHS = (1, 5, 9, 3)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
LENGTH_OF = torch.tensor(LENGTHS)
TOKENS = sum(LENGTHS)


def batch(seed=0, *, apart=0.5, dtype=torch.float64):
    """logprobs with gradient, old ones, and one advantage a response."""
    chance = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(TOKENS, generator=chance, dtype=dtype) - 0.1
    old = logprobs + apart * torch.randn(TOKENS, generator=chance, dtype=dtype)
    advantages = torch.randn(len(LENGTHS), generator=chance, dtype=dtype).repeat_interleave(LENGTH_OF)
    return logprobs.requires_grad_(), old, advantages


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


# By hand


def test_gspo_has_one_ratio_for_a_response_by_hand():
    """Two tokens with ratios 2 and 1/8: the geometric mean is 1/2, below the clip, which holds where A is negative."""
    old = torch.zeros(2, dtype=torch.float64)
    ppo, starts = PPOConfig(loss="gspo", gspo_clip_low=0.3, gspo_clip_high=0.4), torch.tensor([0, 2])
    for advantage, loss, slope in ((1.0, -0.5, -0.5), (-1.0, 0.7, 0.0)):
        logprobs = torch.tensor([2.0, 1 / 8], dtype=torch.float64).log().requires_grad_()
        tokens = gspo(logprobs, old, torch.full((2,), advantage, dtype=torch.float64), starts, ppo)
        torch.testing.assert_close(tokens.loss, torch.full((2,), loss, dtype=torch.float64))
        torch.testing.assert_close(gradient(tokens.loss.sum(), logprobs), torch.full((2,), slope, dtype=torch.float64))
        assert tokens.clipped.tolist() == [slope == 0.0] * 2


def test_cispo_keeps_the_gradient_of_what_is_clipped_by_hand():
    logprobs = torch.tensor([3.0, 0.1, 1.1], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, -2.0], dtype=torch.float64)
    tokens = cispo(logprobs, torch.zeros(3), advantages, torch.tensor([0, 3]), PPOConfig(clip_high=0.5))
    expected = torch.tensor([-1.5 * 2, -0.8 * 2, 1.1 * 2], dtype=torch.float64)
    torch.testing.assert_close(gradient(tokens.loss.sum(), logprobs), expected)
    assert tokens.clipped.tolist() == [True, True, False] and not tokens.dual_clipped.any()


@pytest.mark.parametrize("name", LOSSES)
def test_at_ratio_one_every_loss_has_the_plain_policy_gradient(name):
    logprobs, _, advantages = batch()
    tokens = LOSSES[name](logprobs, logprobs.detach(), advantages, STARTS, PPOConfig(loss=name))
    torch.testing.assert_close(gradient(tokens.loss.sum(), logprobs), -advantages)
    assert not tokens.clipped.any() and not tokens.dual_clipped.any()


# Against the oracles

CLIPS = {"gspo_clip_low": 0.1, "gspo_clip_high": 0.3}


@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("masked", [False, True])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_gspo_is_its_oracle_where_a_response_has_one_advantage(seed, dual_clip, masked):
    logprobs, old, advantages = batch(seed)
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    if mask is not None:
        mask[STARTS[:-1]] = True
    ppo = PPOConfig(loss="gspo", dual_clip=dual_clip, **CLIPS)
    tokens = checked_loss(gspo, logprobs, old, advantages, STARTS, ppo, mask)
    ours = oracle.aggregated(tokens.loss, STARTS, "sequence", longest=9, mask=mask)
    truth = oracle.gspo(logprobs, old, advantages, STARTS, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip, mask=mask)
    torch.testing.assert_close(ours, truth, check_dtype=False)
    torch.testing.assert_close(gradient(ours, logprobs), gradient(truth, logprobs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_is_its_oracle_and_so_under_a_mask(seed):
    logprobs, old, advantages = batch(seed)
    mask, clips = torch.arange(TOKENS) % 3 != 1, {"clip_low": 0.1, "clip_high": 0.4}
    truth = oracle.cispo(logprobs, old, advantages, **clips)
    ours = checked_loss(cispo, logprobs, old, advantages, STARTS, PPOConfig(loss="cispo", **clips)).loss
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(gradient(ours.sum(), logprobs), gradient(truth.sum(), logprobs))
    some = checked_loss(cispo, logprobs, old, advantages, STARTS, PPOConfig(loss="cispo", **clips), mask)
    torch.testing.assert_close(some.loss, torch.where(mask, truth, 0.0))
    assert not some.clipped[~mask].any() and some.clipped[mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_an_environment_wrote_gets_no_gradient(name):
    logprobs, old, advantages = batch()
    mask = torch.arange(TOKENS) % 2 == 0
    loss = checked_loss(LOSSES[name], logprobs, old, advantages, STARTS, PPOConfig(loss=name, **CLIPS), mask).loss
    assert not gradient(loss.sum(), logprobs)[~mask].any()


# How tokens add up: through the very terms of an update

VOCABULARY, WIDTH = 31, 8
RESPONSES = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
GOOD = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(LENGTH_OF)


def made(dtype=torch.float64):
    chance = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=chance, dtype=dtype, requires_grad=True)
    head = FusedHead(torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=chance, dtype=dtype)), None, None)
    stats = head(hidden, ops.linear_logprobs, RESPONSES, temperature=0.7)
    old = stats.logprobs.detach() + 0.4 * torch.randn(TOKENS, generator=chance, dtype=dtype)
    advantages = torch.randn(TOKENS, generator=chance, dtype=dtype)
    return SimpleNamespace(hidden=hidden, head=head, stats=stats, old=old, advantages=advantages)


def config(**ppo):
    plain = config_of("none")
    return replace(plain, ppo=PPOConfig(**ppo), sampling=replace(plain.sampling, temperature=0.7, max_new_tokens=12))


def of_term(term, made, settings, against):
    """The loss of a term and its sums, for a minibatch that is one microbatch."""
    ppo, count = settings.ppo, len(LENGTHS)
    divisors = {"token": TOKENS, "sequence": count, "constant": count * 12}
    targets = Targets(
        packed=SimpleNamespace(responses=RESPONSES, response_cu_seqlens=STARTS),
        old_logprobs=made.old,
        advantages=made.advantages,
        old_values=None,
        returns=None,
        divisors=Totals(divisors[ppo.aggregation], TOKENS, float(GOOD.sum())),
        kl_reference=against,
        shares=(1.0 / LENGTH_OF.double()).repeat_interleave(LENGTH_OF) if ppo.aggregation == "sequence" else None,
        good=GOOD if ppo.nll_coef else None,
    )
    return term(SimpleNamespace(head=made.head), made.hidden, targets, settings)


@pytest.mark.parametrize("extra", [False, True], ids=["alone", "entropy, KL, NLL"])
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", LOSSES)
def test_tokens_add_up_as_the_oracle_says_and_so_do_entropy_and_kl(name, how, extra):
    it = made()
    terms = {"entropy_coef": 0.3, "kl_in": "loss", "kl_kind": "k3", "nll_coef": 0.7} if extra else {}
    settings = config(loss=name, aggregate=how, **terms)
    ref = it.old + 0.2
    against = {"kl_coef": 0.5, "kl_kind": "k3", "ref_logprobs": ref} if extra else {}
    loss, sums = of_term(partial(loss_term, LOSSES[name]), it, settings, against)

    logprobs, ppo = it.stats.logprobs, settings.ppo
    tokens = LOSSES[name](logprobs, it.old, it.advantages, STARTS, ppo).loss
    kl = (ref - logprobs).exp() - 1 - (ref - logprobs)
    if extra:
        tokens = tokens - 0.3 * it.stats.entropy + 0.5 * kl
    truth = oracle.aggregated(tokens, STARTS, how, longest=12)
    if extra:
        truth = truth - 0.7 * logprobs[GOOD > 0].mean()
        assert float(sums.nll / GOOD.sum()) == pytest.approx(-float(logprobs.detach()[GOOD > 0].mean()))
    torch.testing.assert_close(loss, truth, check_dtype=False, rtol=1e-6, atol=1e-9)
    for one, other in zip(
        torch.autograd.grad(loss, [it.hidden, it.head.weight]),
        torch.autograd.grad(truth, [it.hidden, it.head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_the_fused_op_adds_up_the_same_where_it_is_used(how):
    it, settings = made(), config(aggregate=how, dual_clip=1.5)
    assert settings.ppo.loss_is_fused
    fused, plain = (of_term(term, it, settings, {}) for term in (clip_term, partial(loss_term, clip)))
    torch.testing.assert_close(fused[0], plain[0], check_dtype=False)
    torch.testing.assert_close(fused[1].policy, plain[1].policy, check_dtype=False)
    grads = [torch.autograd.grad(loss, [it.hidden, it.head.weight]) for loss, _ in (fused, plain)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"aggregate": "constant", "entropy_coef": 0.1, "kl_in": "loss", "kl_kind": "k3"}, True),
        ({"estimator": "grpo"}, True),  # a mean over sequences, of advantages alone
        ({"estimator": "grpo", "entropy_coef": 0.1}, False),
        ({"estimator": "grpo", "kl_in": "loss", "kl_kind": "k3"}, False),
        ({"nll_coef": 0.1}, False),
        ({"loss": "gspo"}, False),
    ],
)
def test_the_op_computes_what_it_can(changes, fused):
    assert PPOConfig(**changes).loss_is_fused == fused


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "token"),
        ({"estimator": "grpo"}, "sequence"),
        ({"estimator": "dr_grpo"}, "constant"),
        ({"estimator": "rloo"}, "token"),
        ({"loss": "gspo"}, "sequence"),
        ({"estimator": "dr_grpo", "loss": "gspo"}, "sequence"),
        ({"estimator": "grpo", "aggregate": "token"}, "token"),
        ({"estimator": "mine.py:f"}, "token"),
    ],
)
def test_auto_aggregates_as_it_was_published(changes, how):
    assert PPOConfig(**changes).aggregation == how


def test_far_ratios_stay_finite():
    logprobs = torch.tensor([-0.1, -0.2, -300.0], dtype=torch.float32, requires_grad=True)
    for name, loss in LOSSES.items():
        for old in (torch.full((3,), -200.0), torch.full((3,), -1e-3)):
            found = loss(logprobs, old, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 3]), PPOConfig(loss=name))
            assert math.isfinite(float(found.loss.sum())) and gradient(found.loss.sum(), logprobs).isfinite().all()
