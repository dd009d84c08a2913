"""The actor that a run leaves behind at ZeRO stage 3, where it may be whole on no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from safetensors.torch import load_file

from fastppo.config.command_line import parse
from fastppo.distributed.world import start_world
from fastppo.models.sampling_weights import SamplingWeights
from fastppo.train import train

pytestmark = pytest.mark.slow


def exported(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = output.glob("actor*/*.safetensors")
    return {str(file.relative_to(output)): load_file(file) for file in files}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__dtype": "fp32", "actor__average": 0.5},
        {"optim__dtype": "bf16", "zero__offload": "cpu"},
        {"actor__lora__rank": 2, "critic__kind": "shared"},
        {"actor__lora__rank": 2, "actor__lora__export": "adapters", "critic__kind": "shared"},
    ],
    ids=str,
)
def test_an_actor_that_was_not_whole_on_each_gpu_is_exported_without_being_so(tmp_path, monkeypatch, changes):
    """As with an engine that has weights of its own: a run that only finishes has gathered none to sample from. What it
    exports is what the run before it left, which sampled from gathered weights."""
    folder, output = whole_runs.prepare(tmp_path), tmp_path / "run"
    fixed: dict[str, Any] = {"zero__stage": 3, "steps": 1, "eval__every": 0} | changes
    train(parse(whole_runs.settings(folder, output, **fixed)), start_world(1))
    before = exported(output)
    assert len(before) == (2 if "actor__average" in changes else 1)

    def gather(self: SamplingWeights) -> None:
        raise AssertionError("the whole actor would be on each GPU")

    monkeypatch.setattr(SamplingWeights, "gather", gather)
    for file in output.glob("actor*/*.safetensors"):
        file.unlink()
    train(parse(whole_runs.settings(folder, output, **fixed, resume="auto")), start_world(1))
    after = exported(output)
    assert after.keys() == before.keys()
    for file, weights in before.items():
        assert after[file].keys() == weights.keys()
        assert all(torch.equal(after[file][name], weight) for name, weight in weights.items()), file
