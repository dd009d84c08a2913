"""The moving average of the actor's weights: its numbers, and that it is evaluated, exported and resumed."""

import pytest
import tiny
import torch
import whole_runs
from transformers import AutoModelForCausalLM

from fastppo.distributed.world import World
from fastppo.models.average import Average
from fastppo.models.loading.trained import set_trainable
from fastppo.models.roles import Policy, fuse_head

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def policy():
    policy = Policy(fuse_head(tiny.causal(dtype=torch.bfloat16)))
    set_trainable(policy, 1)
    return policy


def moved(policy, seed):
    """Each weight that trains, after a step in some direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
    return {n: p.detach().double() for n, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("staged", [False, True])  # as on the CPU, and as from a GPU
def test_it_is_the_sum_of_all_weights_that_were_each_older_one_counting_less(policy, tmp_path, staged):
    weights = [{n: p.detach().double() for n, p in policy.model.named_parameters() if p.requires_grad}]
    average = Average(policy, 0.75, WORLD, staged=staged)
    for seed in range(3):
        weights.append(moved(policy, seed))
        average.update()
        average.before_step()
    kept = {}
    average.save(tmp_path, "average", lambda state, path: kept.update(state))
    shares = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    assert kept.keys() == weights[0].keys()  # what does not train is its own average
    for name, value in kept.items():
        expected = sum(share * w[name] for share, w in zip(shares, weights, strict=True))
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("staged", [False, True])
def test_it_takes_the_actors_place_and_leaves_it_as_it_was(policy, staged):
    average = Average(policy, 0.5, WORLD, staged=staged)
    moved(policy, 1)
    average.update()
    before = {n: p.clone() for n, p in policy.named_parameters()}
    with average.in_place():
        inside = {n: p.clone() for n, p in policy.named_parameters()}
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(inside[name], before[name]) != p.requires_grad


def test_a_thread_makes_the_same_average_to_the_last_bit_and_passes_its_errors_on(policy, tmp_path):
    kept = ({}, {})
    averages = [Average(policy, 0.9, WORLD, staged=staged) for staged in (False, True)]
    for seed in range(3):
        moved(policy, seed)
        for average in averages:
            average.update()
    for average, state in zip(averages, kept, strict=True):
        average.save(tmp_path, "average", lambda found, path, state=state: state.update(found))
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    averages[1]._average.clear()
    averages[1].update()
    with pytest.raises(KeyError), averages[1].in_place():
        pass


def exported(output, name):
    return dict(AutoModelForCausalLM.from_pretrained(output / name).named_parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory, forks):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))

    def run(name, ranks=1, **changes):
        same = {"actor__average": 0.8, "optim__dtype": "fp32", "steps": 2, "eval__every": 1}
        changes = same | {"optim__schedule": "constant"} | changes
        forks.run(whole_runs.settings(folder, folder / name, **changes), ranks)
        return folder / name

    return run


def test_a_run_evaluates_exports_and_resumes_it(run):
    straight = run("straight")
    run("resumed", steps=1)
    resumed = run("resumed", resume="auto")
    kept, again = (whole_runs.state(output)["average/rank-00000.pt"] for output in (straight, resumed))
    assert whole_runs.same(kept, again)
    last, averaged = exported(straight, "actor"), exported(straight, "actor-average")
    assert not torch.equal(last["model.layers.2.mlp.up_proj.weight"], averaged["model.layers.2.mlp.up_proj.weight"])
    assert all(torch.equal(p, averaged[n]) for n, p in exported(resumed, "actor-average").items())
    evaluations = [r for r in whole_runs.records(straight) if "eval/score" in r]
    assert evaluations[0]["eval/average/score"] is not None and len(evaluations) == 3


def test_the_actor_is_the_one_without_it_though_the_reward_draws_random_numbers(run):
    """Rewards are asked for the average's responses too."""
    actor, without = exported(run("with"), "actor"), exported(run("without", actor__average="null"), "actor")
    assert all(torch.equal(p, without[n]) for n, p in actor.items())


def test_where_zero_splits_the_weights_it_is_the_same(run):
    whole = exported(run("whole", ranks=2), "actor-average")
    split = exported(run("split", ranks=2, zero__stage=3, zero__offload="cpu"), "actor-average")
    for name, p in whole.items():
        assert torch.allclose(p, split[name], atol=1e-4), name


def test_it_is_evaluated_at_stage_3_with_a_shared_critic(run):
    """Its evaluation gathers weights right after a pass that did not reach the value head, for which some are ahead."""
    output = run("shared", steps=1, critic__kind="shared", zero__stage=3)
    assert [r["eval/average/score"] is not None for r in whole_runs.records(output) if "eval/score" in r] == [True] * 2
