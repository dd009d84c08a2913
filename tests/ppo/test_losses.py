"""Losses of the policy: the clip as a plain function against the fused op, and another one in a file of the user's."""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import whole_runs
from ppo_step import config_of, step

from fastppo import ops, train
from fastppo.config import PPOConfig
from fastppo.config.command_line import parse
from fastppo.data import pack
from fastppo.distributed.world import start_world
from fastppo.errors import FunctionError
from fastppo.models.roles import FusedHead
from fastppo.ppo.losses import TokenLoss, checked_loss, clip, load_loss
from fastppo.ppo.run import set_up
from fastppo.ppo.terms import Targets, Totals, clip_term, loss_term

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "loss.md"
PACKED = pack([[1] * (3 + n) for n in (1, 5, 9, 17)], [1, 5, 9, 17])
TOKENS, WIDTH, VOCABULARY = 32, 8, 61
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


# The plain clip against the fused op


def batch(dtype, seed=0):
    """Hidden states and a head, and old logprobs around the new ones: ratios on both sides of every clip."""
    torch.manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight, ref_weight = torch.randn(2, VOCABULARY, WIDTH, dtype=dtype)
    head = FusedHead(torch.nn.Parameter(weight), torch.nn.Parameter(torch.randn(VOCABULARY, dtype=dtype)), 9.0, 1.5)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    logprobs = head(hidden, ops.linear_logprobs, targets, temperature=0.7).logprobs
    old = logprobs.detach() + torch.randn(TOKENS, dtype=dtype)
    return SimpleNamespace(
        hidden=hidden,
        head=head,
        targets=targets,
        old=old,
        advantages=torch.randn(TOKENS, dtype=dtype),
        reference={"ref_hidden": torch.randn(TOKENS, WIDTH, dtype=dtype), "ref_weight": ref_weight, "ref_bias": None},
        ref_logprobs=old + torch.randn(TOKENS, dtype=dtype),
    )


def measured(term, made, against, config, weights=None):
    """Loss, sums and gradients of a term of the update."""
    packed = SimpleNamespace(responses=made.targets, response_cu_seqlens=PACKED.response_cu_seqlens)
    divisors = Totals(TOKENS / 2, TOKENS, 0)
    targets = Targets(packed, made.old, made.advantages, made.old, made.old, divisors, against, weights)
    loss, sums = term(SimpleNamespace(head=made.head), made.hidden, targets, config)
    gradients = torch.autograd.grad(loss, [made.hidden, made.head.weight, made.head.bias])
    return loss.detach(), sums.policy, sums.ratio_max, *gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kl", [None, "exact", "k2", "k3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_low": 0.1, "clip_high": 0.4}, {"dual_clip": 1.5, "entropy_coef": 0.1}],
    ids=["clip", "asymmetric", "dual, entropy"],
)
def test_the_plain_clip_and_the_fused_op_agree_gradients_included(dtype, kl, options):
    made = batch(dtype)
    config = dataclasses.replace(config_of("none"), ppo=PPOConfig(**options))
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, temperature=0.7))
    against = {} if kl is None else {"kl_coef": 0.3, "kl_kind": kl}
    against |= {None: {}, "exact": made.reference}.get(kl, {"ref_logprobs": made.ref_logprobs})
    fused = measured(clip_term, made, against, config)
    plain = measured(partial(loss_term, clip), made, against, config)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, **tolerance, check_dtype=False)
    clipped, dual_clipped = fused[1][4:6].tolist()
    assert 0 < clipped < TOKENS and (0 < dual_clipped < TOKENS) == ("dual_clip" in options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kl", ["exact", "k2", "k3"])
def test_weights_are_the_same_in_both_and_leave_entropy_and_kl_as_they_are(dtype, kl):
    made = batch(dtype)
    config = dataclasses.replace(config_of("none"), ppo=PPOConfig(dual_clip=1.5, entropy_coef=0.1))
    against = {"kl_coef": 0.3, "kl_kind": kl} | (
        made.reference if kl == "exact" else {"ref_logprobs": made.ref_logprobs}
    )
    weights = torch.rand(TOKENS, dtype=dtype) * 2 * (torch.arange(TOKENS) % 3 > 0)
    fused = measured(clip_term, made, against, config, weights)
    plain = measured(partial(loss_term, clip), made, against, config, weights)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, **tolerance, check_dtype=False)

    found, nothing = (
        partial(measured, partial(loss_term, clip), made, against, config)(w) for w in (None, weights * 0)
    )
    assert fused[1][0] != found[1][0] and nothing[1][0] == 0
    assert nothing[1][4:6].tolist() == [0, 0]  # no clip holds what has no weight
    for sums in (fused[1], nothing[1]):  # entropy, KL, approximate KL, ratio, tokens
        torch.testing.assert_close(sums[[1, 2, 3, 6, 7]], found[1][[1, 2, 3, 6, 7]], **tolerance, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_under_a_mask_the_fused_op_is_the_plain_clip_of_the_tokens_left(dtype):
    made, ppo = batch(dtype), PPOConfig(dual_clip=2.0)
    mask = torch.arange(TOKENS) % 3 > 0
    scale = {"temperature": 0.7, "bias": made.head.bias, "softcap": 9.0, "logit_scale": 1.5}
    leaves = [made.hidden, made.head.weight, made.head.bias]
    clips = {"clip_low": ppo.clip_low, "clip_high": ppo.clip_high, "dual_clip": ppo.dual_clip}
    tokens = (made.hidden, made.head.weight, made.targets)
    fused, stats = ops.linear_policy_loss(
        *tokens, made.old, made.advantages, **scale, **clips, normalizer=7.0, mask=mask
    )
    logprobs = ops.linear_logprobs(*tokens, **scale).logprobs
    found = clip(logprobs, made.old, made.advantages, PACKED.response_cu_seqlens, ppo)
    plain = found.loss[mask].sum() / 7.0
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5, check_dtype=False)
    close(plain, fused)
    close(torch.autograd.grad(plain, leaves), torch.autograd.grad(fused, leaves))
    assert [float(x[mask].sum()) for x in (found.clipped, found.dual_clipped)] == stats.sums[4:6].tolist()


