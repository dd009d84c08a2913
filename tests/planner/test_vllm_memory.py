"""The plan of a run that vLLM samples for: its share of a GPU, what of it stays asleep, and what would make it fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from architectures import ACTORS, directory, preset
from transformers import AutoModelForCausalLM

from fastppo import plan
from fastppo.config import LoraConfig
from fastppo.config.command_line import GENERATE, PPO, REST, parse
from fastppo.models.loading.source import Source
from fastppo.models.loading.weights import outline
from fastppo.models.lora import add_adapters
from fastppo.models.roles import ModelError, Policy, fuse_head
from fastppo.planner import check
from fastppo.planner.changes import advice, smallest_change
from fastppo.planner.footprint import Footprint
from fastppo.planner.machine import Machine
from fastppo.planner.memory import GATHER_BYTES, Role, by_phase
from fastppo.planner.plan import Plan, make_plan, measured_roles
from fastppo.planner.vllm_memory import COMMUNICATION, CPU_CACHE, GRAPHS, LARGE, streaming_needs

GB = 10**9
NODES = Machine(8, 2, 80 * GB, 2000 * GB)
MACHINE = ["--gpus", "8", "--nodes", "2", "--gpu-memory", "80GB", "--host-memory", "2TB"]
PARALLEL, SHARE = "rollout.vllm.tensor_parallel_size", "rollout.vllm.gpu_memory_utilization"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(CPU_CACHE, raising=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An actor and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    return tiny.saved(folder / "actor", tiny.causal()), tiny.saved(folder / "reward", tiny.classifier())


def size_of(folder: str) -> Footprint:
    model = fuse_head(outline(AutoModelForCausalLM, Source("actor.model", folder), torch.bfloat16))
    return Footprint(Policy(model), torch.bfloat16, cpu=False)


@pytest.fixture(scope="module")
def seventy_billion(tmp_path_factory):
    return size_of(directory(tmp_path_factory.mktemp("shape"), *ACTORS["70b"]))


@pytest.fixture(scope="module")
def of_70b(tmp_path_factory):
    """The command line of the preset."""
    return preset(tmp_path_factory.mktemp("70b"), "70b")


def config_of(models: tuple[str, str], **changes: Any) -> Any:
    given = {"actor.model": models[0], "rewards": json.dumps([{"model": models[1]}]), "data.path": "x.jsonl"}
    given |= {"rollout.engine": "vllm"} | {name.replace("__", "."): value for name, value in changes.items()}
    return parse([part for k, v in given.items() for part in (f"--{k}", str(v))], PPO, ranks=8)


ROLES: dict[object, list[Role]] = {}  # what takes the time is to measure their models


def planned(config: Any, machine: Machine) -> Plan:
    cpu = machine.gpu is None
    trained = (config.trained.get("actor"), config.trained.get("critic"))
    key = (type(config), cpu, config.optim.dtype, trained, config.rewards)
    if key not in ROLES:
        ROLES[key] = measured_roles(config, cpu=cpu)
    return make_plan(config, machine, ROLES[key])


def row(found: Plan, phase: str, role: str = "vLLM") -> Any:
    return next(share.places.gpu for share in found.shares if (share.role, share.phase) == (role, phase))


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_matrices_are_split_over_ranks_and_vectors_and_at_least_one_head_of_keys_and_values_are_not(
    seventy_billion, ranks
):
    """Llama-2-70B: 80 layers, 8192 wide, 64 heads of 128, 8 of keys and values, inner width 28,672, 32,000 tokens."""
    width, key_value_heads = 8192, max(8 // ranks, 1)
    attention = 2 * width * width // ranks + 2 * width * key_value_heads * 128
    layer = attention + 3 * width * 28672 // ranks + 2 * width
    assert seventy_billion.part(ranks) == 80 * layer + 2 * 32000 * width // ranks + width


def test_adapters_and_the_value_head_are_no_part_of_what_vllm_has(models):
    plain = size_of(models[0])
    model = fuse_head(outline(AutoModelForCausalLM, Source("actor.model", models[0]), torch.bfloat16))
    add_adapters(model, "actor", LoraConfig(rank=2), seed=0, source="")
    adapted = Footprint(Policy(model), torch.bfloat16, cpu=True)
    assert adapted.part(1) == plain.part(1) == plain.parameters < adapted.parameters
    assert adapted.adapters == adapted.parameters - plain.parameters


def test_the_preset_of_70b_fits_and_shows_its_arithmetic(of_70b, capsys):
    plan.main([*of_70b, *MACHINE])
    said = capsys.readouterr().out
    for text in ("0.5 of 80.0 GB = 40.0", "weights 138.0 over 8 ranks = 17.2", "left for the cache 18.4"):
        assert text in said, said
    assert "439 at once, of the 256 that 8 ranks draw together" in said
    assert "GPU: 67.4 of 75.0 GB, fits" in said and "host: " in said and "does not fit" not in said


def test_with_the_engine_in_process_it_does_not_fit_and_vllm_is_proposed(of_70b, capsys):
    argv = [*of_70b, "--rollout.engine", "inprocess", f"--{PARALLEL}", "1", *MACHINE]
    with pytest.raises(SystemExit):
        plan.main(argv)
    said = capsys.readouterr().err
    assert "weights alone, whole on each GPU to sample from, take 138.0 GB there; vLLM splits them" in said
    change = said.partition("The smallest change that fits: ")[2].split()
    assert change[:3] == ["--rollout.engine", "vllm", f"--{PARALLEL}"]
    plan.main([*argv, *change])  # exits if it does not fit
    assert "vLLM: " in capsys.readouterr().out


def test_while_it_samples_vllm_fills_its_share_and_asleep_its_graphs_stay(models):
    config, machine = config_of(models, **{PARALLEL: 2, SHARE: 0.25}), Machine(8, 1, 24 * GB, 10**12)
    found = planned(config, machine)
    assert row(found, "sampling").total == 6 * GB
    for phase in ("feedback", "experience", "learning"):
        assert row(found, phase).total == row(found, phase).buffers == GRAPHS + COMMUNICATION
    eager = planned(config_of(models, rollout__vllm__arguments='{"enforce_eager": true}'), machine)
    assert {share.phase for share in eager.shares if share.role == "vLLM"} == {"sampling"}
    assert found.vllm is not None and row(found, "sampling").cache == found.vllm.cache


def test_what_it_may_take_and_where_it_stops_being_enough(models):
    """One byte less than weights, graphs, a pass and the cache of one response does not fit, whatever the GPU has."""
    config = config_of(models)
    vllm = planned(config, Machine(8, 1, 24 * GB, 10**12)).vllm
    assert vllm is not None and vllm.fits
    exact = replace(vllm, share=vllm.needs[0])
    assert exact.fits and exact.cache == exact.response and "1 at once" in exact.lines()[1]
    short = replace(vllm, share=vllm.needs[0] - 1)
    assert not short.fits and "0 at once" in short.lines()[1] and "one response" in short.problem()
    limited = planned(config_of(models, **{SHARE: 0.01}), Machine(8, 1, 24 * GB, 10**12))
    assert not limited.fits and limited.needs["GPU"][0] < limited.needs["GPU"][1]
    said = advice(limited)
    assert "vLLM needs" in said and "may take 0.01 of 24.0 GB" in said and f"--{SHARE}" in said
    assert "GPU memory are needed" not in said


def test_a_large_batch_of_tokens_leaves_less_for_the_cache(models):
    sizes = ("", '{"max_num_batched_tokens": 65536}', '{"max_num_seqs": 65536}', '{"kv_cache_memory_bytes": 1000000}')
    found = [planned(config_of(models, rollout__vllm__arguments=size or "{}"), NODES).vllm for size in sizes]
    usual, tokens, rows, given = (vllm for vllm in found if vllm is not None)
    assert usual.cache > tokens.cache > 0 and usual.cache > rows.cache > 0 and LARGE[0] < 65536
    assert given.cache == 1000000 and "kv_cache_memory_bytes" in given.lines()[0]


@pytest.mark.parametrize(
    ("changes", "proposed"),
    [
        ({PARALLEL: 2}, {PARALLEL: 4}),
        ({SHARE: 0.2}, {SHARE: 0.3}),
        ({SHARE: 1.0}, {SHARE: 0.9}),
        ({"zero.offload": "none", "zero.stage": 1}, {"zero.stage": 3}),
    ],
    ids=str,
)
def test_a_run_that_does_not_fit_is_told_the_nearest_settings_of_vllm_that_do(of_70b, changes, proposed):
    argv = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    found = planned(parse([*of_70b, *argv], PPO, ranks=16), NODES)
    change = smallest_change(found)
    assert not found.fits and change is not None and proposed.items() <= change.items()
    told = [part for name, value in change.items() for part in (f"--{name}", str(value))]
    assert planned(parse([*of_70b, *argv, *told], PPO, ranks=16), NODES).fits


def test_the_in_process_engine_is_proposed_where_vllm_has_no_room(models):
    """A GPU that the run fits, but no graphs beside it."""
    small = Machine(1, 1, (1 << 30) + 2 * GRAPHS // 3, 10**12)
    found = planned(config_of(models, ppo__microbatch_tokens=640, sampling__rows=4), small)
    assert not found.fits
    assert smallest_change(found) == {"rollout.engine": "inprocess"}


def test_heads_that_cannot_be_split_are_refused(models):
    config = config_of(models, **{PARALLEL: 8})
    with pytest.raises(
        ModelError, match=r"tensor_parallel_size = 8, but the model has 4 attention heads.* set it to 1, "
    ):
        planned(config, NODES)


def test_on_a_cpu_weights_and_cache_stay_in_every_phase(models, monkeypatch):
    monkeypatch.setenv(CPU_CACHE, "3")
    found = planned(config_of(models), Machine(2, 1, None, 64 * GB))
    weights = row(found, "sampling").weights
    for phase in ("feedback", "experience", "learning"):
        held = row(found, phase)
        assert (held.weights, held.buffers, held.total) == (weights, 3 << 30, weights + (3 << 30))
    assert row(found, "sampling").cache == 3 << 30 and f"({CPU_CACHE} = 3)" in found.vllm.lines()[0]
    assert found.needs["host"][0] > 2 * (3 << 30)
    monkeypatch.setenv(CPU_CACHE, "much")
    with pytest.raises(check.FastPPOError, match=f"{CPU_CACHE} is 'much'"):
        planned(config_of(models), Machine(2, 1, None, 64 * GB))


def test_on_a_cpu_the_ranks_of_a_node_divide_the_share_and_the_rest_of_the_run_comes_out_of_it(models):
    vllm = planned(config_of(models, **{SHARE: 0.25}), Machine(2, 1, None, 64 * GB)).vllm
    assert vllm.share == 8 * GB and "0.25 of 64.0 GB / 2 ranks" in vllm.lines()[0]
    assert vllm.cache == vllm.share - vllm.beside - vllm.weights - vllm.passing and vllm.beside > 1 << 30
    tight = planned(config_of(models, **{SHARE: 0.25}), Machine(2, 1, None, 8 * GB))
    assert not tight.fits and SHARE in str(smallest_change(tight))


def test_the_weights_on_their_way_to_vllm_are_counted(seventy_billion, models):
    """Whole layers, at least one, at ZeRO stage 3; those of Llama-2-70B are larger than a bucket."""
    sharded, whole = (config_of(models, zero__stage=stage) for stage in (3, 1))
    layer = 2 * (seventy_billion.part(1) - 2 * 32000 * 8192 - 8192) // 80
    assert layer > GATHER_BYTES
    assert streaming_needs(seventy_billion, sharded).total == layer
    assert streaming_needs(seventy_billion, whole).total == 0
    assert streaming_needs(size_of(models[0]), sharded).total == GATHER_BYTES


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_copy_to_sample_from_is_counted_beside_that_of_vllm(models, stage):
    changes = {"zero__stage": stage, "optim__dtype": "fp32"}
    with_vllm = planned(config_of(models, **changes), NODES)
    actor, own = row(with_vllm, "sampling", "actor"), config_of(models, **changes, rollout__engine="inprocess")
    inside = row(planned(own, NODES), "sampling", "actor")
    assert actor.cache == actor.activations == 0 < inside.cache
    whole = with_vllm.vllm.weights
    assert actor.weights == (whole if stage < 3 else whole // 16) and inside.weights >= whole
    assert row(with_vllm, "sampling").weights == whole


def test_the_actor_that_is_exported_is_counted_on_the_first_rank_alone(models):
    """At ZeRO stage 3 it is whole in the host's memory then, for the first time."""
    found = planned(config_of(models, zero__stage=3), replace(NODES, nodes=1))
    last = [share for share in found.shares if share.phase == "export"]
    ((whole,), parts) = [s for s in last if s.first], [s for s in last if not s.first]
    assert whole.places.host.total == found.vllm.whole and whole.places.gpu.total == 0
    each = sum(share.places.host.total for share in parts)
    assert found.needs["host"][0] == 8 * (each + (1 << 30)) + whole.places.host.total
    assert not [s for s in planned(config_of(models, zero__stage=2), NODES).shares if s.phase == "export"]


