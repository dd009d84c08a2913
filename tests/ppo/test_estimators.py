"""Estimators without a critic: known answers, the fp64 oracles, and gradients of a bandit whose answer is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo import ops
from fastppo.config import PPOConfig
from fastppo.errors import FunctionError
from fastppo.ops.eager import estimators as oracle
from fastppo.ppo.advantages import ESTIMATORS, estimate_advantages, gae, load_estimator, whitened

WITHOUT_CRITIC = [name for name in ESTIMATORS if name != "gae"]
OF_GROUPS = [name for name in WITHOUT_CRITIC if name != "reinforce++"]


def estimate(name, rewards, groups, lengths, *, mask=None, gamma=1.0):
    """(M,): before whitening."""
    ppo = PPOConfig(estimator=name, gamma=gamma)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = (torch.as_tensor(rewards, dtype=torch.float32), None, torch.as_tensor(groups), starts)
    advantages, returns = estimate_advantages(load_estimator(ppo), *arguments, ppo, mask)
    assert returns is None
    return advantages


def on_last_tokens(scores, lengths):
    """(M,), each score on the last token of its response."""
    rewards = torch.zeros(sum(lengths))
    rewards[torch.tensor(lengths).cumsum(0) - 1] = torch.tensor(scores, dtype=torch.float32)
    return rewards


# By hand


def test_scores_of_one_group_by_hand():
    """Scores 1, 0, 0, 3 of responses of 2, 1, 3 and 1 tokens: the mean is 1, the squares add up to 6, n - 1 is 3."""
    lengths, std = (2, 1, 3, 1), math.sqrt(2.0)
    rewards = on_last_tokens([1, 0, 0, 3], lengths)
    above = {
        "dr_grpo": [0, -1, -1, 2],
        "grpo": [0, -1 / (std + 1e-6), -1 / (std + 1e-6), 2 / (std + 1e-6)],
        "rloo": [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3],
        "reinforce++": [1, 0, 0, 3],
        "reinforce++_baseline": [0, -1, -1, 2],
    }
    for name, of_response in above.items():
        expected = torch.tensor(of_response, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))
        torch.testing.assert_close(estimate(name, rewards, [0, 0, 0, 0], lengths), expected, msg=name)


def test_groups_know_nothing_of_each_other():
    scores, lengths = [1.0, 0.0, 5.0, 9.0, 4.0], (1, 2, 1, 3, 2)
    groups = [1, 1, 0, 0, 0]  # of unequal size, and not in order
    found = estimate("dr_grpo", on_last_tokens(scores, lengths), groups, lengths)
    assert found.tolist() == [0.5, -0.5, -0.5, -1, 3, 3, 3, -2, -2]


def test_rewards_of_tokens_are_summed_in_a_response_and_discounted_to_go():
    rewards, lengths = torch.tensor([-0.5, 2.0, 1.0, -1.0, 0.5]), (2, 3)
    assert estimate("rloo", rewards, [0, 0], lengths).tolist() == [1, 1, -1, -1, -1]  # 1.5 and 0.5
    assert estimate("reinforce++", rewards, [0, 0], lengths, gamma=0.5).tolist() == [0.5, 2, 0.625, -0.75, 0.5]
    to_go = torch.tensor([1.5, 2.0, 0.5, -0.5, 0.5]) - 1.0
    assert estimate("reinforce++_baseline", rewards, [0, 0], lengths).tolist() == to_go.tolist()


@pytest.mark.parametrize("name", OF_GROUPS)
@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, -3.3e-5, 1e30])
def test_equal_scores_teach_nothing(name, score):
    """Exactly: what rounding would leave, GRPO would divide by its own size."""
    lengths = (1, 4, 2, 1, 5, 1, 1)
    found = estimate(name, on_last_tokens([score] * 7, lengths), [0] * 7, lengths)
    assert found[torch.tensor(lengths).cumsum(0) - 1].tolist() == [0.0] * 7


def test_reinforce_pp_compares_with_the_whole_batch_once_it_is_whitened():
    lengths = (1, 1, 2)
    white = whitened(estimate("reinforce++", on_last_tokens([1, 3, 5], lengths), [0, 1, 2], lengths))
    plain = torch.tensor([1.0, 3.0, 5.0, 5.0])
    torch.testing.assert_close(white, (plain - 3.5) / plain.std(correction=0))


@pytest.mark.parametrize("name", OF_GROUPS)
def test_one_response_has_nothing_to_be_compared_with(name):
    with pytest.raises(FunctionError, match=r"one response.*samples_per_prompt"):
        estimate(name, [1.0, 2.0, 3.0], [0, 0, 1], (1, 1, 1))


# Against the oracles


@st.composite
def batches(draw):
    groups = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))  # responses to each prompt
    lengths = draw(st.lists(st.integers(1, 6), min_size=sum(groups), max_size=sum(groups)))
    owners = [group for group, count in enumerate(groups) for _ in range(count)]
    seed = draw(st.integers(0, 2**31))
    return draw(st.permutations(owners)), lengths, seed, draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from(WITHOUT_CRITIC), st.sampled_from([1.0, 0.9]))
def test_every_estimator_is_its_oracle(batch, name, gamma):
    groups, lengths, seed, masked = batch
    chance = torch.Generator().manual_seed(seed)
    rewards, mask = torch.randn(sum(lengths), generator=chance), None
    if masked:  # an environment wrote some tokens; a response begins with one of the policy's
        mask = torch.rand(sum(lengths), generator=chance) < 0.6
        mask[torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
        rewards = rewards * mask
    starts = torch.tensor([0, *lengths]).cumsum(0)
    wide, owners = rewards.double(), torch.tensor(groups)
    expected = {
        "grpo": lambda: oracle.grpo(wide, owners, starts, mask=mask),
        "dr_grpo": lambda: oracle.dr_grpo(wide, owners, starts, mask=mask),
        "rloo": lambda: oracle.rloo(wide, owners, starts, mask=mask),
        "reinforce++": lambda: oracle.rewards_to_go(wide, starts, gamma=gamma, mask=mask),
        "reinforce++_baseline": lambda: oracle.less_group_mean(wide, owners, starts, gamma=gamma, mask=mask),
    }[name]()
    found = estimate(name, rewards, groups, lengths, mask=mask, gamma=gamma)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lam", [0.9, "adaptive"])
def test_gae_carries_through_what_an_environment_wrote(lam):
    """Values at masked tokens do not matter, and the tokens behind count as the next ones."""
    rewards, values = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    starts, ppo = torch.tensor([0, 5, 9], dtype=torch.int32), PPOConfig(lam=lam, lam_alpha=0.5, gamma=0.9)
    whole = estimate_advantages(gae, rewards, values, torch.tensor([0, 1]), starts, ppo, mask)
    written = torch.tensor([0, 3, 6], dtype=torch.int32)
    alone = gae(rewards[mask], values[mask], torch.tensor([0, 1]), written, ppo)
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one[mask], other) and not one[~mask].any()
    if lam != "adaptive":
        direct = ops.gae(rewards, values, starts, gamma=0.9, lam=0.9, mask=mask)
        torch.testing.assert_close(whole.advantages, direct[0])


def test_whitening_leaves_out_what_an_environment_wrote():
    x, mask = torch.tensor([1.0, 100.0, 3.0, 5.0]), torch.tensor([True, False, True, True])
    assert torch.equal(whitened(x, mask)[mask], whitened(x[mask])) and whitened(x, mask)[1] == 0


# A bandit with two arms: pi(1) = sigmoid(theta), and arm 1 earns REWARDS[1]. The exact gradient of the mean reward by
# theta is p (1 - p) (REWARDS[1] - REWARDS[0]). Responses are one token long; a batch is one group of N.

THETA, REWARDS, N, DRAWS = -0.4, (0.3, 1.1), 4, 20_000
P = 1 / (1 + math.exp(-THETA))
EXACT = P * (1 - P) * (REWARDS[1] - REWARDS[0])
OUTCOMES = list(itertools.product((0, 1), repeat=N))  # the arms that a batch may have drawn
CHANCES = torch.tensor([math.prod(P if arm else 1 - P for arm in arms) for arms in OUTCOMES], dtype=torch.float64)
SCORES = torch.tensor([[arm - P for arm in arms] for arms in OUTCOMES], dtype=torch.float64)  # d log pi(arm) / d theta


def gradients(advantages):
    """(outcomes,): of the objective by theta at ratio 1, the mean over a batch's tokens of A d log pi / d theta."""
    return (torch.stack([a.double() for a in advantages]) * SCORES).mean(1)


