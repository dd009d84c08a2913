"""Bytes and seconds of collectives and copies, against what the formulas of docs/cost-model.md give by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch

from fastppo.config import Config, OptimConfig, ZeroConfig
from fastppo.models.roles import Policy, fuse_head
from fastppo.planner.constants.values import NAMES, Constant, Constants
from fastppo.planner.footprint import Footprint
from fastppo.planner.machine import Machine
from fastppo.planner.memory import Role
from fastppo.planner.time.collectives import Group, Sent, Zero, exchanged

LINK, NETWORK, PCIE, MEMORY, ADAM, HOST = 1e9, 1e8, 2e9, 4e9, 8e9, 5e9
RATES = {"link": LINK, "network": NETWORK, "pcie": PCIE, "memory": MEMORY, "adam": ADAM, "host_adam": HOST, "nvme": 1e8}
FREE = {name: Constant(0.0, "test") for name, (unit, _) in NAMES.items() if unit == "s"}
CONSTANTS = Constants("test", False, FREE | {name: Constant(rate, "test") for name, rate in RATES.items()})


@pytest.fixture(scope="module")
def actor():
    """Large enough for weights that ZeRO-3 partitions, in bf16."""
    with torch.device("meta"):
        model = tiny.causal(hidden_size=512, intermediate_size=1024).bfloat16()
    size = Footprint(Policy(fuse_head(model)), torch.bfloat16, cpu=False)
    return Role("actor", size, trains=True, weights=size.parameters)


def zero(actor, stage, *, gpus=4, nodes=1, **offload):
    config = replace(Config(), optim=OptimConfig(dtype="bf16"), zero=ZeroConfig(stage=stage, **offload))
    return Zero(actor, config, Machine(gpus, nodes, 80 * 10**9, 10**12))


def test_a_gather_sends_the_parts_of_the_other_ranks_and_a_sum_twice_as_much():
    group = Group(4, 1)
    assert group.seconds(Sent(1, 8e9), CONSTANTS) == pytest.approx(8 * 3 / 4)
    assert group.seconds(Sent(1, 8e9), CONSTANTS, times=2) == pytest.approx(2 * 8 * 3 / 4)
    assert Group(1, 1).seconds(Sent(1, 8e9), CONSTANTS) == 0


def test_between_nodes_the_adapters_of_all_ranks_count_and_latency_grows_with_each_doubling():
    assert Group(16, 2).seconds(Sent(1, 1e9), CONSTANTS) == pytest.approx(1e9 * 15 / 16 / (8 * NETWORK))
    assert Group(2, 2).seconds(Sent(1, 1e9), CONSTANTS) == pytest.approx(1e9 / 2 / NETWORK)
    late = {"link_latency": Constant(2e-5, ""), "network_latency": Constant(1e-5, "")}
    slow = Constants("test", False, {**CONSTANTS.values, **late})
    assert Group(16, 2).seconds(Sent(3, 0), slow) == pytest.approx(3 * 3e-5)
    assert Group(64, 8).seconds(Sent(3, 0), slow) == pytest.approx(3 * 5e-5)
    assert Group(2, 2).seconds(Sent(1, 0), slow) == pytest.approx(1e-5)  # one rank on each node


def test_stage_1_sums_fp32_gradients_once_an_update_and_gathers_weights(actor):
    count, others = actor.size.trained, 3 / 4
    found = zero(actor, 1).update(CONSTANTS).parts
    assert found["collectives"] == pytest.approx(others * (2 * 4 + 2) * count / LINK)
    assert zero(actor, 1).learn(CONSTANTS).parts["collectives"] == 0
    assert found["optimizer"] == pytest.approx((28 + 4 + 2) * count / 4 / ADAM)


def test_stage_2_sums_gradients_of_every_microbatch_in_their_own_dtype(actor):
    count, others = actor.size.trained, 3 / 4
    assert zero(actor, 2).learn(CONSTANTS).parts["collectives"] == pytest.approx(others * 2 * 2 * count / LINK)
    assert zero(actor, 2).update(CONSTANTS).parts["collectives"] == pytest.approx(others * 2 * count / LINK)


def test_stage_3_gathers_large_weights_forward_and_backward_and_scatters_gradients(actor):
    size, others = actor.size, 3 / 4
    large = sum(n for n in (p.numel() for p in size.model.parameters()) if n >= 100_000)
    assert size.partitioned == large < size.parameters
    three = zero(actor, 3)
    assert three.gathers == Sent(size.modules, 2 * large)
    assert three.forward(CONSTANTS).parts["collectives"] == pytest.approx(others * 2 * large / LINK)
    assert three.stays_gathered  # of a model as small as this the backward pass finds the weights whole
    learnt = three.learn(CONSTANTS).parts["collectives"]
    assert learnt == pytest.approx(others * (2 * large + 2 * size.trained) / LINK)
    assert three.update(CONSTANTS).parts["collectives"] == 0


def test_one_rank_sends_nothing(actor):
    for stage in (1, 2, 3):
        alone = zero(actor, stage, gpus=1)
        sent = [alone.forward(CONSTANTS), alone.learn(CONSTANTS), alone.update(CONSTANTS)]
        assert sum(seconds.of("collectives") for seconds in sent) == 0


def test_an_offloaded_optimizer_gets_gradients_and_returns_weights_and_ranks_share_the_cpus(actor):
    count = actor.size.trained / 4
    found = zero(actor, 1, offload_optimizer="cpu").update(CONSTANTS).parts
    assert found["copies"] == pytest.approx((4 + 2) * count / PCIE)
    assert found["optimizer"] == pytest.approx((28 + 4 + 2) * count * 4 / HOST)


def test_offloaded_weights_come_to_the_gpu_for_each_pass(actor):
    three = zero(actor, 3, offload="cpu")
    assert three.forward(CONSTANTS).parts["copies"] == pytest.approx(2 * actor.size.partitioned / 4 / PCIE)


def test_states_on_nvme_are_read_and_written_in_each_update(actor):
    on_nvme = zero(actor, 3, offload="nvme", nvme_path="/x").update(CONSTANTS).parts["copies"]
    on_host = zero(actor, 3, offload="cpu").update(CONSTANTS).parts["copies"]
    assert on_nvme - on_host == pytest.approx(2 * 12 * actor.size.trained / 4 * 4 / 1e8)


def test_ranks_that_share_sequences_exchange_queries_keys_values_and_outputs(actor):
    size = actor.size
    found = exchanged(actor, 1000, Group(2, 1))
    assert found.count == 4 * size.layers
    assert found.bytes == size.layers * (2 * size.heads + 2 * size.key_value_heads) * size.head_width * 2 * 500
    repeated = exchanged(actor, 1000, Group(4, 1))  # two heads of keys and values for four ranks
    assert repeated.bytes == size.layers * (2 * size.heads + 2 * 4) * size.head_width * 2 * 250
    assert exchanged(actor, 1000, Group(1, 1)) == Sent()


def test_an_infinite_link_leaves_no_time_to_collectives(actor):
    endless = dict.fromkeys(("link", "network"), Constant(math.inf, "none"))
    free = Constants("test", False, {**CONSTANTS.values, **endless})
    assert zero(actor, 1).update(free).of("collectives") == 0
    assert math.isfinite(zero(actor, 1).update(free).total)