def test_at_stage_3_the_larger_of_an_actor_that_vllm_samples_and_a_critic_of_its_own_is_counted(models):
    """One is gathered when the other is written, and neither where it is whole anyway."""
    for engine, stage, kind, expected in (
        ("vllm", 3, "separate", ["actor, rank 0"]),  # the actor has the vocabulary's head too
        ("inprocess", 3, "separate", ["critic, rank 0"]),
        ("inprocess", 3, "shared", []),
        ("inprocess", 2, "separate", []),
    ):
        config = config_of(models, zero__stage=stage, critic__kind=kind, rollout__engine=engine)
        found = planned(config, replace(NODES, nodes=1))
        whole = [share for share in found.shares if share.first]
        assert [share.role for share in whole] == expected
        sizes = {role.name: role.size for role in found.roles}
        for share in whole:
            size = sizes[share.role.removesuffix(", rank 0")]
            assert share.phase == "export" and share.places.host.total == size.parameters * size.bytes


def test_generate_and_rest_count_vllm_too(models):
    argv = ["--data.path", "x.jsonl", "--rollout.engine", "vllm", "--rewards", json.dumps([{"model": models[1]}])]
    drawn = planned(parse([*argv, "--model.path", models[0]], GENERATE, ranks=8), Machine(8, 1, 24 * GB, 10**12))
    learned = planned(parse([*argv, "--actor.model", models[0]], REST, ranks=8), Machine(8, 1, 24 * GB, 10**12))
    for found, role in ((drawn, "model"), (learned, "actor")):
        assert found.fits and row(found, "sampling").total == 12 * GB
        assert row(found, "sampling", role).cache == 0 and row(found, "feedback").total == GRAPHS
    assert row(drawn, "sampling", "model").weights == drawn.vllm.weights  # the copy that is sent stays beside it


@pytest.mark.parametrize("command", [PPO, REST, GENERATE], ids=lambda command: command.name)
def test_a_run_is_refused_before_it_loads_anything(models, monkeypatch, command):
    small = Machine(1, 1, 4 * GB, 10**12)
    monkeypatch.setattr(check, "this_machine", lambda *args, **options: small)
    model = "--model.path" if command is GENERATE else "--actor.model"
    argv = [model, models[0], "--data.path", "x", "--rollout.engine", "vllm", f"--{SHARE}", "0.1"]
    config = parse([*argv, "--rewards", json.dumps([{"model": models[1]}])], command)
    with pytest.raises(check.PlanError, match="vLLM needs"):
        check.check_plan(config, check.World(0, 1, torch.device("cpu")))


def test_the_highest_phase_is_that_in_which_vllm_holds_its_share(models):
    found = planned(config_of(models), Machine(8, 1, 24 * GB, 10**12))
    assert found.peak[0] == "sampling" and found.peak[1].gpu.total >= 12 * GB
    assert dict(by_phase(found.shares))["sampling"] == found.peak[1]
