"""Rules about the settings of checkpoints and tracking."""

from __future__ import annotations

from importlib.util import find_spec

from fastppo.config.commands.ppo import TrainingConfig
from fastppo.errors import ConfigError


def check_checkpoints(config: TrainingConfig) -> None:
    checkpoint, evaluated = config.checkpoint, config.eval.every
    if config.resume == "":
        raise ConfigError("resume is empty; give auto, the path of a checkpoint, or null to start a new run.")
    if checkpoint.keep_best == 0:
        return
    if checkpoint.every == 0:
        raise ConfigError(
            f"checkpoint.keep_best is {checkpoint.keep_best} and checkpoint.every 0: no checkpoints are written to"
            " choose from. Set checkpoint.every above 0, or keep_best to 0."
        )
    if evaluated == 0 or checkpoint.every % evaluated:
        raise ConfigError(
            f"checkpoint.keep_best is {checkpoint.keep_best}, which compares held-out scores, but checkpoint.every is"
            f" {checkpoint.every} and eval.every {evaluated}: a checkpoint without an evaluation at its step has no"
            f" score. Set checkpoint.every to a multiple of eval.every (both {checkpoint.every}, for example), or"
            " keep_best to 0."
        )


def check_tracking(config: TrainingConfig) -> None:
    project = config.track.wandb
    if project == "":
        raise ConfigError("track.wandb is empty; give the name of a Weights & Biases project, or null for none.")
    if project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"track.wandb is {project}, but the package wandb is not installed. Run `pip install wandb`, or leave"
            " track.wandb out; metrics.jsonl and TensorBoard have the same numbers."
        )
