"""Numbers that are not finite, and ranks that die."""

import os
import re
import signal
import time

import pytest
import tiny
import torch
import whole_runs
from ppo_step import config_of, step

from fastppo.config.validation import validate
from fastppo.distributed.engine import Engine
from fastppo.distributed.world import start_world
from fastppo.errors import TrainingFault

pytestmark = pytest.mark.slow

ROLES = {"separate": ["--critic.kind", "separate"], "shared": ["--critic.kind", "shared"]}


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("model"), tiny.causal())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("runs"))


def break_update(monkeypatch, number, role):
    """A gradient of one role that is not finite in update `number`, counted from 1 for each role; 0: in all."""
    backward, steps = Engine.backward, {}

    def broken(self, loss, *, last):
        name = type(self.module).__name__
        if name == role and number in (0, steps.get(name, 0) + 1):
            loss = loss * float("nan")
        steps[name] = steps.get(name, 0) + last
        backward(self, loss, last=last)

    monkeypatch.setattr(Engine, "backward", broken)


@pytest.mark.parametrize("role", ["Policy", "Critic"])
@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_an_update_that_is_not_finite_is_not_applied_to_either_role(
    model, world, tmp_path, monkeypatch, role, dtype, stage
):
    """The run of two updates whose first is broken equals the run of the second alone."""
    settings = ["--optim.dtype", dtype, "--zero.stage", str(stage), "--output", str(tmp_path)]
    still = step(config_of(model, *settings, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    break_update(monkeypatch, 1, role)
    done = step(config_of(model, *settings), world)
    assert [u.skipped for u in done.updates] == [1]
    assert all(torch.equal(still[name], p) for name, p in done.parameters.items())


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("bf16", 1), ("fp32", 2), ("fp32", 3)])
def test_after_a_skipped_update_the_next_is_as_if_it_had_been_the_first(
    model, world, tmp_path, monkeypatch, dtype, stage
):
    settings = ["--optim.dtype", dtype, "--zero.stage", str(stage), "--output", str(tmp_path)]
    settings += ["--ppo.epochs", "2", "--critic.kind", "shared"]
    whole = step(config_of(model, *settings), world, plan=None)
    break_update(monkeypatch, 2, "Policy")
    first_alone = step(config_of(model, *settings), world)
    assert [u.skipped for u in first_alone.updates] == [0, 1]
    monkeypatch.undo()
    once = step(config_of(model, *settings, "--ppo.epochs", "1"), world)
    assert all(torch.equal(once.parameters[name], p) for name, p in first_alone.parameters.items())
    assert not all(torch.equal(whole.parameters[name], p) for name, p in first_alone.parameters.items())


def test_too_many_in_a_row_end_the_run_with_the_batch_kept(model, world, tmp_path, monkeypatch):
    break_update(monkeypatch, 0, "Policy")
    config = config_of(model, "--output", str(tmp_path), "--optim.max_skipped", "2", "--ppo.epochs", "4")
    with pytest.raises(TrainingFault, match=r"3 updates in a row.*optim.max_skipped is 2") as fault:
        step(config, world)
    assert str(tmp_path / "faults") in str(fault.value)
    kept = torch.load(tmp_path / "faults/step-1.pt", weights_only=True)
    assert kept["step"] == 1 and kept["update"] == 0 and kept["config"]["seed"] == 1
    assert len(kept["batch"]["scores"]) == 8 and len(kept["batch"]["packed"]["cu_seqlens"]) == 9


def test_on_two_ranks_both_skip_and_the_metrics_count(forks, folder):
    before = """
import os
from fastppo.distributed.engine import Engine
backward, calls = Engine.backward, []
def broken(self, loss, *, last):
    calls.append(last)
    bad = os.environ["RANK"] == "1" and sum(calls) < 2  # in the first update, on one rank
    backward(self, loss * float("nan") if bad else loss, last=last)
Engine.backward = broken
"""
    output = folder / "skipped"
    forks.run(whole_runs.settings(folder, output, steps=2, optim__dtype="fp32"), 2, before)
    first, second = (r for r in whole_runs.records(output) if "score" in r)
    assert first["skipped_updates"] == 1 and second["skipped_updates"] == 0
    assert first["policy_loss"] is not None and (output / "faults/step-1.pt").is_file()


def test_a_rank_that_is_killed_ends_the_other_and_not_a_hang(forks, folder):
    output = folder / "killed"
    run = forks.start(whole_runs.settings(folder, output, steps=1000, checkpoint__every=0), 2)
    while not (output / "metrics.jsonl").exists() or len(whole_runs.records(output)) < 2:
        time.sleep(0.02)
    os.kill(run.ranks[1], signal.SIGKILL)
    assert forks.wait(run) == [1, -9], run.text()
    assert re.search("another rank has ended|cannot reach the store of the run|no heartbeat", run.text())


def test_a_rank_that_fails_shows_its_own_error(forks, folder):
    before = """
import os
from fastppo import train
run_updates = train.run_updates
def failing(*args, **kwargs):
    if os.environ["RANK"] == "1":
        raise LookupError("the cause")
    return run_updates(*args, **kwargs)
train.run_updates = failing
"""
    run = forks.start(whole_runs.settings(folder, folder / "failed"), 2, before)
    assert forks.wait(run) == [1, 1], run.text()
    first, second = (log.read_text() for log in run.logs)
    assert "LookupError: the cause" in second
    assert "another rank has ended" in first and "Traceback" not in first


def test_a_gpu_without_memory_is_a_message_with_the_way_out(forks, folder):
    before = """
import torch
from fastppo.ppo import update
def full(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 192.00 MiB. Process 7 has 5.69 GiB memory in use."
        " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
    )
update._accumulate = full
"""
    run = forks.start(whole_runs.settings(folder, folder / "full"), 1, before)
    assert forks.wait(run) == [1], run.text()
    assert "Traceback" not in run.text()
    assert (
        "in fastppo/ppo/update.py: CUDA out of memory. Tried to allocate 192.00 MiB. Process 7 has 5.69" in run.text()
    )
    assert "ppo.microbatch_tokens" in run.text() and "PYTORCH_CUDA_ALLOC_CONF" not in run.text()


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_timeout(forks, folder):
    before = """
import os, time
from fastppo import train
if os.environ["RANK"] == "1":
    train.run_updates = lambda *args, **kwargs: time.sleep(600)
"""
    run = forks.start(whole_runs.settings(folder, folder / "slow", timeout=5), 2, before)
    assert forks.wait(run) == [1, 1], run.text()
    first, second = (log.read_text() for log in run.logs)
    assert "does not answer" in first and "Traceback" not in first
    assert "frame #" not in run.text()  # of C++
    assert re.search(
        "cannot reach the store of the run|another rank has ended", second
    )  # though it is held up for 600 s


def test_rules_hold_for_the_defaults(model):
    validate(config_of(model))
