"""The oracle itself: known answers, gradients against finite differences, and what must hold for any numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.ops import eager, philox

ONE = torch.tensor(1.0)
INF = math.inf


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def packed(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


# Advantages


def test_gae_known_answer():
    rewards, values = fp64(0, 0, 5), fp64(1, 2, 3)
    advantages, returns = eager.gae(rewards, values, packed(3), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [1, 1, 2]
    assert returns.tolist() == [2, 3, 5]


def test_gae_carries_value_and_advantage_through_a_masked_token():
    mask = torch.tensor([True, False, True])
    rewards, values = fp64(1, 2, 3), fp64(0.5, 1, 1.5)
    advantages, returns = eager.gae(rewards, values, packed(3), gamma=1.0, lam=0.95, mask=mask)
    torch.testing.assert_close(advantages, fp64(3.425, 0, 1.5))
    torch.testing.assert_close(returns, fp64(3.925, 0, 3))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_is_the_discounted_sum_of_its_definition(lengths, gamma, lam, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    rewards, values = torch.randn(2, total, dtype=torch.float64)
    bootstrap = torch.randn(len(lengths), dtype=torch.float64)
    mask = torch.rand(total) < 0.7
    advantages, returns = eager.gae(
        rewards, values, packed(*lengths), gamma=gamma, lam=lam, bootstrap=bootstrap, mask=mask
    )
    for kept, last, of in zip(mask.split(lengths), bootstrap, range(len(lengths)), strict=True):
        r, v = (x.split(lengths)[of][kept] for x in (rewards, values))
        delta = r + gamma * torch.cat((v, last[None]))[1:] - v
        weights = fp64(*[(gamma * lam) ** i for i in range(len(r))])
        expected = [float((weights[: len(r) - t] * delta[t:]).sum()) for t in range(len(r))]
        torch.testing.assert_close(advantages.split(lengths)[of][kept], fp64(*expected))
        torch.testing.assert_close(returns.split(lengths)[of][kept], fp64(*expected) + v)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_keeps_nan_and_masked_numbers_where_they_are():
    rewards = fp64(1, math.nan, 3, math.nan, 5)
    mask = torch.tensor([True, True, True, False, True])
    cut, _ = eager.gae(rewards, torch.ones(5), packed(2, 3), gamma=1.0, lam=1.0, mask=mask)
    assert cut[:2].isnan().all() and cut[2:].isfinite().all()


def test_gae_without_tokens():
    advantages, returns = eager.gae(torch.empty(0), torch.empty(0), packed(0, 0), gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == (0,)


# The vocabulary


def random_logits(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 5), st.integers(1, 40), st.floats(0.3, 2), st.integers(0, 999))
def test_token_stats_stay_in_their_bounds(rows, vocabulary, temperature, seed):
    logits, ref_logits = random_logits(rows, vocabulary, seed), random_logits(rows, vocabulary, seed + 1)
    targets = torch.arange(rows) % vocabulary
    stats = eager.token_logprobs(logits, targets, temperature=temperature, ref_logits=ref_logits)
    assert stats.kl is not None and stats.ref_logprobs is not None
    assert (stats.logprobs <= 0).all() and (stats.ref_logprobs <= 0).all()
    assert (stats.entropy >= 0).all() and (stats.entropy <= math.log(vocabulary) + 1e-12).all()
    assert (stats.kl >= -1e-12).all()
    shifted = eager.token_logprobs(logits + 100, targets, temperature=temperature, ref_logits=ref_logits - 7)
    for name in ("logprobs", "entropy", "ref_logprobs", "kl"):
        torch.testing.assert_close(getattr(shifted, name), getattr(stats, name), atol=1e-10, rtol=1e-10)
    equal = eager.token_logprobs(logits, targets, temperature=temperature, ref_logits=logits)
    assert equal.kl is not None and not equal.kl.any()


def test_token_stats_agree_with_torch_distributions():
    logits, ref_logits = random_logits(6, 11, 0), random_logits(6, 11, 1)
    targets = torch.arange(6)
    stats = eager.token_logprobs(logits, targets, temperature=0.7, ref_logits=ref_logits)
    policy, ref = (torch.distributions.Categorical(logits=x / 0.7) for x in (logits, ref_logits))
    torch.testing.assert_close(stats.logprobs, policy.log_prob(targets))
    torch.testing.assert_close(stats.ref_logprobs, ref.log_prob(targets))
    torch.testing.assert_close(stats.entropy, policy.entropy())
    torch.testing.assert_close(stats.kl, torch.distributions.kl_divergence(policy, ref))


def test_an_entry_of_minus_infinity_is_as_if_it_were_not_there():
    logits, ref_logits = random_logits(4, 9, 0), random_logits(4, 9, 1)
    holes = torch.tensor([1, 4, 8])
    rest = torch.tensor([0, 2, 3, 5, 6, 7])
    targets = torch.zeros(4, dtype=torch.int64)
    whole = logits.index_fill(1, holes, -INF).requires_grad_()
    part = logits[:, rest].requires_grad_()
    ref_part = ref_logits[:, rest] - ref_logits.logsumexp(-1, keepdim=True)
    with_holes = eager.token_logprobs(whole, targets, ref_logits=ref_logits)
    without = eager.token_logprobs(part, targets, ref_logits=ref_part)
    outside = ref_part.logsumexp(-1)  # the reference has probability in the holes, too
    assert with_holes.kl is not None and without.kl is not None
    torch.testing.assert_close(with_holes.entropy, without.entropy)
    torch.testing.assert_close(with_holes.kl, without.kl - outside)
    for stats in (with_holes, without):
        (stats.logprobs + stats.entropy + stats.kl).sum().backward()
    assert whole.grad is not None and part.grad is not None
    torch.testing.assert_close(whole.grad[:, rest], part.grad)
    assert not whole.grad[:, holes].any()


def test_kl_is_infinite_where_the_reference_excludes_a_token_and_passes_no_gradient():
    logits = random_logits(2, 5, 0).requires_grad_()
    ref_logits = random_logits(2, 5, 1)
    ref_logits[0, 3] = -INF
    stats = eager.token_logprobs(logits, torch.tensor([3, 0]), ref_logits=ref_logits)
    assert stats.kl is not None and stats.ref_logprobs is not None
    assert stats.kl[0] == INF and stats.kl[1].isfinite() and stats.ref_logprobs[0] == -INF
    (grad,) = torch.autograd.grad(stats.kl.sum(), logits)
    assert not grad[0].any() and grad[1].any() and grad.isfinite().all()


def test_the_reference_receives_no_gradient_even_under_the_same_weight():
    hidden, ref_hidden = random_logits(3, 4, 0).requires_grad_(), random_logits(3, 4, 1).requires_grad_()
    weight = random_logits(5, 4, 2).requires_grad_()
    targets = torch.arange(3)
    shared = eager.linear_logprobs(hidden, weight, targets, ref_hidden=ref_hidden, ref_weight=weight)
    apart = eager.linear_logprobs(hidden, weight, targets, ref_hidden=ref_hidden, ref_weight=weight.detach().clone())
    assert shared.kl is not None and apart.kl is not None and shared.ref_logprobs is not None
    assert not shared.ref_logprobs.requires_grad
    (d_shared,) = torch.autograd.grad(shared.kl.sum(), weight)
    (d_apart,) = torch.autograd.grad(apart.kl.sum(), weight)
    assert torch.equal(d_shared, d_apart)


# Gradients against finite differences


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_of_token_logprobs(softcap):
    logits, ref_logits, targets = random_logits(3, 5, 0), random_logits(3, 5, 1), torch.tensor([0, 4, 2])

    def differentiable(x: Tensor) -> tuple[Tensor | None, ...]:
        stats = eager.token_logprobs(x, targets, temperature=0.8, softcap=softcap, ref_logits=ref_logits)
        return stats.logprobs, stats.entropy, stats.lse, stats.kl

    assert torch.autograd.gradcheck(differentiable, logits.requires_grad_())


@pytest.mark.parametrize("kind", ["exact", "k2", "k3"])
def test_gradients_of_linear_policy_loss(kind):
    hidden, weight, bias = (
        x.requires_grad_() for x in (random_logits(6, 3, 0), random_logits(5, 3, 1), fp64(*range(5)))
    )
    targets = torch.arange(6) % 5
    old = eager.linear_logprobs(hidden, weight, targets, bias=bias).logprobs.detach() + 0.3 * random_logits(1, 6, 2)[0]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager.linear_policy_loss(
            hidden,
            weight,
            targets,
            old,
            fp64(1, -1, 2, -2, 0.5, -0.5),
            bias=bias,
            temperature=0.9,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=1.5,
            entropy_coef=0.1,
            kl_coef=0.2,
            kl_kind=kind,
            ref_logprobs=old - 0.1,
            ref_hidden=random_logits(6, 3, 3),
            ref_weight=random_logits(5, 3, 4),
            normalizer=torch.tensor(6.0),
            mask=torch.tensor([True, True, True, True, True, False]),
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_gradients_of_value_loss():
    def loss(values: Tensor) -> Tensor:
        return eager.value_loss(values, fp64(0, 0, 0), fp64(1, -1, 0.1), clip=0.2, normalizer=ONE)[0]

    assert torch.autograd.gradcheck(loss, fp64(0.5, 0.3, 0.1).requires_grad_())


# Losses


def losses_per_token(ratios: list[float], advantages: list[float], **options: float) -> list[float]:
    made = []
    for ratio, advantage in zip(ratios, advantages, strict=True):
        loss, _ = eager.policy_loss(
            fp64(math.log(ratio)), fp64(0), fp64(advantage), clip_low=0.2, clip_high=0.2, normalizer=ONE, **options
        )
        made.append(loss.item())
    return made


def test_dual_clip_known_answer():
    assert losses_per_token([2, 2, 0.5], [2, -2, 2], dual_clip=1.5) == pytest.approx([-2.4, 3, -1])
    assert losses_per_token([2, 2, 0.5], [2, -2, 2]) == pytest.approx([-2.4, 4, -1])


def test_policy_stats_are_the_sums_over_unmasked_tokens():
    ratio = fp64(2, 2, 0.5, 1, 9)
    mask = torch.tensor([True, True, True, True, False])
    loss, stats = eager.policy_loss(
        ratio.log(),
        torch.zeros(5),
        fp64(2, -2, 2, 1, INF),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=1.5,
        entropy=fp64(1, 2, 3, 4, INF),
        entropy_coef=0.5,
        kl=fp64(0.1, 0.2, 0.3, 0.4, INF),
        kl_coef=2.0,
        normalizer=torch.tensor(4.0),
        mask=mask,
    )
    k3 = float((ratio[:4] - 1 - ratio[:4].log()).sum())
    torch.testing.assert_close(stats.sums, fp64(-2.4 + 3 - 1 - 1, 10, 1, k3, 1, 1, 5.5, 4))
    assert stats.ratio_max == 2
    assert loss.item() == pytest.approx((-1.4 - 0.5 * 10 + 2 * 1) / 4)


def test_the_clip_stops_the_gradient_on_its_own_side_only():
    logprobs = fp64(2, 2, 0.5, 0.5, 1).log().requires_grad_()
    advantages = fp64(1, -1, 1, -1, 1)
    loss, _ = eager.policy_loss(logprobs, torch.zeros(5), advantages, clip_low=0.2, clip_high=0.2, normalizer=ONE)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, fp64(0, 2, -0.5, 0, -1))


def test_a_ratio_beyond_e20_is_finite_and_still_pushed_back():
    logprobs = torch.tensor([0.0, -500.0]).requires_grad_()
    loss, stats = eager.policy_loss(
        logprobs, torch.tensor([-500.0, 0.0]), -torch.ones(2), clip_low=0.2, clip_high=0.2, normalizer=ONE
    )
    loss.backward()
    assert loss.isfinite() and stats.sums.isfinite().all()
    assert stats.ratio_max.item() == pytest.approx(math.exp(20) * 481)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([math.exp(20), 0])


DISTANCES = (-20.0, -7.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 7.0, 19.9, 20.0, 20.1, 29.0, 500.0)


def test_k3_and_its_slope_are_right_at_every_distance_that_does_not_overflow():
    d = fp64(*DISTANCES).requires_grad_()
    k3 = eager.kl_estimate(d, torch.zeros(len(d)), "k3")
    (slope,) = torch.autograd.grad(k3.sum(), d)
    torch.testing.assert_close(k3, fp64(*(math.expm1(-x) + x for x in DISTANCES)), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, fp64(*(-math.expm1(-x) for x in DISTANCES)), rtol=1e-12, atol=0)


def test_k3_beyond_its_bound_is_finite_and_goes_on_rising():
    d = torch.tensor([-1e6, -300.0, -20.5, -20.0]).requires_grad_()
    k3 = eager.kl_estimate(d, torch.zeros(4), "k3")
    (slope,) = torch.autograd.grad(k3.sum(), d)
    assert k3.isfinite().all() and (k3.diff() < 0).all()
    torch.testing.assert_close(slope, torch.full((4,), 1 - math.exp(20)))


def test_the_approximate_kl_is_right_where_the_ratio_has_vanished():
    """A token 29 nats less likely than before: k3 of the old policy to the new is 28, as in the loss."""
    _, stats = eager.policy_loss(fp64(-29), fp64(0), fp64(1), clip_low=0.2, clip_high=0.2, normalizer=ONE)
    assert stats.sums[3].item() == pytest.approx(28)


def test_losses_without_tokens_are_zero():
    none = torch.empty(0, requires_grad=True)
    loss, stats = eager.policy_loss(none, none, none, clip_low=0.2, clip_high=0.2, normalizer=ONE)
    value, value_stats = eager.value_loss(none, none, none, clip=0.2, normalizer=ONE)
    (loss + value).backward()
    assert loss == value == stats.ratio_max == 0 and not stats.sums.any() and not value_stats.sums.any()


def test_kl_estimates_known_answers():
    d = fp64(0.5, -1)
    torch.testing.assert_close(eager.kl_estimate(d, fp64(0, 0), "k2"), fp64(0.125, 0.5))
    k3 = fp64(math.exp(-0.5) - 0.5, math.e - 2)
    torch.testing.assert_close(eager.kl_estimate(d, fp64(0, 0), "k3"), k3)
    with pytest.raises(ValueError, match="kl_kind is 'k1'"):
        eager.kl_estimate(d, d, "k1")


def test_value_loss_known_answer():
    values, old, returns = fp64(1, 0.1, 9), fp64(0, 0, 0), fp64(2, 1, 9)
    mask = torch.tensor([True, True, False])
    loss, stats = eager.value_loss(values, old, returns, clip=0.2, normalizer=torch.tensor(2.0), mask=mask)
    # The first moves too far (0.2 instead of 1: 1.8^2 against 1), the second does not (0.9^2).
    assert loss.item() == pytest.approx((3.24 + 0.81) / 2 / 2)
    torch.testing.assert_close(stats.sums, fp64((3.24 + 0.81) / 2, 1, 1.1, 1.01, 3, 5, 1.81))


# Random numbers

KNOWN_VECTORS = [  # Random123's kat_vectors: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_VECTORS)
def test_philox_gives_the_published_vectors(counter, key, output):
    made = philox.philox(torch.tensor(words(counter))[:, None], (words(key)[0], words(key)[1]))
    assert made[:, 0].tolist() == words(output)


def test_uniform_takes_key_and_counter_from_seed_offset_and_stream():
    """The third vector again, through 64-bit arguments whose upper bits are set."""
    counter, key, output = (words(text) for text in KNOWN_VECTORS[2])

    def signed(low: int, high: int) -> int:
        return int.from_bytes((high << 32 | low).to_bytes(8, "little"), "little", signed=True)

    stream, offset = torch.tensor([signed(*counter[2:])]), torch.tensor([signed(*counter[:2])])
    u = philox.uniform(signed(key[0], key[1]), stream, offset)
    assert u.item() == ((output[0] >> 9) + 0.5) / 2**23


def test_uniform_is_inside_the_open_interval_in_fp32_too():
    u = philox.uniform(0, torch.zeros(2**16, dtype=torch.int64), torch.arange(2**16))
    assert torch.equal(u.float().double(), u) and u.min() > 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 0.005
    assert torch.tensor((2**23 - 1 + 0.5) / 2**23, dtype=torch.float32) < 1


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(0, 999))
def test_the_oracle_draws_what_the_distribution_function_says(vocabulary, seed):
    logits = random_logits(4, vocabulary, seed)
    stream, offset = torch.arange(4), torch.full((4,), seed)
    tokens, logprobs = eager.sample_tokens(logits, temperature=0.7, seed=1, stream=stream, offset=offset)
    p = (logits / 0.7).softmax(-1)
    for row, (token, u) in enumerate(zip(tokens.tolist(), philox.uniform(1, stream, offset).tolist(), strict=True)):
        assert p[row, :token].sum() <= u + 1e-12 and u - 1e-12 < p[row, : token + 1].sum()
    torch.testing.assert_close(logprobs.double(), p.log().gather(1, tokens[:, None])[:, 0], atol=1e-6, rtol=1e-6)
