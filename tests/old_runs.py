"""Runs that were stopped by fastppo as it was before its modules moved into packages, and what came of them then.

checkpoint/old_runs holds one run of each command, stopped at a checkpoint, with its model and data. That very commit
also took copies of them to the end: `after.json` has their metrics and `after` their weights. `ppo-fp32` is later: of
the commit before rows were filled anew, which in fp32 changed the sampler's logprobs by rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "checkpoint" / "old_runs"
MODULES = {
    "ppo": "fastppo.train",
    "ppo-fp32": "fastppo.train",
    "sft": "fastppo.train_sft",
    "reward": "fastppo.train_reward",
}


def metrics_then() -> dict[str, list[dict[str, Any]]]:
    return json.loads((DATA / "after.json").read_text())


def update_error(name: str, output: Path) -> float:
    """How far the weights that a run has left are from those of then, as a share of what training has changed."""
    start, error, change = load_file(DATA / "model" / "model.safetensors"), 0.0, 0.0
    for path in sorted((DATA / "after" / name).glob("*/model.safetensors")):
        then, now = load_file(path), load_file(output / path.parent.name / path.name)
        assert then.keys() == now.keys()
        for weight, expected in then.items():
            before = start.get(weight, torch.zeros(()))  # a head of scores begins at 0
            error += float((now[weight].double() - expected.double()).square().sum())
            change += float((expected.double() - before.double()).square().sum())
    return math.sqrt(error / change)
