"""A run in Weights & Biases, for those who have the package; nothing else of fastppo needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastppo.errors import FastPPOError
from fastppo.monitor.run_dir import CONFIG


class WandbError(FastPPOError):
    """Weights & Biases did not take the run. The message says what it said, and the ways out."""


def wandb_run(output: Path, project: str) -> Any:
    """A `wandb.Run` with the settings in `output`/config.yaml, its own files in `output`/wandb.

    A run that is resumed goes on under its old id. Weights & Biases keeps all that it was ever sent: steps that are
    done again after a checkpoint stand twice in their charts, which have the PPO step as x axis. Raises WandbError.
    """
    import wandb  # seconds of imports that not every run wants; fastppo.rules has seen that it is there

    settings, known = output / CONFIG, output / "wandb-id.txt"
    try:
        run = wandb.init(
            project=project,
            name=output.name,
            id=known.read_text(encoding="utf-8") if known.exists() else None,
            resume="allow",
            dir=str(output),
            config=yaml.safe_load(settings.read_text(encoding="utf-8")),
        )
    except wandb.Error as error:
        raise WandbError(
            f"track.wandb is {project}, but Weights & Biases did not take the run ({error}). Run `wandb login`, or set"
            " WANDB_MODE=offline to keep it on this machine until `wandb sync`, or leave track.wandb out."
        ) from error
    known.write_text(run.id, encoding="utf-8")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
