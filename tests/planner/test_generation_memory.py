"""The plan of generate: two phases, what is on the GPU in which, and a run that does not fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import generated
import pytest
import tiny
import torch
from architectures import ACTORS, directory

from fastppo import generate, plan
from fastppo.config import GenerateConfig
from fastppo.config.command_line import GENERATE, parse
from fastppo.distributed import Residency
from fastppo.distributed.world import World, start_world
from fastppo.generation.run import Sampled
from fastppo.models import Policy
from fastppo.planner import check
from fastppo.planner.changes import advice, smallest_change
from fastppo.planner.machine import Machine
from fastppo.planner.plan import FILLED, PROCESS_GPU, Plan, make_plan, measured_roles
from fastppo.rollout import bucket

GB = 10**9
LARGE = Machine(2, 1, 80 * GB, 10**12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of 1.3 billion parameters without weights, and a reward model with them."""
    place = tmp_path_factory.mktemp("models")
    return directory(place / "1.3b", *ACTORS["1.3b"]), tiny.saved(place / "reward", tiny.classifier())


def config_of(models: tuple[str, str], **changes: Any) -> GenerateConfig:
    fixed = {"model.path": models[0], "data.path": "x.jsonl", "rewards": json.dumps([{"model": models[1]}])}
    given = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return parse([part for k, v in given.items() for part in (f"--{k}", str(v))], GENERATE)


def places(found: Plan, role: str, phase: str) -> Any:
    return next(share.places for share in found.shares if (share.role, share.phase) == (role, phase))


def test_where_both_models_do_not_fit_one_waits_in_the_host_s_memory_for_its_phase(models):
    config = config_of(models, sampling__cuda_graphs="false")
    roles = measured_roles(config, cpu=False)
    found = make_plan(config, LARGE, roles)
    assert {share.phase for share in found.shares} == {"sampling", "feedback"} and found.fits
    for role in ("model", "reward 1"):
        (weights,) = {places(found, role, phase).gpu.weights for phase in ("sampling", "feedback")}
        assert weights > 0 and all(places(found, role, phase).host.total == 0 for phase in ("sampling", "feedback"))
    assert found.choices == ["moved between GPU and host: nothing, as all parts fit at once"]
    sampled = places(found, "model", "sampling").gpu.total
    tight = make_plan(config, replace(LARGE, gpu=int(sampled / FILLED) + PROCESS_GPU + 1), roles)
    there, waiting = places(tight, "reward 1", "feedback"), places(tight, "reward 1", "sampling")
    assert there.gpu.weights == waiting.host.weights == there.host.weights > 0 == waiting.gpu.total
    assert places(tight, "model", "feedback") == places(found, "model", "feedback")  # for both there is room here
    assert tight.fits and "moved between GPU and host: reward 1" in tight.choices[0]
    assert places(found, "model", "sampling").gpu.cache > 0 == places(found, "reward 1", "feedback").gpu.cache
    assert all(share.places.gpu.optimizer == share.places.gpu.gradients == 0 for share in found.shares)


def test_on_a_cpu_there_is_one_memory_and_nothing_moves(models):
    found = make_plan(config_of(models), Machine(1, 1, None, 10**12))
    for role in ("model", "reward 1"):
        weights = [places(found, role, phase).gpu.weights for phase in ("sampling", "feedback")]
        assert weights[0] == weights[1] > 0


def test_a_reward_model_takes_less_of_each_gpu_when_it_is_split_and_the_sampled_model_does_not(models):
    whole, split, away = (make_plan(config_of(models, rewards_on=place), LARGE) for place in ("gpu", "ranks", "cpu"))
    for role, phase in (("model", "sampling"), ("model", "feedback")):
        assert places(whole, role, phase) == places(split, role, phase) == places(away, role, phase)
    on_gpu, parted = (places(found, "reward 1", "sampling") for found in (whole, split))
    assert parted.host.weights == on_gpu.host.weights // 2 and places(away, "reward 1", "feedback").host.weights > 0


def test_a_run_that_does_not_fit_is_told_what_would_or_that_nothing_does(models):
    tight = make_plan(config_of(models, sampling__rows=128), Machine(1, 1, 24 * GB, 10**12))
    assert not tight.fits and set(smallest_change(tight) or {}) == {"sampling.rows"}
    small = make_plan(config_of(models), Machine(1, 1, 3 * GB, 10**12))
    assert "The model's weights alone, whole on each GPU" in advice(small) and "a smaller model" in advice(small)


@pytest.mark.parametrize("gpu", [8, 10, 16])  # GB
def test_auto_takes_the_most_rows_that_fit(models, gpu):
    config, machine = config_of(models, sampling__rows="auto", batch_size=4096), Machine(1, 1, gpu * GB, 10**12)
    roles = measured_roles(config, cpu=False)
    found = make_plan(config, machine, roles)
    assert found.fits and found.config.sampling.rows == found.rows and found.rows > 4
    more = config_of(models, sampling__rows=bucket(found.rows + 1), batch_size=4096)
    assert not make_plan(more, machine, roles).fits
    assert make_plan(config_of(models, batch_size=4096), machine, roles).rows is None


