import dataclasses
import json
import logging
import math
import os
from pathlib import Path

import pytest
import tiny
import torch
from ppo_step import config_of, context_of, learn, responses, roles_of, step

from fastppo.data.batch import Moments
from fastppo.data.microbatches import Minibatch, plan_step
from fastppo.distributed.engine import gathered
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.ppo.experience import compute_experience
from fastppo.ppo.metrics import step_metrics
from fastppo.ppo.update import check_first_ratio, run_updates

SECONDS = {f"time/{phase}": 1.0 for phase in ("sampling", "feedback", "experience", "learning")}


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def change(after, model, world):
    before = step(config_of(model, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    return {name: float((after[name] - before[name]).abs().max()) for name in before if name in after}


def change_nothing(model, world):
    """Parameters of an actor that has not learned, and its critic's."""
    before = step(config_of(model, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    return {name: x for name, x in before.items() if name.startswith("actor.")}


def metrics_of(done, config):
    return step_metrics(done.experience, done.updates, SECONDS, config.importance)


@pytest.mark.parametrize("budget", [25, 40, 70])
def test_the_update_does_not_depend_on_the_microbatch_size(model, world, budget):
    whole = step(config_of(model), world)
    cut = step(config_of(model, "--ppo.microbatch_tokens", str(budget), "--data.max_prompt_tokens", "15"), world)
    assert difference(whole.parameters, cut.parameters) < 2e-5
    assert whole.updates[0].policy_loss == pytest.approx(cut.updates[0].policy_loss, abs=1e-6)
    assert whole.updates[0].actor_grad_norm == pytest.approx(cut.updates[0].actor_grad_norm, rel=1e-4)


def test_the_update_does_not_depend_on_order_or_packing(model, world):
    config = config_of(model)
    whole = step(config, world)
    shuffled = [[Minibatch((torch.tensor([7, 2]), torch.tensor([0, 5, 4]), torch.tensor([6, 1, 3])))]]
    assert difference(whole.parameters, step(config, world, plan=shuffled).parameters) < 2e-5


# Every estimator and every loss, with what stands beside them; samples of a prompt, two updates of two epochs.
GROUPS = ["--sampling.samples_per_prompt", "4"]
METHODS = {
    "grpo": ["--ppo.estimator", "grpo", *GROUPS],
    "grpo, entropy and KL in the loss": [
        *["--ppo.estimator", "grpo", *GROUPS, "--ppo.entropy_coef", "0.1"],
        *["--ppo.kl_in", "loss", "--ppo.kl_kind", "k3", "--ppo.kl_coef", "1"],
    ],
    "dr_grpo": ["--ppo.estimator", "dr_grpo", *GROUPS],
    "rloo": ["--ppo.estimator", "rloo", *GROUPS],
    "reinforce++": ["--ppo.estimator", "reinforce++"],
    "reinforce++_baseline": ["--ppo.estimator", "reinforce++_baseline", *GROUPS],
    "gspo": ["--ppo.estimator", "grpo", "--ppo.loss", "gspo", *GROUPS],
    "cispo": ["--ppo.estimator", "rloo", "--ppo.loss", "cispo", *GROUPS],
    "gae of VAPO": [
        *["--ppo.lam", "adaptive", "--ppo.lam_critic", "1", "--ppo.clip_high", "0.28"],
        *["--ppo.nll_coef", "0.1", "--ppo.nll_above", "0.2", "--critic.kind", "shared"],
    ],
}
SEVERAL = ["--ppo.minibatches", "2", "--ppo.epochs", "2"]


@pytest.mark.parametrize("method", METHODS)
def test_no_estimator_or_loss_depends_on_order_or_packing(model, world, method):
    config = config_of(model, *METHODS[method])
    whole = step(config, world)
    shuffled = [[Minibatch((torch.tensor([7, 2]), torch.tensor([0, 5, 4]), torch.tensor([6, 1, 3])))]]
    assert difference(whole.parameters, step(config, world, plan=shuffled).parameters) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_no_estimator_or_loss_depends_on_microbatches(model, world, method):
    settings = [*METHODS[method], *SEVERAL]
    whole = step(config_of(model, *settings), world)
    cut = step(config_of(model, *settings, "--ppo.microbatch_tokens", "30", "--data.max_prompt_tokens", "15"), world)
    assert difference(whole.parameters, cut.parameters) < 5e-5
    for one, other in zip(whole.updates, cut.updates, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other), rel=1e-3, abs=1e-5, nan_ok=True)


def test_no_shared_memory_stays_behind(world):
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"))


# Settings of a run on two ranks whose updates must equal those of one rank at stage 0. Every weight is split at
# stage 3: by default DeepSpeed leaves small ones whole on each rank, and all of these are small.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
TEXT = ["--ptx.coef", "0.5", "--ptx.path", "TEXTS", "--ptx.batch_size", "6", "--ptx.max_tokens", "30"]
TALK = ["--rollout.environment", "made:up"]
RANK_CASES = {
    "shared, stage 0": ["--critic.kind", "shared", "--zero.stage", "0"],
    "shared, stage 1": ["--critic.kind", "shared", "--zero.stage", "1"],
    "separate, stage 2": ["--zero.stage", "2"],
    "separate, stage 2, offloaded": ["--zero.stage", "2", "--zero.offload", "cpu"],
    "separate, stage 3": ["--zero.stage", "3"],
    "shared, stage 3, offloaded": ["--critic.kind", "shared", "--zero.stage", "3", "--zero.offload", "cpu"],
    "tied, stage 3, offloaded": ["--actor.model", "TIED", "--zero.stage", "3", "--zero.offload", "cpu"],
    "upper layers, exact KL in the loss, stage 3": [
        *["--actor.model", "TIED", "--actor.train", "2", "--zero.stage", "3"],
        *["--ppo.kl_in", "loss", "--ppo.kl_kind", "exact", "--ppo.kl_coef", "10"],
    ],
    "upper layers, exact KL in a loss that is no fused op, stage 3": [
        *["--actor.model", "TIED", "--actor.train", "2", "--zero.stage", "3", "--ppo.loss", "fastppo.ppo.losses:clip"],
        *["--ppo.kl_in", "loss", "--ppo.kl_kind", "exact", "--ppo.kl_coef", "10"],
    ],
    "separate, stage 1, LoRA": ["--zero.stage", "1", "--actor.lora.rank", "4", "--critic.lora.rank", "2"],
    "separate, stage 3, LoRA": ["--zero.stage", "3", "--actor.lora.rank", "4", "--critic.lora.rank", "2"],
    "shared, text mixed in, stage 1": ["--critic.kind", "shared", *TEXT, "--zero.stage", "1"],
    "shared, text mixed in, stage 2": ["--critic.kind", "shared", *TEXT, "--zero.stage", "2"],
    "shared, text mixed in, stage 3": ["--critic.kind", "shared", *TEXT, "--zero.stage", "3"],
    "separate, text mixed in, LoRA, stage 3": [*TEXT, "--zero.stage", "3", "--actor.lora.rank", "4"],
    "reinforce++, stage 2, offloaded": ["--ppo.estimator", "reinforce++", "--zero.stage", "2", "--zero.offload", "cpu"],
    "rloo, LoRA, stage 1": ["--ppo.estimator", "rloo", *GROUPS, "--actor.lora.rank", "4", "--zero.stage", "1"],
    **{f"{method}, stage 3": [*settings, "--zero.stage", "3"] for method, settings in METHODS.items()},
    "conversations, stage 2": [*TALK, "--zero.stage", "2"],
    "conversations, shared, stage 3": [*TALK, "--critic.kind", "shared", "--zero.stage", "3"],
    "conversations, gspo, stage 3": [*TALK, *METHODS["gspo"], "--zero.stage", "3"],
    "recomputed activations, stage 3": ["--optim.activation_checkpointing", "true", "--zero.stage", "3"],
}


def rank_settings(case, folder):
    """The settings of a case, several updates long; `folder` holds a model whose embeddings are tied, and texts."""
    files = {"TIED": str(folder / "tied"), "TEXTS": str(folder / "texts.jsonl")}
    settings = [files.get(word, word) for word in RANK_CASES[case]]
    split = ["--zero.deepspeed", str(folder / "split.json")] if "stage 3" in case else []
    return [*settings, *split, "--ppo.minibatches", "2", "--ppo.epochs", "2", "--ppo.microbatch_tokens", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny.saved(folder / "tied", tiny.causal(tie_word_embeddings=True))
    (folder / "split.json").write_text(json.dumps(SPLIT_ALL))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": "abc" * n}) + "\n" for n in range(1, 10)))
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(model, folder, forks):
    """All cases in one pair of processes."""
    out, cases = folder / "out.pt", json.dumps([rank_settings(case, folder) for case in RANK_CASES])
    call = f"import ppo_step; ppo_step.main(*{(str(out), model, cases)!r}); raise SystemExit(0)"
    run = forks.start([], 2, before=call)
    assert forks.wait(run, seconds=300) == [0, 0], run.text()
    return dict(zip(RANK_CASES, torch.load(out), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", RANK_CASES)
def test_the_update_is_the_same_on_two_ranks_as_on_one_at_stage_0(model, folder, world, on_two_ranks, case):
    plain = ["--zero.stage", "0", "--zero.offload", "none", "--zero.deepspeed", "null"]
    alone = step(config_of(model, *rank_settings(case, folder), *plain), world)
    parameters, updates = on_two_ranks[case]
    assert difference(alone.parameters, parameters) < 5e-5
    for one, two in zip(alone.updates, updates, strict=True):
        assert two == pytest.approx(dataclasses.asdict(one), rel=1e-3, abs=1e-5, nan_ok=True)


def test_on_the_first_update_the_ratio_is_one_and_the_approximate_kl_zero(model, world):
    first = step(config_of(model, "--ppo.minibatches", "2"), world).updates[0]
    assert abs(first.ratio_mean - 1) <= 1e-4 and first.ratio_max - 1 <= 1e-4 and first.approx_kl <= 1e-6


def test_the_first_ratio_is_one_in_bf16_too(model, world):
    settings = ["--optim.dtype", "bf16", "--ppo.microbatch_tokens", "40", "--data.max_prompt_tokens", "15"]
    first = step(config_of(model, *settings), world).updates[0]
    assert abs(first.ratio_mean - 1) <= 1e-3 and first.ratio_max - 1 <= 1e-3


def test_a_first_ratio_that_is_not_one_is_said_in_the_log(model, world, caplog):
    update = step(config_of(model), world).updates[0]
    with caplog.at_level(logging.WARNING, logger="fastppo"):
        check_first_ratio(update, "fp32")
        assert not caplog.records
        check_first_ratio(dataclasses.replace(update, ratio_max=1.4), "fp32")
    assert "largest 1.4" in caplog.text


def test_later_epochs_move_the_ratio(model, world):
    updates = step(config_of(model, "--ppo.epochs", "3", "--actor.lr", "1e-3"), world).updates
    assert [u.epoch for u in updates] == [0, 1, 2]
    assert updates[0].approx_kl < 1e-6 < updates[1].approx_kl < updates[2].approx_kl


def test_a_separate_critics_warm_up_leaves_the_actor_alone(model, world):
    warm = step(config_of(model, "--critic.warmup_steps", "1", "--steps", "2"), world)
    moved = change(warm.parameters, model, world)
    assert max(v for n, v in moved.items() if n.startswith("actor.")) == 0.0
    assert max(v for n, v in moved.items() if n.startswith("critic.")) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "zero"),
    [
        ("fp32", []),
        ("bf16", []),
        ("bf16", ["--zero.stage", "3"]),
        ("fp32", ["--zero.stage", "3", "--zero.offload", "cpu"]),
    ],
)
def test_a_shared_critics_warm_up_trains_the_value_head_alone(model, world, dtype, zero):
    settings = ["--critic.kind", "shared", "--optim.dtype", dtype, *zero]
    warm = step(config_of(model, *settings, "--critic.warmup_steps", "1", "--steps", "2"), world)
    still = step(config_of(model, *settings, "--actor.lr", "0", "--critic.lr", "0"), world)
    moved = {n for n in warm.parameters if not torch.equal(warm.parameters[n], still.parameters[n])}
    assert moved == {"actor.value_head.weight", "actor.value_head.bias"}


@pytest.mark.parametrize("zero", [["0"], ["1"], ["3"], ["2", "--zero.offload", "cpu"]], ids=lambda zero: ",".join(zero))
def test_the_actors_first_update_after_a_shared_critics_warm_up_is_adams_first(model, world, zero):
    """Which moves weights by the learning rate, whatever the gradient's size."""
    settings = ["--critic.kind", "shared", "--optim.eps", "1e-12", "--ppo.epochs", "20", "--zero.stage", *zero]
    config = config_of(model, *settings, "--critic.warmup_steps", "1", "--steps", "2")
    roles = roles_of(config, world)
    scored = responses(roles)
    plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
    context, prefix_cache = context_of(config, roles, world), PrefixStates()
    experience = compute_experience(scored, Moments().add(scored.scores), plan[0], prefix_cache, context)
    weight = roles.policy.model.model.norm.weight
    with gathered([weight]):
        before = weight.detach().clone()
    list(run_updates(experience, plan, prefix_cache, context))
    list(run_updates(experience, plan[:1], prefix_cache, dataclasses.replace(context, step=1)))
    with gathered([weight]):
        moved = float((weight.detach() - before).abs().max())
    assert moved == pytest.approx(config.actor.lr, rel=1e-3)


def test_while_the_critic_warms_up_it_learns_what_did_follow(model, world):
    """Whatever lambda is: from values that mean nothing yet nothing is to be learned."""
    settings = ["--ppo.lam", "0.5", "--ppo.gamma", "0.9", "--steps", "2"]
    warm = step(config_of(model, *settings, "--critic.warmup_steps", "1"), world).experience
    lengths = warm.packed.response_lengths.tolist()
    for rewards, returns in zip(warm.rewards.split(lengths), warm.returns.split(lengths), strict=True):
        to_go = [sum(0.9**i * r for i, r in enumerate(rewards[t:].tolist())) for t in range(len(rewards))]
        torch.testing.assert_close(returns, torch.tensor(to_go), rtol=1e-4, atol=1e-5)
    later = step(config_of(model, *settings), world).experience
    assert not torch.allclose(later.returns, warm.returns, atol=1e-3)


def test_two_lambdas_are_two_runs_of_one_each(model, world):
    """The actor learns as with the one for both, the critic as with the other."""
    both = step(config_of(model, "--ppo.lam", "0.7", "--ppo.lam_critic", "1"), world)
    of_actor, of_critic = (step(config_of(model, "--ppo.lam", lam), world) for lam in ("0.7", "1"))
    for name, parameter in both.parameters.items():
        other = of_actor if name.startswith("actor.") else of_critic
        assert torch.equal(parameter, other.parameters[name]), name
    assert difference(of_actor.parameters, of_critic.parameters) > 1e-4


def test_a_prompt_that_a_batch_has_twice_makes_two_groups(model, world):
    """As where a pass over the data ends. A group is what was drawn together, as for `sampling.until_informative`."""
    config = config_of(model, "--ppo.estimator", "rloo", *GROUPS)
    scored = responses(roles_of(config, world), samples=4)
    twice = dataclasses.replace(scored.rollout, sources=torch.zeros(8, dtype=torch.int64))
    apart, same = (learn(config, world, s) for s in (scored, dataclasses.replace(scored, rollout=twice)))
    assert torch.equal(apart.experience.advantages, same.experience.advantages)
    first = apart.experience.packed.response_cu_seqlens[:4].long()
    assert float(apart.experience.advantages[first].sum()) == pytest.approx(0.0, abs=1e-6)


def test_without_a_critic_there_is_none_to_train_or_save(model, world):
    config = config_of(model, "--ppo.estimator", "reinforce++")
    roles = roles_of(config, world)
    assert roles.critic is None and roles.policy.value_head is None and set(roles.saved) == {"actor"}
    done = step(config, world)
    assert done.experience.values is None and done.experience.returns is None
    assert math.isnan(done.updates[0].value_loss) and done.updates[0].skipped == 0
    assert not any("value" in name or "critic" in name for name in metrics_of(done, config))
    assert difference(done.parameters, change_nothing(model, world)) > 1e-4


def test_good_responses_become_likelier(model, world):
    """Without advantages: the NLL term alone moves the policy towards those with a score above the bound."""
    settings = ["--ppo.estimator", "reinforce++", "--ppo.nll_coef", "1", "--ppo.nll_above", "0.5", "--actor.lr", "1e-3"]
    done = step(config_of(model, *settings, "--ppo.epochs", "4"), world)
    losses = [update.nll_loss for update in done.updates]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    none_good = step(config_of(model, *settings[:4], "--ppo.nll_above", "5"), world).updates[0]
    assert none_good.nll_loss == 0.0 and none_good.skipped == 0
    one_of_two = dataclasses.replace(done, updates=[none_good, done.updates[0]])
    assert metrics_of(one_of_two, config_of(model, *settings))["nll_loss"] == losses[0]  # of the tokens that there are
    assert "nll_loss" not in metrics_of(dataclasses.replace(done, updates=[none_good]), config_of(model, *settings))


def test_actor_and_critic_learn_at_rates_of_their_own(model, world):
    settings = ["--critic.kind", "shared"]
    still = step(config_of(model, *settings, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    head_only = step(config_of(model, *settings, "--actor.lr", "0"), world).parameters
    assert {n for n in still if not torch.equal(still[n], head_only[n])} == {
        "actor.value_head.weight",
        "actor.value_head.bias",
    }


def test_frozen_parameters_stay(model, world):
    moved = change(step(config_of(model, "--actor.train", "1"), world).parameters, model, world)
    for name, by in moved.items():
        if name.startswith("actor."):
            assert (by > 0) == (".layers.2." in name or name.endswith("model.norm.weight")), name


@pytest.mark.parametrize("kind", ["k2", "k3", "exact"])
def test_a_kl_penalty_in_the_loss_pulls_towards_the_reference(model, world, tmp_path, kind):
    other = tiny.saved(tmp_path / "reference", tiny.causal(seed=5))
    settings = ["--ppo.kl_in", "loss", "--ppo.kl_kind", kind, "--reference.model", other, "--ppo.epochs", "6"]
    updates = step(config_of(model, *settings, "--ppo.kl_coef", "10", "--actor.lr", "1e-3"), world).updates
    assert updates[-1].kl_loss < updates[0].kl_loss


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "exact"])
def test_a_kl_penalty_in_the_reward_is_zero_against_oneself(model, world, kind):
    experience = step(config_of(model, "--ppo.kl_kind", kind), world).experience
    assert float(experience.kl.abs().max()) < 1e-5
    assert float(experience.rewards.sum()) == pytest.approx(0.0, abs=1e-5)  # the scores add up to 0


def test_the_exact_kl_is_the_mean_of_k1(model, world, tmp_path):
    other = tiny.saved(tmp_path / "reference", tiny.causal(seed=5))
    settings = ["--reference.model", other, "--ppo.kl_kind", "exact"]
    experience = step(config_of(model, *settings), world).experience
    k1 = experience.old_logprobs - experience.ref_logprobs
    assert float(experience.kl.min()) > 0
    assert float((k1 - experience.kl).mean().abs()) < 3 * float(k1.std()) / len(k1) ** 0.5


def test_old_logprobs_are_those_of_the_sampler(model, world):
    experience = step(config_of(model), world).experience
    torch.testing.assert_close(experience.old_logprobs, experience.sampler_logprobs, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_clipped_to_its_norm(model, world):
    """Adam's first step does not depend on the gradient's scale, unless epsilon is large against it."""
    free = step(config_of(model, "--optim.max_grad_norm", "0"), world).updates[0].actor_grad_norm
    tight = step(config_of(model, "--optim.max_grad_norm", "1e-6", "--optim.eps", "1"), world)
    assert tight.updates[0].actor_grad_norm == pytest.approx(free, rel=1e-5)
    assert max(v for n, v in change(tight.parameters, model, world).items() if n.startswith("actor.")) < 1e-7


def test_an_update_beyond_the_level_of_approximate_kl_is_not_applied_and_the_last(model, world):
    """The second update finds the policy moved by the first."""
    twice = ["--ppo.minibatches", "2", "--ppo.epochs", "3"]
    stop = ["--health.alarms", '[{"figure": "approx_kl", "level": 1e-5, "action": "stop_epoch"}]']
    one = step(config_of(model, *twice, *stop), world)
    assert [u.stopped for u in one.updates] == [False, True] and one.updates[1].approx_kl > 1e-5
    config = config_of(model, *twice)
    plan = plan_step(one.experience.packed.lengths, config, 0, 1, roles_of(config, world).attention)
    first = step(config, world, plan=[plan[0][:1]])
    assert difference(one.parameters, first.parameters) == 0


def test_updates_come_one_by_one_and_go_on_from_those_already_done(model, world):
    """The caller's list stays its own, so a run that is stopped knows what was applied."""
    config = config_of(model, "--ppo.minibatches", "2", "--ppo.epochs", "2")
    whole = step(config, world)
    roles = roles_of(config, world)
    scored = responses(roles)
    plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
    context, prefix_cache = context_of(config, roles, world), PrefixStates()
    experience = compute_experience(scored, Moments().add(scored.scores), plan[0], prefix_cache, context)
    first = next(run_updates(experience, plan, prefix_cache, context))
    done = [first]
    rest = list(run_updates(experience, plan, prefix_cache, context, done))
    assert [first, *rest] == whole.updates and done == [first]
