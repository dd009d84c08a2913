"""What is on the GPU in each phase. On the CPU the moves are made all the same where a test asks for them."""

import json
import random

import pytest
import torch
import whole_runs
from ppo_step import config_of

from fastppo.config.command_line import parse
from fastppo.distributed import Placement
from fastppo.distributed.engine import Gradients
from fastppo.distributed.moves import LEAST_PIECE, _host_memory
from fastppo.distributed.residency import Residency, uses
from fastppo.distributed.world import start_world
from fastppo.online.run import evaluate_if_due
from fastppo.ppo.run import set_up
from fastppo.train import ppo_step, train

CPU = torch.device("cpu")
USES = uses(loss_reads_reference=False)
STEP = ("sampling", "feedback", "experience", "learning")
REFERENCE, REWARD, OPTIMIZER = ("reference", "reference"), ("rewards", "reward 1"), ("optimizers", "actor")


class Part:
    def __init__(self, *tensors):
        self.tensors = list(tensors)

    def states(self):
        return self.tensors


def on_device(tensor):
    return tensor.untyped_storage().nbytes() > 0


def moving(**placement):
    """A Residency that moves from the CPU to the CPU."""
    residency = Residency(CPU, Placement(USES, **placement))
    residency._moves = True
    return residency


class LateCopies:
    """A side stream whose copies are made as late as they may be: when something waits for them."""

    def __init__(self):
        self.queue, self.begun = [], []

    def begin(self, copy):
        self.begun.append(copy.__name__)
        self.queue.append(copy)
        return len(self.begun)

    def wait(self, copied):
        while self.queue and len(self.begun) - len(self.queue) < copied:
            self.queue.pop(0)()


def test_without_a_plan_only_what_a_phase_uses_is_there():
    parts = {
        kind: Part(torch.ones(3)) for kind in ("sampling_weights", "rewards", "reference", "optimizers", "gradients")
    }
    residency = moving()
    for kind, part in parts.items():
        residency.add(kind, part, "actor")
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


def test_with_a_plan_what_stays_is_there_in_all_phases_and_is_never_copied():
    stays, goes = torch.ones(3), torch.ones(3)
    residency = moving(moved=frozenset({REWARD}))
    residency.add("optimizers", Part(stays), "actor")
    residency.add("rewards", Part(goes), "reward 1")
    at = stays.data_ptr()
    for phase in (*STEP, "health", "checkpoint", "export"):
        residency.enter(phase)
        assert on_device(stays) and on_device(goes) == (phase == "feedback")
    assert stays.data_ptr() == at and [part.host_bytes for part in residency._parts] == [0, 12]


def test_a_sleeper_sleeps_outside_of_its_phase_whatever_stays():
    class Engine:
        def __init__(self):
            self.calls = []

        def sleep(self):
            self.calls.append("sleep")

        def wake(self):
            self.calls.append("wake")

    engine, residency = Engine(), moving(moved=frozenset())
    residency.add_sleeper("sampler", engine)
    for phase in STEP * 2:
        residency.enter(phase)
    assert engine.calls == ["sleep", "wake", "sleep", "wake", "sleep"]


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
    residency.add("optimizers", Part(flat, weight, tail, empty), "actor")  # three tensors on one storage
    residency.enter("sampling")
    assert not on_device(flat) and not on_device(weight)
    residency.enter("learning")
    assert flat.tolist() == [*range(12)] and weight[1, 3] == 7 and tail.tolist() == [8, 9, 10, 11]
    weight.data[0, 0] = 5
    assert flat[0] == 5


def test_what_need_not_be_kept_is_not_copied_and_comes_back_as_zeros():
    buffer = torch.ones(1000)
    residency = moving()
    residency.add("sampling_weights", Part(buffer), "actor")
    residency.enter("feedback")
    assert residency._parts[0].host_bytes == 0 and not on_device(buffer)
    residency.enter("sampling")
    assert buffer.tolist() == [0.0] * 1000


