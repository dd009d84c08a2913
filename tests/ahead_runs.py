"""Settings of small runs with `ppo.steps_ahead` 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import whole_runs

SETTINGS: dict[str, Any] = {
    "ppo__steps_ahead": 1,
    "ppo__batch_size": 4,
    "ppo__minibatches": 1,
    "optim__dtype": "fp32",
    "actor__lr": 2e-2,
    "eval__prompts": 2,
}


def settings(folder: Path, output: Path, **changes: Any) -> list[str]:
    return whole_runs.settings(folder, output, **SETTINGS | changes)
