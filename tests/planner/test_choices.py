"""What the plan chooses: layers that recompute their activations and parts that are moved, the fewest that fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import pairwise, product

import pytest
import tiny
import torch
from ppo_step import config_of

from fastppo.config import Config
from fastppo.config.command_line import SFT, parse
from fastppo.distributed import REMADE
from fastppo.distributed.world import World
from fastppo.planner import changes, check, memory
from fastppo.planner.changes import GATHERED_TOKENS, lower_stage
from fastppo.planner.footprint import Footprint, Pass
from fastppo.planner.machine import Machine
from fastppo.planner.memory import by_phase
from fastppo.planner.plan import (
    CHOSEN,
    FILLED,
    PROCESS_GPU,
    Plan,
    _with_placement,
    make_plan,
    measured_roles,
    method_of,
    with_recomputed,
)

LAYERS = 3  # of the actor
ALONE = World(0, 1, torch.device("cpu"))

# What a run has beside the actor and how its states are split: every setting with every other.
TABLE = [
    (stage, dtype, offload, lora, critic)
    for stage, dtype, offload, lora, critic in product(
        (0, 1, 2, 3), ("fp32", "bf16"), ("none", "cpu"), (0, 2), ("separate", "shared")
    )
    if not (stage == 0 and (dtype == "bf16" or offload == "cpu"))  # which are refused
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An actor and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    actor = tiny.saved(folder / "actor", tiny.causal(num_hidden_layers=LAYERS))
    return actor, tiny.saved(folder / "reward", tiny.classifier())


@pytest.fixture(autouse=True)
def layers_of_100_kilobytes(monkeypatch):
    """Each layer keeps 100 KB, or 10 KB if it recomputes; nothing is measured."""

    def passes(
        self: Footprint, sequences: int, length: int, *, gradient: bool, recomputed: int = 0, split: int = 1
    ) -> Pass:
        kept = 100_000 * LAYERS - 90_000 * min(recomputed, LAYERS) if gradient else 0
        return Pass(kept, kept + 50_000)

    monkeypatch.setattr(Footprint, "passes", passes)
    monkeypatch.setattr(memory, "REDUCE_BUCKET", 2_000)


def settings(models: tuple[str, str], stage: int, dtype: str, offload: str, lora: int, critic: str) -> Config:
    argv = ["--zero.stage", str(stage), "--optim.dtype", dtype, "--zero.offload_optimizer", offload]
    argv += ["--critic.kind", critic, "--actor.lora.rank", str(lora), "--ppo.microbatch_tokens", "60"]
    argv += ["--critic.lora.rank", str(lora)] if lora and critic == "separate" else []
    return config_of(models[0], *argv, "--rewards", json.dumps([{"model": models[1]}]))


def machine_with(room: int) -> Machine:
    """With so many bytes of a GPU that choices may fill."""
    return Machine(1, 1, int(room / CHOSEN / FILLED) + PROCESS_GPU + 2, 10**12)


def copied(plan: Plan) -> int:
    """Bytes of what is moved and not made again."""
    assert plan.placement is not None
    moved = plan.parts if plan.placement.moved is None else plan.placement.moved
    return sum(plan.parts[name] for name in moved if name[0] not in REMADE)


def layers(plan: Plan) -> int:
    assert plan.recomputed is not None
    return plan.recomputed[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_with_more_room_fewer_layers_recompute_and_then_less_is_moved_until_nothing_is(models, case):
    config = settings(models, *case)
    roles, moves = measured_roles(config, cpu=False), method_of(config).moves
    most = make_plan(config, Machine(1, 1, 10**12, 10**12), roles)
    assert moves is not None and layers(most) == 0 and most.placement is not None and not most.placement.moved
    assert most.config.optim.activation_checkpointing is False
    assert "moved between GPU and host: nothing, as all parts fit at once" in most.choices
    everything = _with_placement(with_recomputed(config, LAYERS), most.machine, roles, moves.least(config))
    least, all_of_it = everything.needs["GPU"][0], most.needs["GPU"][0]
    found = [make_plan(config, machine_with(least + (all_of_it - least) * i // 12), roles) for i in range(13)]
    assert [layers(plan) for plan in found] == sorted(map(layers, found), reverse=True)
    assert layers(found[-1]) == copied(found[-1]) == 0 < len(found[0].parts)
    for plan, more in pairwise(found):
        assert plan.leaves_reserve() and (layers(plan) > layers(more) or copied(plan) >= copied(more))
        for phase, places in by_phase(plan.shares):  # the table that a run shows has what stays
            own = sum(size for name, size in plan.parts.items() if plan.placement.holds(phase, name))
            assert places.gpu.total >= own
        if layers(plan):  # with one less it does not fit, wherever the parts are
            fewer = with_recomputed(config, layers(plan) - 1)
            assert not _with_placement(fewer, plan.machine, roles, moves.least(config)).leaves_reserve()


def test_on_the_cpu_layers_recompute_where_memory_is_short_and_nothing_is_moved(models):
    config = settings(models, 1, "bf16", "none", 0, "separate")
    roles = measured_roles(config, cpu=True)
    none, every = (make_plan(with_recomputed(config, n), Machine(1, 1, None, 10**12), roles) for n in (0, LAYERS))
    needs = [plan.needs["host"][0] for plan in (none, every)]
    assert needs[0] - needs[1] == 2 * 90_000 * LAYERS - 90_000 * LAYERS  # actor or critic: they learn in turn
    for need, count in ((needs[0], 0), (needs[0] - 1, 1), (needs[1], LAYERS)):
        plan = make_plan(config, Machine(1, 1, None, int(need / CHOSEN) + 1), roles)
        assert layers(plan) == count and len(plan.choices) == 1


def test_where_nothing_fits_all_layers_recompute_and_the_advice_names_something_else(models):
    config = settings(models, 1, "bf16", "none", 0, "separate")
    plan = make_plan(config, machine_with(1000))
    assert not plan.fits and layers(plan) == LAYERS and plan.placement.moved == set(plan.parts)
    assert plan.choices[0] == "optim.activation_checkpointing: all layers, chosen by the memory that there is"


@pytest.mark.parametrize(("given", "count"), [("true", LAYERS), ("false", 0), ("2", 2), ("99", LAYERS)])
def test_a_number_that_is_given_is_not_chosen(models, given, count):
    setting = config_of(models[0], "--optim.activation_checkpointing", given).optim.activation_checkpointing
    config = settings(models, 1, "bf16", "none", 0, "shared")
    config = replace(config, optim=replace(config.optim, activation_checkpointing=setting))
    plan = make_plan(config, Machine(1, 1, 10**12, 10**12))
    assert plan.recomputed is None and plan.config.optim.recomputed_layers(LAYERS) == count
    learning = next(s.places.gpu for s in plan.shares if (s.role, s.phase) == ("actor", "learning"))
    none = make_plan(with_recomputed(config, 0), plan.machine)
    whole = next(s.places.gpu for s in none.shares if (s.role, s.phase) == ("actor", "learning"))
    assert whole.total - learning.total == 90_000 * count


def test_a_run_without_a_plan_recomputes_nothing_and_moves_all_that_a_phase_does_not_use(models):
    config = settings(models, 1, "bf16", "none", 0, "shared")
    assert config.optim.activation_checkpointing == "auto"
    found = check.check_plan(replace(config, plan="off"), ALONE)
    assert found.config.optim.activation_checkpointing is False and found.placement is None


def test_all_ranks_choose_for_the_least_memory_that_one_of_them_has(models, monkeypatch, capsys):
    config = settings(models, 1, "bf16", "none", 0, "shared")
    roles = measured_roles(config, cpu=False)
    large = make_plan(config, Machine(1, 1, 10**12, 10**12), roles)
    small = machine_with(large.needs["GPU"][0] - 100_000)
    monkeypatch.setattr(check, "this_machine", lambda *args, **kwargs: large.machine)
    monkeypatch.setattr(check, "all_gather", lambda machine, world: [machine, small])
    planned, alone = check.check_plan(config, World(0, 2, torch.device("cpu"))), make_plan(config, small, roles)
    assert (planned.config, planned.placement) == (alone.config, alone.placement) != (large.config, large.placement)
    assert all(line in capsys.readouterr().out.replace("\n", " ") for line in alone.choices[:1])


def test_a_method_with_one_model_chooses_layers_and_moves_nothing(models, caplog):
    argv = ["--model.path", models[0], "--data.path", "x.jsonl", "--data.max_tokens", "16", "--batch_size", "4"]
    config = parse([*argv, "--microbatch_tokens", "16"], SFT)
    roles = measured_roles(config, cpu=False)
    whole = make_plan(config, Machine(1, 1, 10**12, 10**12), roles)
    assert layers(whole) == 0 and whole.placement is None and len(whole.choices) == 1
    tight = make_plan(config, machine_with(whole.needs["GPU"][0] - 90_000), roles)
    assert layers(tight) == 1 and tight.choices == [
        f"optim.activation_checkpointing: 1 of {LAYERS} layers, chosen by the memory that there is"
    ]
    with caplog.at_level(logging.INFO, "fastppo"):
        assert check.check_plan(replace(config, plan="off"), ALONE).config.optim.activation_checkpointing is False


def test_stage_2_is_named_to_a_run_at_stage_3_where_it_fits_as_well(models, capsys):
    at = {stage: settings(models, stage, "bf16", "none", 0, "shared") for stage in (2, 3)}
    roles, large = measured_roles(at[3], cpu=False), Machine(4, 1, 10**12, 10**12)
    fits = make_plan(at[3], large, roles)
    assert lower_stage(fits) == {"zero.stage": 2} and lower_stage(make_plan(at[2], large, roles)) is None
    check.show(fits, check.table_console())
    assert "--zero.stage 2 fits as well" in capsys.readouterr().out
    assert lower_stage(make_plan(at[3], replace(large, gpus=1), roles)) is None  # one rank has nothing to gather
    offloaded = replace(at[3], zero=replace(at[3].zero, offload_parameters="cpu"))
    assert lower_stage(make_plan(offloaded, large, roles)) is None


@pytest.mark.parametrize(("more", "tokens", "named"), [(0, 10**6, True), (1, 7500, True), (1, 7503, False)])
def test_stage_2_is_not_named_where_recomputing_more_layers_costs_more_than_gathering(
    models, monkeypatch, more, tokens, named
):
    config = settings(models, 3, "bf16", "none", 0, "shared")
    config = replace(config, ppo=replace(config.ppo, microbatch_tokens=tokens))
    plan = make_plan(config, Machine(4, 1, 10**12, 10**12))
    lower = replace(plan, recomputed=(more, LAYERS))
    monkeypatch.setattr(changes, "make_plan", lambda *_: lower)
    assert (lower_stage(plan) is not None) == named == (more * tokens <= LAYERS * GATHERED_TOKENS)
    monkeypatch.setattr(changes, "make_plan", lambda *_: replace(lower, machine=machine_with(1000)))
    assert lower_stage(plan) is None  # it does not fit


def test_where_stage_2_is_enough_with_an_offloaded_optimizer_stage_3_is_not_proposed(models):
    config = settings(models, 1, "bf16", "none", 0, "shared")
    order = list(changes._options(config, Machine(4, 1, 10**12, 10**12)))
    lower = order.index({"zero.stage": 2, "zero.offload_optimizer": "cpu"})
    assert all(i > lower for i, change in enumerate(order) if change.get("zero.stage") == 3 and len(change) > 1)