def test_of_an_engine_the_states_are_kept_and_the_gradients_are_not_copied():
    engine, gradients = Part(torch.ones(3)), torch.ones(1000)
    engine.buffers = lambda: [gradients]
    residency = moving()
    residency.add("optimizers", engine, "actor")
    residency.add("gradients", Gradients(engine), "actor")
    assert sum(part.host_bytes for part in residency._parts) == 12
    assert not on_device(engine.tensors[0]) and not on_device(gradients)
    residency.enter("checkpoint")
    assert on_device(engine.tensors[0]) and not on_device(gradients)
    residency.enter("learning")
    assert engine.tensors[0].tolist() == [1, 1, 1] and gradients.tolist() == [0.0] * 1000


@pytest.mark.parametrize(
    ("kind", "copies"), [("reference", 1), ("rewards", 1), ("sampled", 1), ("optimizers", 4), ("gradients", 0)]
)
def test_frozen_values_are_copied_to_the_host_once_and_others_after_each_use(monkeypatch, kind, copies):
    part, residency = Part(torch.ones(3)), moving()
    residency.add(kind, part, "actor")  # copied as it is moved out
    (moved,) = residency._parts
    counted = [bool(moved.host_bytes)]
    copy = type(moved)._to_host
    monkeypatch.setattr(type(moved), "_to_host", lambda self: counted.append(True) or copy(self))
    for phase in STEP * 3:
        residency.enter(phase)
    residency.enter("loading")
    assert sum(counted) == copies


def test_states_that_an_optimizer_makes_or_replaces_are_moved_too():
    part, residency = Part(torch.ones(3)), moving()
    residency.add("optimizers", part, "actor")
    residency.enter("learning")
    part.tensors = [torch.full((5,), 2.0), torch.full((7,), 3.0)]
    residency.enter("sampling")
    assert not any(map(on_device, part.tensors)) and residency._parts[0].host_bytes == 48
    residency.enter("learning")
    assert [x.tolist() for x in part.tensors] == [[2.0] * 5, [3.0] * 7]


def test_pinned_memory_is_asked_for_in_powers_of_two():
    """PyTorch would round a block up to one."""
    for size in (1, LEAST_PIECE, 3 * LEAST_PIECE + 5, 11 * LEAST_PIECE):
        pieces = [piece.nbytes for piece in _host_memory(size, pinned=False)]
        assert sum(pieces) == size
        assert all(piece & (piece - 1) == 0 for piece in pieces[:-1]) and pieces[-1] <= max(LEAST_PIECE, pieces[0])


BESIDE = {"sampling": frozenset({OPTIMIZER, REWARD}), "feedback": {REFERENCE}, "experience": {OPTIMIZER}}
ORDER = {"sampling": "feedback", "feedback": "experience", "experience": "learning", "learning": "sampling"}


def test_the_next_phase_is_prepared_while_one_computes_and_what_leaves_is_copied_beside_the_next():
    residency, side = moving(beside=BESIDE), LateCopies()
    residency._side = side
    for kind, role in (OPTIMIZER, REWARD, REFERENCE):
        residency.add(kind, Part(torch.ones(3)), role)
    begun = {}
    for phase in STEP * 2:
        side.begun.clear()
        residency.enter(phase, ORDER[phase])
        begun[phase] = list(side.begun)
        assert all(on_device(part.states()[0]) for part in residency._parts if part.name[0] in USES[phase])
    assert begun == {
        "sampling": ["_to_host", "_from_host"],  # the optimizer leaves, the reward comes
        "feedback": ["_from_host"],
        "experience": ["_from_host"],
        "learning": [],
    }


def walk(residency, device, seed, compute=lambda: None, size=4):
    """Phases in any order, of which one that was announced may not come: each finds the values that it left."""
    rng = random.Random(seed)
    tensors = {name: torch.full((size,), float(i), device=device) for i, name in enumerate((OPTIMIZER, REWARD))}
    tensors[REFERENCE] = torch.full((size,), 9.0, device=device)
    for (kind, role), tensor in tensors.items():
        residency.add(kind, Part(tensor), role)
    expected = {name: x for name, x in zip(tensors, (0.0, 1.0, 9.0), strict=True)}
    seen = []
    for number in range(60):
        phase = rng.choice([*STEP, "checkpoint", "health"])
        residency.enter(phase, rng.choice([None, *STEP]))
        for name in (name for name in tensors if name[0] in USES[phase]):
            seen.append(((tensors[name] == expected[name]).all(), phase))
            if name == OPTIMIZER:
                expected[name] = float(number)
                tensors[name].fill_(expected[name])
        compute()
    assert [phase for right, phase in seen if not right] == [] and len(seen) > 20