# Under every kind of engine: DeepSpeed's hooks, adapters, the value head, a reference that is read beside the actor


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """At stage 3 every weight is split: by default DeepSpeed leaves small ones whole."""
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps(SPLIT_ALL))
    return ["--zero.stage", "3", "--zero.deepspeed", str(path)]


EXACT = ["--ppo.kl_in", "loss", "--ppo.kl_kind", "exact", "--ppo.kl_coef", "5", "--ppo.entropy_coef", "0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--actor.lora.rank", "4"], EXACT], ids=["LoRA", "exact KL in the loss"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("stage", ["0", "3"])
def test_updates_by_the_plain_clip_are_those_by_the_fused_op(world, model, split, stage, critic, more):
    settings = ["--critic.kind", critic, "--ppo.epochs", "2", "--ppo.microbatch_tokens", "40", *more]
    settings += split if stage == "3" else ["--zero.stage", "0"]
    fused = step(config_of(model, *settings), world)
    plain = step(config_of(model, *settings, "--ppo.loss", "fastppo.ppo.losses:clip"), world)
    assert len(fused.updates) == 2 and fused.updates[1].approx_kl > 1e-4
    for one, other in zip(plain.updates, fused.updates, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other), rel=1e-3, abs=1e-5)
    for name, parameter in fused.parameters.items():
        torch.testing.assert_close(plain.parameters[name], parameter, rtol=0, atol=1e-4)


# One of the user's own


@pytest.fixture
def spo(tmp_path):
    """The loss of the page on how to add one, as a file."""
    (code,) = re.findall(r"<<'PYTHON'\n(.*?)PYTHON\n", PAGE.read_text(), re.S)
    (file := tmp_path / "own_loss.py").write_text(code)
    return f"{file}:spo"


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_loss_is_one_file_of_the_users(world, spo, tmp_path, critic):
    folder = whole_runs.prepare(tmp_path)
    argv = whole_runs.settings(
        folder, tmp_path / "run", ppo__loss=spo, steps=1, critic__kind=critic, eval__prompts=0, eval__every=0
    )
    assert train.train(parse(argv), world)
    (first, *_) = (record for record in whole_runs.records(tmp_path / "run") if "policy_loss" in record)
    assert first["approx_kl"] > 0 and math.isfinite(first["policy_loss"]) and first["entropy"] > 0
    assert first["clip_fraction"] is None or math.isnan(first["clip_fraction"])  # it tells of no clip


def test_a_loss_of_the_users_begins_as_the_clip_and_then_goes_its_own_way(world, model, spo):
    """At ratio 1 both have the value and the gradient of the plain policy gradient."""
    epochs = ["--ppo.epochs", "3"]
    own = step(config_of(model, *epochs, "--ppo.loss", spo), world)
    fused = step(config_of(model, *epochs), world)
    for name in ("policy_loss", "actor_grad_norm", "ratio_mean", "entropy"):
        assert getattr(own.updates[0], name) == pytest.approx(getattr(fused.updates[0], name), rel=1e-4, abs=1e-6)
    assert own.updates[2].policy_loss != pytest.approx(fused.updates[2].policy_loss, rel=1e-2)
    assert math.isnan(own.updates[0].clip_fraction) and math.isnan(own.updates[0].dual_clip_fraction)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda logprobs: -logprobs, "returned Tensor, not fastppo.ppo.TokenLoss"),
        (lambda logprobs: TokenLoss(-logprobs.sum()), r"loss is a tensor of shape \(\), .* of 5 tokens. Leave the sum"),
        (lambda logprobs: TokenLoss(-logprobs, [False] * 5), "clipped is list"),
        (lambda logprobs: TokenLoss(-logprobs.detach()), "no gradient to the logprobs"),
    ],
)
def test_what_cannot_be_minimised_is_an_error_that_names_the_setting(returned, words):
    logprobs, ppo = torch.zeros(5, requires_grad=True), PPOConfig(loss="mine.py:loss")
    with pytest.raises(FunctionError, match=f"ppo.loss = mine.py:loss.*{words}"):
        checked_loss(
            lambda logprobs, *_: returned(logprobs), logprobs, torch.zeros(5), torch.zeros(5), torch.tensor([0, 5]), ppo
        )


def test_a_loss_that_is_not_there_is_an_error_before_models_load(world, tmp_path, monkeypatch):
    folder = whole_runs.prepare(tmp_path)
    monkeypatch.setattr("fastppo.models.loading.weights._load_whole", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(FunctionError, match=r"ppo.loss = nowhere:f: nowhere could not be imported \(ModuleNotFoundE"):
        set_up(parse(whole_runs.settings(folder, tmp_path / "run", ppo__loss="nowhere:f")), world)
    assert not (tmp_path / "run").exists()


def test_what_a_loss_raises_names_the_setting_and_the_line(world, model, tmp_path):
    (file := tmp_path / "breaks.py").write_text("def loss(*arguments):\n    raise LookupError('the cause')\n")
    assert isinstance(load_loss(PPOConfig()), type(clip))
    with pytest.raises(FunctionError, match=r"ppo.loss = .*breaks.py:loss raised LookupError: the cause \(breaks.py:2"):
        step(config_of(model, "--ppo.loss", f"{file}:loss"), world)
