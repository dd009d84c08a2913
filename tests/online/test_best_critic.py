"""The critic of the best checkpoint, as a model in it, and the link that leads there."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import rest_runs
import torch
import whole_runs
from safetensors.torch import load_file

from fastppo import train as ppo
from fastppo import train_rest
from fastppo.checkpoint import atomic_dir, export
from fastppo.config.command_line import REST, parse
from fastppo.distributed.world import start_world
from fastppo.ppo.progress import PPOProgress

pytestmark = pytest.mark.slow

BEST = {
    **{"steps": 5, "eval__every": 1, "checkpoint__keep_best": 1, "checkpoint__keep_last": 5},
    **{"critic__lr": 1e-2, "optim__dtype": "fp32"},  # enough in a step for critics that differ
}
SCORES = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.5, 5: 0.4}  # held-out, by step
BEST_STEP, BEST_BEFORE = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("runs"))


def run(folder: Path, output: Path, **changes: Any) -> None:
    """In this process, with `SCORES` for its evaluations."""
    with pytest.MonkeyPatch.context() as patched:
        score = PPOProgress.score.fget
        known = property(lambda progress: None if score(progress) is None else SCORES[progress.step])
        patched.setattr(PPOProgress, "score", known)
        ppo.train(parse(whole_runs.settings(folder, output, **changes)), start_world(1))


def assert_best(output: Path, step: int) -> None:
    """The link leads to the critic of this step, which is the one that its checkpoint resumes."""
    link, checkpoint = output / "critic-best", output / f"checkpoints/step-{step:08d}"
    assert link.is_symlink() and link.resolve() == (checkpoint / "critic_model").resolve()
    about = json.loads((checkpoint / "about.json").read_text())
    assert json.loads((link / "about.json").read_text()) == {"step": step, "score": about["score"]}
    state = torch.load(checkpoint / "critic/mp_rank_00_model_states.pt", weights_only=False)["module"]
    written = load_file(link / "model.safetensors")
    heads = {"value_head.weight": "score.weight", "value_head.bias": "score.bias"}
    for name, tensor in state.items():  # those that train
        assert torch.equal(written[heads.get(name, name)], tensor), name
    assert "value_head.bias" in state


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """A run whose every step is evaluated and saved."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run(folder, output, **BEST)
    return output


@pytest.fixture
def finished(straight, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(straight, tmp_path / "run", symlinks=True))


def test_the_best_checkpoint_has_its_critic(straight):
    assert_best(straight, BEST_STEP)
    with_critic = {path.parent.name for path in (straight / "checkpoints").glob("*/critic_model")}
    assert with_critic == {f"step-{step:08d}" for step in (1, 2, 4)}  # each was the best when it was saved
    assert not list(straight.rglob(".unfinished*"))


def test_after_a_rollback_the_best_is_that_of_what_is_left(folder, straight, finished, monkeypatch):
    """And the run that goes on from there is the one that was never rolled back."""
    (finished / "critic-best").unlink()  # as after a crash between checkpoint and link
    resumed = {**BEST, "resume": finished / f"checkpoints/step-{BEST_STEP - 1:08d}"}
    with monkeypatch.context() as patched:
        patched.setattr(ppo, "evaluate_if_due", failing(RuntimeError("here it stands")))
        with pytest.raises(RuntimeError, match="here it stands"):
            run(folder, finished, **resumed)
    assert_best(finished, BEST_BEFORE)
    run(folder, finished, **resumed | {"resume": "auto"})
    assert_best(finished, BEST_STEP)
    assert whole_runs.records(finished) == whole_runs.records(straight)
    for path in (straight / "critic").glob("*.safetensors"):
        assert path.read_bytes() == (finished / "critic" / path.name).read_bytes()


def test_a_run_that_keeps_no_best_one_any_more_has_no_link(folder, finished):
    resumed = {**BEST, "resume": finished / "checkpoints/step-00000004", "checkpoint__keep_best": 0}
    run(folder, finished, **resumed)
    assert not (finished / "critic-best").is_symlink() and (finished / "critic").is_dir()