def some_held(seed):
    rng = random.Random(seed)
    return {phase: frozenset(p for p in (OPTIMIZER, REWARD, REFERENCE) if rng.random() < 0.6) for phase in STEP}


@pytest.mark.parametrize("seed", range(20))
def test_values_are_right_however_late_copies_are_made_and_whichever_phase_comes(seed):
    """Copies are made when something waits for them: before that, what they fill is rubbish."""
    residency = moving(beside=some_held(seed))
    residency._side = LateCopies()
    walk(residency, CPU, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_on_a_gpu_values_are_right_while_it_computes_and_takes_the_memory_that_is_free(seed):
    """64 MB copies beside products and blocks of the same size, which are filled and freed."""
    device, count = torch.device("cuda"), 1 << 24
    factor = torch.ones(2048, 2048, device=device)

    def compute():
        for _ in range(8):
            torch.full((count,), 77.0, device=device)
            factor @ factor

    walk(Residency(device, Placement(USES, beside=some_held(seed))), device, seed, compute, count)


def test_within_a_phase_is_there_what_it_uses_and_afterwards_nothing_moves_by_itself():
    optimizer, reference = torch.ones(3), torch.ones(3)
    residency = moving()
    residency.add("optimizers", Part(optimizer), "actor")
    residency.add("reference", Part(reference), "reference")
    with residency.holding("learning"):
        assert on_device(optimizer) and not on_device(reference)
    assert on_device(optimizer)
    with residency.holding("experience"):
        assert on_device(reference) and not on_device(optimizer)


def test_a_step_and_an_evaluation_enter_each_phase_in_its_turn(tmp_path, monkeypatch):
    entered, enter = [], Residency.enter
    monkeypatch.setattr(
        Residency, "enter", lambda self, phase, then=None: entered.append(phase) or enter(self, phase, then)
    )
    setup = set_up(parse(whole_runs.settings(whole_runs.prepare(tmp_path), tmp_path / "run")), start_world(1))
    entered.clear()
    ppo_step(setup, setup.batches())
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
    residency = Residency(CPU, Placement(USES))
    residency.add("rewards", part, "reward 1")
    residency.enter("learning")
    assert on_device(part.tensors[0])


RUNS = {
    "stage 1": {"zero__stage": 1, "ppo__kl_in": "loss", "ppo__kl_kind": "exact"},
    "stage 2, optimizer offloaded": {"zero__stage": 2, "zero__offload_optimizer": "cpu"},
    "stage 3": {"zero__stage": 3, "optim__dtype": "fp32", "critic__kind": "shared"},
}
# One part stays, the others are moved, where they can be while other phases compute.
SOME = {
    "moved": frozenset({OPTIMIZER, REFERENCE, ("sampling_weights", "actor"), ("gradients", "actor")}),
    "beside": {"feedback": frozenset({REFERENCE}), "experience": frozenset({OPTIMIZER}), "sampling": {OPTIMIZER}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_states_move_is_the_run_whose_states_stay(tmp_path, monkeypatch, name):
    """Bit for bit, its checkpoints too, from which one goes on that moves other parts at other times."""
    folder = whole_runs.prepare(tmp_path)
    small = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}
    (folder / "split.json").write_text(json.dumps({"zero_optimization": small}))
    changes = {"zero__deepspeed": folder / "split.json", "optim__schedule": "constant", "eval__every": 1} | RUNS[name]
    train(parse(whole_runs.settings(folder, folder / "stays", **changes, steps=2)), start_world(1))
    for placement, more in (({}, {"steps": 1}), (SOME, {"steps": 2, "resume": "auto"})):
        moved = whole_runs.move_on_the_cpu_too(monkeypatch, **placement)
        train(parse(whole_runs.settings(folder, folder / "moves", **changes, **more)), start_world(1))
        monkeypatch.undo()
    assert {"optimizers", "gradients", "reference"} <= moved and ("sampling_weights" in moved) == (name == "stage 3")
    assert whole_runs.records(folder / "stays") == whole_runs.records(folder / "moves")
    assert whole_runs.same(whole_runs.state(folder / "stays"), whole_runs.state(folder / "moves"))
