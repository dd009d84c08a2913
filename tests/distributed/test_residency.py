"""What is on the GPU in each phase. On the CPU the moves are made all the same where a test asks for them."""

import json

import pytest
import torch
import whole_runs
from ppo_step import config_of

from fastppo.config import Config
from fastppo.config.command_line import parse
from fastppo.distributed.engine import Gradients
from fastppo.distributed.residency import Residency, uses
from fastppo.distributed.world import start_world
from fastppo.online.run import evaluate_if_due
from fastppo.ppo.run import set_up
from fastppo.train import ppo_step, train

CPU = torch.device("cpu")


class Part:
    def __init__(self, *tensors):
        self.tensors = list(tensors)

    def states(self):
        return self.tensors


def on_device(tensor):
    return tensor.untyped_storage().nbytes() > 0


def moving(config=None):
    """A Residency that moves from the CPU to the CPU."""
    residency = Residency(CPU, loss_reads_reference=(config or Config()).loss_reads_reference)
    residency._moves = True
    return residency


def test_in_each_stage_only_what_it_uses_is_there():
    parts = {
        kind: Part(torch.ones(3)) for kind in ("sampling_weights", "rewards", "reference", "optimizers", "gradients")
    }
    residency = moving()
    for kind, part in parts.items():
        residency.add(kind, part)
    there = {}
    step = ("sampling", "feedback", "experience", "learning", "health", "checkpoint")
    for phase in ("loading", *step, "sampling", "learning"):
        residency.enter(phase)
        there[phase] = {kind for kind, part in parts.items() if on_device(part.tensors[0])}
    assert there == {
        "loading": set(),
        "sampling": {"sampling_weights"},
        "feedback": {"rewards"},
        "experience": {"reference"},
        "learning": {"optimizers", "gradients"},
        "health": {"optimizers", "gradients"},
        "checkpoint": {"optimizers"},
    }


def test_the_reference_is_there_in_learning_only_if_the_loss_reads_it():
    for kl_in, reads in (("loss", True), ("reward", False)):
        config = config_of("none", "--ppo.kl_in", kl_in, "--ppo.kl_kind", "exact")
        learning = uses(loss_reads_reference=config.loss_reads_reference)["learning"]
        assert ("reference" in learning) is reads


def test_what_comes_back_is_the_same_through_every_view_of_it():
    flat = torch.arange(12.0)
    weight = torch.nn.Parameter(flat[:8].view(2, 4))
    tail, empty = flat[8:], torch.empty(0)
    residency = moving()
    residency.add("optimizers", Part(flat, weight, tail, empty))  # three tensors on one storage
    residency.enter("sampling")
    assert not on_device(flat) and not on_device(weight)
    residency.enter("learning")
    assert flat.tolist() == [*range(12)] and weight[1, 3] == 7 and tail.tolist() == [8, 9, 10, 11]
    weight.data[0, 0] = 5
    assert flat[0] == 5


def test_what_need_not_be_kept_is_not_copied_and_comes_back_as_zeros():
    buffer = torch.ones(1000)
    residency = moving()
    residency.add("sampling_weights", Part(buffer))
    residency.enter("feedback")
    ((host, _, size),) = residency._parts[0].moved_out
    assert host.numel() == 0 and size == buffer.nbytes
    residency.enter("sampling")
    assert buffer.tolist() == [0.0] * 1000


def test_of_an_engine_the_states_are_kept_and_the_gradients_are_not_copied():
    engine, gradients = Part(torch.ones(3)), torch.ones(1000)
    engine.buffers = lambda: [gradients]
    residency = moving()
    residency.add("optimizers", engine)
    residency.add("gradients", Gradients(engine))
    assert sum(host.nbytes for part in residency._parts for host, _, _ in part.moved_out) == 12
    assert not on_device(engine.tensors[0]) and not on_device(gradients)
    residency.enter("checkpoint")
    assert on_device(engine.tensors[0]) and not on_device(gradients)
    residency.enter("learning")
    assert engine.tensors[0].tolist() == [1, 1, 1] and gradients.tolist() == [0.0] * 1000


def test_within_a_phase_is_there_what_it_uses_and_afterwards_nothing_moves_by_itself():
    optimizer, reference = torch.ones(3), torch.ones(3)
    residency = moving()
    residency.add("optimizers", Part(optimizer))
    residency.add("reference", Part(reference))
    with residency.holding("learning"):
        assert on_device(optimizer) and not on_device(reference)
    assert on_device(optimizer)
    with residency.holding("experience"):
        assert on_device(reference) and not on_device(optimizer)


def test_a_step_and_an_evaluation_enter_each_phase_in_its_turn(tmp_path, monkeypatch):
    entered, enter = [], Residency.enter
    monkeypatch.setattr(Residency, "enter", lambda self, phase: entered.append(phase) or enter(self, phase))
    setup = set_up(parse(whole_runs.settings(whole_runs.prepare(tmp_path), tmp_path / "run")), start_world(1))
    entered.clear()
    ppo_step(setup, next(setup.batches()))
    assert entered == ["sampling", "feedback", "experience", "learning", "health"]
    assert list(setup.phases.take()) == [f"time/{phase}" for phase in entered]
    entered.clear()
    with setup.tracker() as tracker:
        evaluate_if_due(setup, tracker)
    assert entered == ["sampling", "feedback", "experience"]
    setup.checkpoints.save(setup.progress)
    assert entered[3:] == ["checkpoint"]


def test_without_a_gpu_nothing_moves():
    part = Part(torch.ones(3))
    residency = Residency(CPU)
    residency.add("rewards", part)
    residency.enter("learning")
    assert on_device(part.tensors[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"zero__stage": 1, "ppo__kl_in": "loss", "ppo__kl_kind": "exact"},
        {"zero__stage": 2, "zero__offload_optimizer": "cpu"},
        {"zero__stage": 3, "optim__dtype": "fp32", "critic__kind": "shared"},
    ],
    ids=str,
)
def test_a_run_whose_states_move_is_the_run_whose_states_stay(tmp_path, monkeypatch, changes):
    """Bit for bit, its checkpoints too, from which one that moves goes on."""
    folder = whole_runs.prepare(tmp_path)
    small = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}
    (folder / "split.json").write_text(json.dumps({"zero_optimization": small}))
    changes = {"zero__deepspeed": folder / "split.json", "optim__schedule": "constant", "eval__every": 1} | changes
    moved, enter = [], Residency.enter

    def entering(self, phase):
        for x in (x for part in self._parts if not part.moved_out for x in part.states()):
            if not x.untyped_storage().resizable():  # on the CPU a state that was loaded is mapped from its file
                x.data = x.data.clone()
        enter(self, phase)
        moved.extend(part.kind for part in self._parts if part.moved_out)

    for name, moves in (("stays", False), ("moves", True)):
        monkeypatch.setattr(Residency, "enter", entering)
        made = Residency.__init__

        def init(self, *args, made=made, moves=moves, **options):
            made(self, *args, **options)
            self._moves = moves

        monkeypatch.setattr(Residency, "__init__", init)
        for more in ({"steps": 1}, {"steps": 2, "resume": "auto"}) if moves else ({"steps": 2},):
            train(parse(whole_runs.settings(folder, folder / name, **changes, **more)), start_world(1))
        monkeypatch.undo()
    assert {"optimizers", "gradients", "reference"} <= set(moved) and ("sampling_weights" in moved) == (
        changes["zero__stage"] == 3
    )
    assert whole_runs.records(folder / "stays") == whole_runs.records(folder / "moves")
    assert whole_runs.same(whole_runs.state(folder / "stays"), whole_runs.state(folder / "moves"))