def of_rewards(function):
    return [function(torch.tensor([REWARDS[arm] for arm in arms])) for arms in OUTCOMES]


GROUPS, ONES, STARTS = torch.zeros(N, dtype=torch.long), (1,) * N, torch.arange(N + 1)


def by_estimator(name):
    if name == "gae":  # with a critic that knows neither arm
        ppo, starts = PPOConfig(), STARTS.int()
        return of_rewards(lambda r: gae(r, torch.full((N,), 0.5), GROUPS, starts, ppo).advantages)
    raw = of_rewards(lambda r: estimate(name, r, GROUPS, ONES))
    return [whitened(a) for a in raw] if PPOConfig(estimator=name).whitens else raw


def white(x):
    """What an oracle's advantages are once whitened, in Python floats."""
    mean = sum(x.tolist()) / len(x)
    variance = sum((v - mean) ** 2 for v in x.tolist()) / len(x)
    return torch.tensor([(v - mean) / math.sqrt(variance + 1e-8) for v in x.tolist()], dtype=torch.float64)


# The expectation of each estimator's gradient: exact, a known part of it, or by the oracle over all groups.
EXPECTED = {
    "gae": lambda: EXACT,
    "rloo": lambda: EXACT,
    "dr_grpo": lambda: (1 - 1 / N) * EXACT,
    "grpo": lambda: enumerated(lambda r: oracle.grpo(r, GROUPS, STARTS)),
    "reinforce++": lambda: enumerated(lambda r: white(oracle.rewards_to_go(r, STARTS, gamma=1.0))),
    "reinforce++_baseline": lambda: enumerated(lambda r: white(oracle.less_group_mean(r, GROUPS, STARTS, gamma=1.0))),
}


def enumerated(function):
    return float((CHANCES * gradients(of_rewards(lambda r: function(r.double())))).sum())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_gradient_of_a_bandit_is_the_expected_one(name):
    of_outcome = gradients(by_estimator(name))
    drawn = of_outcome[torch.multinomial(CHANCES, DRAWS, True, generator=torch.Generator().manual_seed(1))]
    error = float(drawn.std()) / math.sqrt(DRAWS)
    assert abs(float(drawn.mean()) - EXPECTED[name]()) < 3 * error
    assert float(drawn.mean()) > 10 * error  # the test could tell it from 0


def test_the_biased_estimators_are_off_by_what_the_docs_say():
    """docs/estimators.md: of those that divide by a spread, for this bandit and groups of 4."""
    shares = {name: EXPECTED[name]() / EXACT for name in EXPECTED}
    assert shares["dr_grpo"] == pytest.approx(0.75)
    assert shares["grpo"] == pytest.approx(1.75, abs=0.005)
    assert shares["reinforce++"] == shares["reinforce++_baseline"] == pytest.approx(2.03, abs=0.005)
