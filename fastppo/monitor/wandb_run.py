"""A run in Weights & Biases, if the optional package `wandb` is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastppo.errors import FastPPOError
from fastppo.monitor.run_dir import CONFIG


class WandbError(FastPPOError):
    """Weights & Biases did not accept the run. The message quotes its error and names the ways out."""


def wandb_run(output: Path, project: str) -> Any:
    """A `wandb.Run` with the settings in `output`/config.yaml; its local files are in `output`/wandb.

    A resumed run keeps its id. Weights & Biases never deletes what it has received: steps that are repeated after a
    checkpoint appear twice in its charts, whose x axis is the PPO step. Raises WandbError.
    """
    import wandb  # takes seconds to import, and not every run needs it; config.validation checks that it is installed

    settings, id_file = output / CONFIG, output / "wandb-id.txt"
    try:
        run = wandb.init(
            project=project,
            name=output.name,
            id=id_file.read_text(encoding="utf-8") if id_file.exists() else None,
            resume="allow",
            dir=str(output),
            config=yaml.safe_load(settings.read_text(encoding="utf-8")),
        )
    except wandb.Error as error:
        raise WandbError(
            f"track.wandb is {project}, but Weights & Biases did not accept the run ({error}). Run `wandb login`, or"
            " set WANDB_MODE=offline to keep the data on this machine until `wandb sync`, or remove track.wandb."
        ) from error
    id_file.write_text(run.id, encoding="utf-8")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
