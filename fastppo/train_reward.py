"""A reward model from preference pairs: `deepspeed fastppo/train_reward.py --config quickstart-reward`.

A score head on a language model's last hidden state learns to score the preferred answer of each pair higher. What
comes out is a sequence classifier with one label, which `rewards[].model` of PPO takes.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from fastppo.checkpoint import ExportedModel, export_model
from fastppo.config import REWARD, RewardTrainingConfig, parse
from fastppo.data import Examples, Packed, load_pairs
from fastppo.distributed import Stopped, World, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.models import PrefixStates, whole_state
from fastppo.monitor import guard_output, lock_run_dir, setup_logging
from fastppo.offline import (
    Objective,
    PairEvaluation,
    Stage,
    assemble_scorer,
    centring_loss,
    evaluate_pairs,
    preference_loss,
    rightness,
    run_stage,
    set_up,
    write_reliability,
)

log = logging.getLogger("fastppo")


def bradley_terry(pairs: Examples, config: RewardTrainingConfig) -> Objective:
    """The loss of a microbatch of pairs, and sums over them: loss, how many are right, scores of both."""

    def objective(role: Any, hidden: Tensor, *, packed: Packed, part: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = role.head(hidden).view(-1, 2).unbind(1)
        losses = preference_loss(chosen, rejected, pairs.margins[part].to(hidden.device) + config.margin)
        loss = losses + config.centre_coef * centring_loss(chosen, rejected)
        right = rightness(chosen - rejected)
        return loss.sum(), torch.stack([losses.sum(), right.sum(), chosen.sum(), rejected.sum()])

    return objective


def train(config: RewardTrainingConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out pairs, and leave the trained model with the lowest held-out loss.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        stage = set_up(config, world, assemble_scorer, load_pairs)
        run_stage(
            stage,
            bradley_terry(stage.examples, config),
            statistics=("loss", "accuracy", "score_chosen", "score_rejected"),
            count=len,  # pairs
            evaluate=evaluate_pairs,
            leave=leave,
        )


def leave(stage: Stage[RewardTrainingConfig], evaluation: PairEvaluation | None) -> ExportedModel:
    """Export the model as it was evaluated, its scores centred, and how far its probabilities are to be believed.

    One that was never evaluated is centred on answers that it has seen. Training goes on with the head as it was. All
    ranks call it.
    """
    config, world, learner = stage.config, stage.world, stage.learner
    if evaluation is None:
        evaluation = evaluate_pairs(learner, stage.examples.first(config.batch_size), PrefixStates(), config, world)
    state = whole_state(learner.model.model, world)
    if world.rank == 0:
        if evaluation.tells_nothing_apart:
            log.warning(
                "the scores of all %d evaluated answers are equal, so the exported reward model tells nothing apart:"
                " PPO would learn nothing from it. Train for longer or at another model.lr (%g), and look at the data.",
                2 * len(evaluation.gaps),
                config.model.lr,
            )
        if evaluation.centring is not None:
            state["score.weight"] = evaluation.centring.weight(state["score.weight"])
    folder = stage.output / "reward_model"
    left = export_model(learner.model, learner.tokenizer, folder, config.model.lora, world, state)
    if world.rank == 0:
        with guard_output("reliability.jsonl"):
            write_reliability(stage.output / "reliability.jsonl", evaluation)
    return left


def main(argv: list[str] | None = None) -> None:
    config = parse(argv, REWARD)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
