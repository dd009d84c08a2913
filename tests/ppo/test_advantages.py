"""Estimators of advantages: GAE behind the seam, and another one that is added in one file of the user's."""

import re
from pathlib import Path

import pytest
import torch
import whole_runs

from fastppo import ops, train
from fastppo.config import Config, PPOConfig
from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.errors import FunctionError
from fastppo.ppo.advantages import (
    Advantages,
    adaptive_lambda,
    estimate_advantages,
    gae,
    load_estimator,
    whitened,
)
from fastppo.ppo.run import set_up

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "estimator.md"
GROUPS, CU_SEQLENS = torch.tensor([0, 0]), torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("estimators"))


# GAE, and what is the same for every estimator


def test_gae_is_the_op_with_the_configured_gamma_and_lambda():
    rewards, values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected = ops.gae(rewards, values, CU_SEQLENS, gamma=0.9, lam=0.8)
    estimated = gae(rewards, values, GROUPS, CU_SEQLENS, PPOConfig(gamma=0.9, lam=0.8))
    assert all(torch.equal(one, other) for one, other in zip(estimated, expected, strict=True))


def random_batch(*lengths):
    rewards, values = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return rewards, values, torch.zeros(len(lengths), dtype=torch.long), starts


def test_the_critic_learns_returns_of_its_own_lambda():
    batch = random_batch(2, 3, 1)
    both, of_actor, of_critic = (
        gae(*batch, PPOConfig(gamma=0.9, **lambdas))
        for lambdas in ({"lam": 0.8, "lam_critic": 1.0}, {"lam": 0.8}, {"lam": 1.0})
    )
    assert torch.equal(both.advantages, of_actor.advantages) and torch.equal(both.returns, of_critic.returns)
    assert not torch.equal(of_actor.returns, of_critic.returns)


def test_an_adaptive_lambda_grows_with_the_length():
    assert [adaptive_lambda(length, 0.05) for length in (1, 20, 40, 1000)] == pytest.approx([0, 0, 0.5, 0.98])


@pytest.mark.parametrize("lam_critic", [None, 1.0])
def test_with_an_adaptive_lambda_each_response_has_that_of_its_length(lam_critic):
    lengths = (1, 40, 7, 40, 300)
    rewards, values, groups, starts = random_batch(*lengths)
    ppo = PPOConfig(gamma=0.99, lam="adaptive", lam_critic=lam_critic)
    advantages, returns = gae(rewards, values, groups, starts, ppo)
    for i, length in enumerate(lengths):
        some, alone = slice(int(starts[i]), int(starts[i + 1])), torch.tensor([0, length], dtype=torch.int32)
        lam = max(0.0, 1 - 1 / (0.05 * length))
        own, own_returns = ops.gae(rewards[some], values[some], alone, gamma=0.99, lam=lam)
        if lam_critic is not None:
            own_returns = ops.gae(rewards[some], values[some], alone, gamma=0.99, lam=lam_critic)[1]
        torch.testing.assert_close(advantages[some], own)
        torch.testing.assert_close(returns[some], own_returns)


def test_gae_without_a_critic_is_an_error():
    with pytest.raises(FunctionError, match=r"ppo\.estimator is gae, which needs a critic"):
        gae(torch.zeros(5), None, GROUPS, CU_SEQLENS, PPOConfig())


def test_whitening_survives_a_large_mean():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1e6
    white = whitened(x)
    assert abs(float(white.mean())) < 1e-5
    assert float(white.var(correction=0)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "estimator", "whitens"),
    [
        ("auto", "gae", True),
        ("auto", "mine.py:f", True),
        ("auto", "grpo", False),
        (False, "gae", False),
        (True, "grpo", True),
    ],
)
def test_whitening_is_for_estimators_without_a_scale_of_their_own_unless_it_is_set(setting, estimator, whitens):
    assert PPOConfig(estimator=estimator, whiten_advantages=setting).whitens == whitens