def test_auto_takes_no_more_rows_than_a_rank_has_responses(models):
    config = config_of(models, sampling__rows="auto", batch_size=40)
    assert make_plan(config, Machine(2, 1, 80 * GB, 10**12)).rows == bucket(20) == 24
    assert make_plan(config, Machine(1, 1, 80 * GB, 10**12)).rows == bucket(40) == 48


def test_auto_takes_at_most_64_rows_on_a_cpu_and_as_few_as_fit(models):
    config = config_of(models, sampling__rows="auto", batch_size=4096)
    roles = measured_roles(config, cpu=True)
    assert make_plan(config, Machine(1, 1, None, 10**12), roles).rows == 64
    least, most = (make_plan(config_of(models, sampling__rows=rows), Machine(1, 1, None, 1), roles) for rows in (4, 64))
    between = (least.needs["host"][0] + most.needs["host"][0]) // 2
    assert 4 < (make_plan(config, Machine(1, 1, None, between), roles).rows or 0) < 64


def test_where_nothing_fits_auto_takes_the_fewest_rows_and_the_advice_names_something_else(models):
    found = make_plan(config_of(models, sampling__rows="auto"), Machine(1, 1, 3 * GB, 10**12))
    assert not found.fits and found.rows == 4 and "sampling.rows" not in advice(found)


def test_all_ranks_take_the_fewest_rows_that_one_of_them_chose_and_a_line_says_how_many(
    models, monkeypatch, caplog, capsys
):
    """Another process holds most of its GPU."""
    least, first = replace(LARGE, gpu=8 * GB), World(0, 3, torch.device("cpu"))
    monkeypatch.setattr(check, "this_machine", lambda *args, **kwargs: LARGE)
    monkeypatch.setattr(check, "all_gather", lambda machine, world: [machine, least, machine])
    config = config_of(models, sampling__rows="auto")
    alone = make_plan(config, least)
    assert alone.rows is not None and alone.rows < (make_plan(config, LARGE).rows or 0)
    line = f"sampling.rows: {alone.rows}, chosen by the memory that there is"
    planned = check.check_plan(config, first)
    assert planned.config == replace(config, sampling=replace(config.sampling, rows=alone.rows))
    assert planned.placement == alone.placement
    assert line in capsys.readouterr().out
    with caplog.at_level(logging.INFO, "fastppo"):
        off = check.check_plan(replace(config, plan="off"), first)
    assert off.config.sampling.rows == alone.rows and off.placement is None
    assert [r.getMessage() for r in caplog.records] == [line]
    fixed = config_of(models, sampling__rows=32, plan="off")
    assert check.check_plan(fixed, first) == check.Planned(fixed, None)


def test_the_command_plans_a_run_of_generate(models, capsys):
    argv = ["--command", "generate", "--gpus", "2", "--gpu-memory", "80GB", "--host-memory", "1TB"]
    argv += ["--model.path", models[0], "--data.path", "x.jsonl"]
    plan.main(argv)
    said = capsys.readouterr().out
    assert "sampling" in said and "feedback" in said and "GPU: " in said and "rows" not in said
    plan.main([*argv, "--sampling.rows", "auto"])
    assert "sampling.rows: 256, chosen by the memory that there is" in capsys.readouterr().out  # 512 for two


def test_a_run_checks_its_plan_before_it_loads_a_model(tmp_path, monkeypatch):
    folder = generated.prepare(tmp_path)
    monkeypatch.setattr(check, "this_machine", lambda *args, **kwargs: Machine(1, 1, None, 10**9))
    argv = generated.settings(folder, tmp_path / "out", plan="check")
    with pytest.raises(check.PlanError, match="does not fit"):
        generate.generate(parse(argv, GENERATE), start_world(1))
    assert not (tmp_path / "out").exists()


def test_a_run_with_auto_draws_the_same_responses_and_keeps_auto_in_its_settings(tmp_path):
    folder, world, found = generated.prepare(tmp_path), start_world(1), []
    for rows in ("auto", 4):
        output = tmp_path / f"rows-{rows}"
        generate.generate(parse(generated.settings(folder, output, sampling__rows=rows), GENERATE), world)
        found.append((output / "responses.jsonl").read_bytes())
        assert f"  rows: {rows}\n" in (output / "config.yaml").read_text()
    assert found[0] == found[1]


def test_the_sampled_model_is_moved_out_while_others_are_computed(monkeypatch):
    residency = Residency(torch.device("cpu"))
    residency._moves = True  # as on a GPU; what moves are the same storages
    model = Sampled(Policy(tiny.causal()).requires_grad_(False), tiny.tokenizer(), residency)
    held = {}
    for phase in ("loading", "sampling", "feedback", "sampling"):
        residency.enter(phase)
        held[phase] = sum(x.untyped_storage().nbytes() for x in model.states())
    assert held["loading"] == held["feedback"] == 0 < held["sampling"]
    assert all(x.equal(y) for x, y in zip(model.states(), Policy(tiny.causal()).parameters(), strict=True))
