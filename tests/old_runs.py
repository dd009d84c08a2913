"""Runs that were stopped by fastppo as it was before its modules moved into packages, and what came of them then.

checkpoint/old_runs holds one run of each command, stopped at a checkpoint, with its model and data. That very commit
also took copies of them to the end; `after.json` says with what metrics and weights, and on what machine. `ppo-fp32` is
later: of the commit before rows were filled anew, which in fp32 changed the sampler's logprobs by rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import whole_runs
from safetensors.torch import load_file

DATA = Path(__file__).parent / "checkpoint" / "old_runs"
MODULES = {
    "ppo": "fastppo.train",
    "ppo-fp32": "fastppo.train",
    "sft": "fastppo.train_sft",
    "reward": "fastppo.train_reward",
}


def machine() -> dict[str, str]:
    """What the last bits of a result depend on beside the settings."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    versions = {"torch": torch.__version__, "python": platform.python_version_tuple()[1]}
    return versions | {"simd": torch.backends.cpu.get_cpu_capability(), "cpu": model.partition(": ")[2]}


def left(output: Path) -> dict[str, Any]:
    """The metrics of a finished run, and the hash and summed magnitude of each file of weights that it left."""
    weights = {}
    for path in sorted(output.glob("*/model.safetensors")):
        magnitude = sum(float(tensor.double().abs().sum()) for tensor in load_file(path).values())
        weights[path.relative_to(output).as_posix()] = [hashlib.sha256(path.read_bytes()).hexdigest(), magnitude]
    return {"metrics": whole_runs.records(output), "weights": weights}


def expected() -> dict[str, Any]:
    return json.loads((DATA / "after.json").read_text())