def test_a_response_that_was_cut_is_terminal():
    rewards, values = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    _, returns = gae(rewards, values, torch.tensor([0]), cu_seqlens, PPOConfig(gamma=1, lam=1))
    assert returns.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.zeros(5), "returned Tensor, not fastppo.ppo.Advantages"),
        (
            Advantages(torch.zeros(2), torch.zeros(5)),
            r"advantages is a tensor of shape \(2,\), not .* each of 5 tokens",
        ),
        (Advantages(torch.zeros(5), [0.0] * 5), "returns is list"),
        (Advantages(torch.zeros(5), None), "returned no returns, and the critic learns them"),
    ],
)
def test_what_cannot_be_learned_from_is_an_error_that_names_the_setting(returned, words):
    ppo = PPOConfig(estimator="mine.py:estimator")
    with pytest.raises(FunctionError, match=f"ppo.estimator = mine.py:estimator.*{words}"):
        estimate_advantages(lambda *_: returned, torch.zeros(5), torch.zeros(5), GROUPS, CU_SEQLENS, ppo)


def test_without_a_critic_returns_may_be_missing():
    estimated = Advantages(torch.arange(5.0).double(), None)
    advantages, returns = estimate_advantages(
        lambda *_: estimated, torch.zeros(5), None, GROUPS, CU_SEQLENS, PPOConfig()
    )
    assert returns is None and advantages.dtype == torch.float32 and advantages.tolist() == [0, 1, 2, 3, 4]


# One of the user's own


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_an_estimator_is_one_file_of_the_users(world, folder, tmp_path, critic):
    """That of the page on how to add one. It gets each prompt's samples as a group; learning uses what it returns."""
    (code,) = re.findall(r"<<'PYTHON'\n(.*?)PYTHON\n", PAGE.read_text(), re.S)
    (file := tmp_path / "group.py").write_text(code)
    changes = {"sampling__samples_per_prompt": 4, "ppo__whiten_advantages": "false", "critic__kind": critic}
    argv = whole_runs.settings(folder, tmp_path / "run", ppo__estimator=f"{file}:group_mean", **changes)
    setup = set_up(parse(argv), world)
    experience = train.ppo_step(setup, setup.batches()).experience

    lengths = experience.packed.response_lengths.tolist()
    totals = torch.stack([part.sum() for part in experience.rewards.split(lengths)])
    baselines = totals.view(2, 4).mean(1).repeat_interleave(4)
    assert totals.std() > 0 and len(setup.progress.updates) == 4
    for advantage, total, baseline in zip(experience.advantages.split(lengths), totals, baselines, strict=True):
        torch.testing.assert_close(advantage, (total - baseline).expand(len(advantage)))
    for returned, total in zip(experience.returns.split(lengths), totals, strict=True):
        torch.testing.assert_close(returned, total.expand(len(returned)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:f", r"ppo.estimator = nowhere.py:f: nowhere.py could not be imported \(FileNotFoundError"),
        ("fastppo.ppo.advantages:nothing", "has no function nothing; it has: .*gae"),
    ],
)
def test_an_estimator_that_is_not_there_is_an_error_before_models_load(
    world, folder, tmp_path, monkeypatch, name, words
):
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(FunctionError, match=words):
        set_up(parse(whole_runs.settings(folder, tmp_path / "run", ppo__estimator=name)), world)
    assert not (tmp_path / "run").exists()


def test_what_an_estimator_raises_names_the_setting_and_the_line(tmp_path):
    file = tmp_path / "breaks.py"
    file.write_text("def estimator(rewards, values, groups, cu_seqlens, ppo):\n    return rewards[len(rewards)]\n")
    estimator = load_estimator(PPOConfig(estimator=f"{file}:estimator"))
    with pytest.raises(
        FunctionError, match=r"ppo.estimator = .*breaks.py:estimator raised IndexError.*\(breaks.py:2\)"
    ):
        estimator(torch.zeros(5), torch.zeros(5), GROUPS, CU_SEQLENS, PPOConfig())


def test_settings_that_a_run_wrote_before_the_seam_are_those_of_gae_and_clip():
    assert (Config().ppo.estimator, Config().ppo.loss) == ("gae", "clip")
