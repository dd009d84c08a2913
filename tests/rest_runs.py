"""Small ReST runs on the models and prompts of `whole_runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import whole_runs

MODULE = "fastppo.train_rest"


def settings(folder: Path, output: Path, **changes: Any) -> list[str]:
    """Changes are given as improve__epochs=1."""
    argv = whole_runs.settings(folder, output)
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    shared = {name: value for name, value in given.items() if not name.startswith("--ppo.")}
    own = {
        "--steps": 2,
        "--sampling.samples_per_prompt": 4,
        "--grow.prompts": 8,
        "--grow.batch_size": 8,
        "--improve.thresholds": "[0.4, 0.7]",
        "--improve.epochs": 2,
        "--improve.batch_size": 8,
        "--improve.microbatch_tokens": 40,
        "--eval.every": 1,
        "--checkpoint.within_step": 2,
    }
    changed = shared | own | {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (name, str(value))]