def failing(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def test_a_critic_that_cannot_be_written_costs_nothing_else(folder, straight, tmp_path, monkeypatch, caplog):
    real, output = export.save_value_model, tmp_path / "run"

    def full(role: Any, draft: Path, state: Any) -> str:
        form = real(role, draft, state)
        if f"step-{BEST_STEP:08d}" in str(draft):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return form

    monkeypatch.setattr(export, "save_value_model", full)
    with caplog.at_level(logging.ERROR, "fastppo"):
        run(folder, output, **BEST | {"checkpoint__keep_last": 1})
    lost = f"the critic of step {BEST_STEP}, the best so far, could not be exported (No space left on device)"
    assert lost in caplog.text
    assert whole_runs.records(output) == whole_runs.records(straight)
    assert whole_runs.checkpoints(output) == [f"step-{BEST_STEP:08d}", "step-00000005"]
    assert atomic_dir.problem(output / f"checkpoints/step-{BEST_STEP:08d}") is None
    assert not list((output / "checkpoints").rglob("critic_model")) and not (output / "critic-best").is_symlink()
    assert not list(output.rglob(".unfinished*")) and (output / "critic/model.safetensors").exists()


def test_a_folder_in_the_place_of_the_link_stays(folder, finished, caplog):
    (finished / "critic-best").unlink()
    (finished / "critic-best").mkdir()
    (finished / "critic-best/notes").touch()
    with caplog.at_level(logging.ERROR, "fastppo"):
        run(folder, finished, **BEST, resume="auto")
    assert f"{finished / 'critic-best'} could not be made to lead to the best critic (Is a directory)" in caplog.text
    assert (finished / "critic-best/notes").exists() and (finished / "critic/model.safetensors").exists()


# What each rank keeps of the trained critic, by itself.
RECORD = """
import torch
from fastppo import train as module
from fastppo.distributed import gathered

finish = module.finish

def recorded(setup, tracker):
    weights = {}
    for name, p in setup.roles.value_role.named_parameters():
        with gathered([p]):
            weights[name] = p.detach().clone()
    torch.save(weights, setup.output / f"weights-{setup.world.rank}.pt")
    finish(setup, tracker)

module.finish = recorded
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"zero__stage": 2, "critic__kind": "shared"},
        {"zero__stage": 3, "optim__dtype": "bf16"},
        {"zero__stage": 3, "critic__kind": "shared"},
    ],
    ids=str,
)
def test_two_ranks_leave_one_critic(folder, forks, tmp_path, changes):
    output = tmp_path / "run"
    forks.run(whole_runs.settings(folder, output, **BEST | {"steps": 2} | changes), 2, RECORD)
    weights = torch.load(output / "weights-0.pt")
    last, best = (load_file(output / name / "model.safetensors") for name in ("critic", "critic-best"))
    assert last.keys() == best.keys()
    trained = {name.replace("value_head", "score"): tensor for name, tensor in weights.items()}
    for name, tensor in last.items():
        prefix = "model." if changes.get("critic__kind") == "shared" and not name.startswith("score") else ""
        assert torch.equal(tensor, trained[prefix + name].cpu()), name
    step = json.loads((output / "critic-best/about.json").read_text())["step"]
    evaluated = {r["step"]: r["eval/score"] for r in whole_runs.records(output) if "eval/score" in r and r["step"]}
    assert step == max(evaluated, key=lambda step: (evaluated[step], step))
    assert (step == 2) == all(torch.equal(last[name], best[name]) for name in last)


def test_rest_has_no_critic_in_its_best_checkpoint(folder, tmp_path):
    best = {"checkpoint__every": 1, "checkpoint__keep_best": 1}
    train_rest.train(parse(rest_runs.settings(folder, tmp_path / "run", steps=1, **best), REST), start_world(1))
    assert list((tmp_path / "run/checkpoints").iterdir()) and not list((tmp_path / "run").rglob("critic*"))
