"""What only a GPU shows of a whole step and a whole run: the CPU's numbers, NCCL, graphs, the moves of residency.

Each runs in a process of its own, on the first GPU; the other tests of a machine with GPUs stay on the CPU.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import whole_runs
from ppo_step import config_of, step

from fastppo.distributed.world import start_world

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
CASES = {
    "stage 0": [],
    "shared critic, exact KL in the loss": ["--critic.kind", "shared", "--ppo.kl_in", "loss", "--ppo.kl_kind", "exact"],
    "stage 2": ["--zero.stage", "2"],
    "stage 3": ["--zero.stage", "3"],
    "stage 3, optimizer on the host": ["--zero.stage", "3", "--zero.offload", "cpu"],
    "LoRA": ["--actor.lora.rank", "4"],
}


def on_gpu(*command: object, code: int = 0) -> None:
    """A Python command that may use one GPU; it must end with this code."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | alone
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment |= {"MASTER_PORT": str(s.getsockname()[1]), "CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stdout[-2000:] + run.stderr[-4000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


@pytest.fixture(scope="module")
def steps(model, tmp_path_factory):
    """A PPO step of each case on the GPU."""
    out = tmp_path_factory.mktemp("steps") / "steps.pt"
    on_gpu(HERE / "ppo_step.py", out, model, json.dumps(list(CASES.values())))
    return dict(zip(CASES, torch.load(out), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_fp32_is_that_of_the_cpu(steps, model, case):
    """The same tokens are drawn, and Adam's first step, of +-lr, takes the same side."""
    cpu = step(config_of(model, *CASES[case], "--zero.stage", "0", "--zero.offload", "none"), start_world(1))
    parameters, updates = steps[case]
    for one, two in zip(cpu.updates, updates, strict=True):
        assert two["policy_loss"] == pytest.approx(one.policy_loss, abs=1e-4)
        assert two["value_loss"] == pytest.approx(one.value_loss, rel=1e-3)
        assert two["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    apart = torch.cat([(parameters[n].cpu() - p).abs().flatten() for n, p in cpu.parameters.items()])
    assert apart.mean() < 1e-4


WITHOUT_WAITS = """
import sys

import ppo_step
import torch

from fastppo.data import Moments, plan_step
from fastppo.models import PrefixStates
from fastppo.ppo import compute_experience, run_updates, update

world = ppo_step.start_world(1)
config = ppo_step.config_of(sys.argv[1], "--ppo.microbatch_tokens", "40", *sys.argv[2:])
roles = ppo_step.roles_of(config, world)
roles.residency.enter("sampling")
scored = ppo_step.responses(roles)
plan = plan_step(scored.rollout.packed.lengths, config, 0, 1, roles.attention)
context, prefix = ppo_step.context_of(config, roles, world), PrefixStates()
roles.residency.enter("experience")
experience = compute_experience(scored, Moments().add(scored.scores), plan[0], prefix, context)
roles.residency.enter("learning")
accumulate = update._accumulate

def watched(*arguments):
    torch.cuda.set_sync_debug_mode("error")
    try:
        return accumulate(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

list(run_updates(experience, plan, prefix, context))  # kernels are compiled, and DeepSpeed makes what it keeps
update._accumulate = watched
assert len(plan[0][0].microbatches) > 1
list(run_updates(experience, plan, prefix, context))
"""


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("stage 3")])
def test_the_host_waits_for_nothing_in_the_microbatches_of_an_update(model, monkeypatch, case):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    on_gpu("-c", WITHOUT_WAITS, model, *CASES[case])


REWARD = """
import os

calls = 0

def letters(prompts, responses, **columns):
    global calls
    calls += 1
    if calls == int(os.environ.get("EXIT_AT_CALL", 0)):
        os._exit(9)
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("run"))
    (folder / "reward.py").write_text(REWARD)
    return folder


SETTINGS = {
    "stage 0": {"zero__stage": 0, "optim__dtype": "fp32"},
    "stage 3, optimizer on the host": {"zero__stage": 3, "zero__offload": "cpu", "optim__dtype": "bf16"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_cut_off_and_resumed_is_the_same_bit_for_bit(prepared, monkeypatch, name):
    whole, cut = (prepared / f"{name}, {kind}" for kind in ("whole", "cut off"))
    run = ("-m", "fastppo.train")
    on_gpu(*run, *whole_runs.settings(prepared, whole, **SETTINGS[name]))
    settings = whole_runs.settings(prepared, cut, resume="auto", **SETTINGS[name])
    monkeypatch.setenv("EXIT_AT_CALL", "5")  # evaluation, two steps, evaluation, and in the third step
    on_gpu(*run, *settings, code=9)
    monkeypatch.delenv("EXIT_AT_CALL")
    on_gpu(*run, *settings)
    assert whole_runs.records(cut) == whole_runs.records(whole)
    assert whole_runs.same(whole_runs.state(cut), whole_runs.state(whole))


def test_in_bf16_sampling_and_learning_agree_on_every_log_probability(prepared):
    """The ratio of a first update is 1: the decode step and the packed pass are the same function."""
    out = prepared / "bf16"
    on_gpu("-m", "fastppo.train", *whole_runs.settings(prepared, out, optim__dtype="bf16", ppo__minibatches=1))
    first = [r for r in whole_runs.records(out) if "ratio_mean" in r]
    assert len(first) == 4
    assert all(r["epoch1/ratio_mean"] == pytest.approx(1.0, abs=0.02) for r in first)
