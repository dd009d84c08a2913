"""What the ranks of test_streams.py run: each function is called on all of them, in forks of one process."""

from __future__ import annotations

import ctypes
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory import Anonymous
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo import ops
from fastppo.config import OptimConfig, ZeroConfig
from fastppo.config.command_line import parse
from fastppo.data.packed import pack
from fastppo.distributed.engine import Engine, gathered
from fastppo.distributed.world import World, start_world
from fastppo.models.loading.policies import load_causal, load_policies, load_reward
from fastppo.models.loading.streams import partition_config, stream, weight_files
from fastppo.models.roles import ModelError, Policy, ValueHead

CPU = torch.device("cpu")
PR_SET_THP_DISABLE = 41  # of linux/prctl.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = pack([(5, 6, 7, 8, 9, 10), (9, 10), (11, 12, 13)], [3, 1, 2])


def start() -> World:
    logging.basicConfig(level=logging.INFO)
    return start_world(1)


def whole(parameter: Any) -> torch.Tensor:
    with gathered([parameter]):
        return parameter.detach().clone()


def assert_same(parts: Any, expected: Any) -> None:
    """Parameters and buffers, by name; the parts partitioned, each rank with its share and no more."""
    theirs = dict(expected.named_parameters(remove_duplicate=False))
    mine = dict(parts.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys()
    ranks = torch.distributed.get_world_size()
    for name, parameter in mine.items():
        assert parameter.numel() == 0 and len(parameter.ds_tensor) == -(-parameter.ds_numel // ranks), name
        found = whole(parameter)
        assert found.dtype == theirs[name].dtype and torch.equal(found, theirs[name]), name
    buffers = dict(expected.named_buffers())
    assert dict(parts.named_buffers()).keys() == buffers.keys()
    for name, buffer in parts.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def families(folder: str) -> None:
    start()
    for family in tiny.FAMILIES:
        path, dtype = f"{folder}/{family}", torch.bfloat16  # the files are in fp32
        parts = load_causal("actor.model", path, None, None, dtype, CPU, partition_config("bf16"))
        assert_same(parts, AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


def layouts(folder: str) -> None:
    """Each folder of `folder`, by its model's own class, is what transformers' loader makes of it."""
    start()
    for path in sorted(Path(folder).iterdir()):
        auto = AutoModelForSequenceClassification if path.name.startswith("classifier") else AutoModelForCausalLM
        expected = auto.from_pretrained(path)
        files = weight_files(str(path))
        assert files is not None
        parts = stream(auto, str(path), files, expected.config, torch.float32, partition_config("fp32"))
        try:
            assert_same(parts, expected)
            if isinstance(expected.get_output_embeddings(), torch.nn.Module):
                one, other = (
                    m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (parts, expected)
                )
                assert one == other
        except AssertionError as error:
            raise AssertionError(path.name) from error


def refused(path: str, words: str) -> None:
    start()
    with pytest.raises(ModelError, match=words):
        load_causal("actor.model", path, None, None, torch.float32, CPU, partition_config("fp32"))


def no_safetensors(path: str) -> None:
    start()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastppo").addHandler(handler)
    parts = load_causal("actor.model", path, None, None, torch.float32, CPU, partition_config("fp32"))
    assert any("each rank needs memory for the whole model" in line for line in lines), lines
    assert_same(parts, load_causal("actor.model", path, None, None, torch.float32, CPU))


def roles(model: str, reward: str) -> None:
    """Actor, reference, critic and reward model at stage 3 are those of stage 1."""
    start()
    fixed = ["--actor.model", model, "--rewards", '[{"function": "a:b"}]', "--data.path", "x", "--optim.dtype", "fp32"]
    for more in ([], ["--critic.model", reward, "--reference.model", model]):
        actor, critic, reference = load_policies(parse([*fixed, *more, "--zero.stage", "3"]), CPU)
        expected = load_policies(parse([*fixed, *more]), CPU)
        assert critic is not None and expected[1] is not None
        assert_same(actor.model, expected[0].model)
        assert_same(critic.model, expected[1].model)
        assert_same(reference.model, expected[2].model)
        assert torch.equal(critic.value_head.weight, expected[1].value_head.weight)
        assert reference.head.weight is reference.model.get_input_embeddings().weight
        assert not {id(p) for p in actor.parameters()} & {id(p) for p in reference.parameters()}
        assert not any(p.requires_grad for p in reference.parameters())
    parts, _ = load_reward(reward, torch.float32, CPU, partition_config("fp32"))
    assert_same(parts.model, load_reward(reward, torch.float32, CPU)[0].model)


def updates(folder: str) -> None:
    """An update of a policy with a value head made of plain parameters, under an engine of stage 3 and of stage 0."""
    start()
    optim = replace(OptimConfig(), dtype="fp32", max_grad_norm=1.0)

    def loss(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
        logprobs = policy.head(hidden, ops.linear_logprobs, PACKED.responses).logprobs
        return (logprobs * torch.linspace(-1, 1, len(logprobs))).sum() + policy.value_head(hidden).square().sum()

    for path in sorted(Path(folder).iterdir()):
        norms, weights = [], []
        for stage in (0, 3):
            partitions = partition_config("fp32") if stage == 3 else None
            head = ValueHead(tiny.WIDTH, torch.float32, CPU)
            torch.nn.init.constant_(head.weight, 0.1)
            model = load_causal("actor.model", str(path), None, None, torch.float32, CPU, partitions)
            policy = Policy(model, head)
            engine = Engine(policy, [list(policy.parameters())], optim, ZeroConfig(stage=stage))
            engine.train()
            engine.backward(engine(PACKED, loss), last=True)
            norms.append(engine.gradient_norm())
            engine.step([1e-3])
            weights.append({name: whole(p) for name, p in engine.module.named_parameters()})
        assert norms[0] > 0 and abs(norms[1] / norms[0] - 1) < 1e-5, (path.name, norms)
        for name, weight in weights[0].items():
            # Adam's first step is 1e-3 x the gradient's sign, so where a gradient is as good as 0 rounding decides
            apart = (weights[1][name] - weight).abs()
            assert float((apart > 1e-5).float().mean()) < 1e-3, (path.name, name)


def memory(path: str, name: str, output: str) -> None:
    world, dtype = start(), DTYPES[name]
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # memory is measured as it is touched, not by 2 MB
    with Anonymous() as memory:
        model = load_causal("actor.model", path, None, None, dtype, CPU, partition_config(name))
    size = sum(p.ds_numel for p in model.parameters()) * dtype.itemsize
    Path(output, f"{world.rank}.json").write_text(json.dumps([memory.peak / size, memory.end / size]))
