"""Weights of tokens in whole runs: the same on two ranks as on one, and under every other setting of the loss."""

from __future__ import annotations

import json
import statistics

import pytest
import whole_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# A sampler with full support that is not the trainer.
ENGINE = """
from fastppo.rollout import InProcess

class Warmer(InProcess):
    factor = 1.3

    def sample(self, prompts, *, temperature, seed):
        return super().sample(prompts, temperature=self.factor * temperature, seed=seed)

class FarOff(Warmer):
    factor = 2.5

class Near(Warmer):
    factor = 1.02

def warmer(config, roles, stop_ids, world):
    return Warmer(roles.sampling_weights, config.sampling, stop_ids)

def near(config, roles, stop_ids, world):
    return Near(roles.sampling_weights, config.sampling, stop_ids)

def far_off(config, roles, stop_ids, world):
    return FarOff(roles.sampling_weights, config.sampling, stop_ids)
"""
# Without random numbers, which each rank draws for itself.
REWARD = """
def letters(prompts, responses, **columns):
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""
METRICS = ("sampler_error", "sampler_error_max", "sampler_kl", "importance_outside", "effective_samples")

CASES = {
    "token, stage 3": {"ppo__importance": "token", "ppo__importance_high": 1.2, "zero__stage": 3},
    "sequence, stage 2": {
        **{"ppo__importance": "sequence", "ppo__importance_low": 0.97, "ppo__importance_high": 1.1},
        **{"zero__stage": 2, "critic__kind": "shared"},
    },
    "icepop, stage 1, LoRA": {
        **{"ppo__importance": "icepop", "ppo__importance_low": 0.8, "ppo__importance_high": 1.3},
        **{"zero__stage": 1, "actor__lora__rank": 4, "actor__lr": 1e-2},
    },
    "token, top_k and top_p, in process": {
        **{"ppo__importance": "token", "rollout__engine": "inprocess", "sampling__top_k": 5, "sampling__top_p": 0.9},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    (folder / "reward.py").write_text(REWARD)
    (folder / "engine.py").write_text(ENGINE)
    (folder / "split.json").write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return folder


def run(folder, forks, name, ranks, changes):
    """The metrics of each step, and the actor's weights at the end."""
    fixed = {"rollout__engine": f"{folder}/engine.py:warmer", "optim__dtype": "fp32", "actor__lr": 1e-3, "steps": 2}
    fixed |= {
        "sampling__temperature": 0.2,
        "eval__prompts": 5,
        "checkpoint__every": 0,
        "zero__deepspeed": folder / "split.json",
    }
    forks.run(whole_runs.settings(folder, folder / name, **fixed | changes), ranks)
    steps = [record for record in whole_runs.records(folder / name) if "policy_loss" in record]
    steps = [{k: x for k, x in step.items() if x is not None and k != "imbalance"} for step in steps]
    return steps, load_file(folder / name / "actor/model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_weighted_updates_and_the_metrics_of_weights_are_the_same_on_two_ranks_as_on_one(folder, forks, case):
    """Metrics are of the global batch, whose halves differ."""
    changes, name = CASES[case], case.replace(" ", "")
    alone, weights = run(folder, forks, f"{name}-1", 1, changes)
    together, others = run(folder, forks, f"{name}-2", 2, changes)
    plain = {k: x for k, x in changes.items() if "importance" not in k} | {"ppo__importance": "none"}
    unweighted, apart = run(folder, forks, f"{name}-none", 1, plain)
    for one, two in zip(alone, together, strict=True):
        assert {k: two[k] for k in METRICS} == pytest.approx({k: one[k] for k in METRICS}, rel=1e-4, abs=1e-6)
        assert 0.02 < one["sampler_error"] < one["sampler_error_max"] and one["effective_samples"] < 0.999
        assert one["sampler_kl"] > 1e-3
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    if "in process" not in case:  # there rho is below 1
        assert 0.05 < alone[0]["importance_outside"] < 0.95
    distance = max(float((weights[k] - others[k]).abs().max()) for k in weights)
    assert distance < 5e-5 < max(float((weights[k] - apart[k]).abs().max()) for k in weights) / 5
    assert unweighted[0]["policy_loss"] != pytest.approx(alone[0]["policy_loss"], rel=1e-2)


@pytest.mark.parametrize(("engine", "alarmed"), [("far_off", {"sampler_error", "effective_samples"}), ("near", set())])
def test_a_sampler_that_is_far_off_raises_alarms_and_one_that_is_near_raises_none(folder, forks, engine, alarmed):
    changes = {"rollout__engine": f"{folder}/engine.py:{engine}", "critic__kind": "shared", "steps": 3}
    steps, _ = run(folder, forks, engine, 1, changes)
    alarms = [json.loads(line) for line in (folder / engine / "alarms.jsonl").read_text().splitlines()]
    raised = {alarm["figure"]: alarm["value"] for alarm in alarms if "median of 3" in alarm["message"]}
    assert raised.keys() & {"sampler_error", "effective_samples"} == alarmed
    for figure in alarmed:
        assert raised[figure] == pytest.approx(statistics.median(step[figure] for step in steps))
