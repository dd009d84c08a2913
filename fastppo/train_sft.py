"""A supervised start for PPO: `deepspeed fastppo/train_sft.py --config quickstart-sft`.

A language model learns to write the responses of its data: the loss is their negative logprob, that of PPO's own head.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torch import Tensor

from fastppo.checkpoint import ExportedModel, export_model
from fastppo.config import SFT, SFTConfig, parse
from fastppo.data import Packed, load_answers
from fastppo.distributed import Stopped, World, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.models import whole_state
from fastppo.monitor import lock_run_dir, setup_logging
from fastppo.offline import (
    AnswerEvaluation,
    Stage,
    assemble_learner,
    evaluate_answers,
    response_logprobs,
    run_stage,
    set_up,
)


def negative_logprob(role: Any, hidden: Tensor, *, packed: Packed, part: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a microbatch, summed over its response tokens; prompts teach nothing."""
    loss = -response_logprobs(role, hidden, packed.responses).sum()
    return loss, loss[None]


def train(config: SFTConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out responses, and leave the trained model with the lowest held-out loss.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        stage = set_up(config, world, assemble_learner, load_answers)
        lengths = stage.examples.response_lengths
        run_stage(
            stage,
            negative_logprob,
            statistics=("loss",),
            count=lambda rows: int(lengths[rows].sum()),  # response tokens
            evaluate=evaluate_answers,
            leave=leave,
        )


def leave(stage: Stage[SFTConfig], evaluation: AnswerEvaluation | None) -> ExportedModel:
    """Export the model as it is. All ranks call it."""
    config, world, learner = stage.config, stage.world, stage.learner
    state = whole_state(learner.model.model, world)
    return export_model(learner.model, learner.tokenizer, stage.output / "model", config.model.lora, world, state)


def main(argv: list[str] | None = None) -> None:
    config = parse(argv, SFT)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
