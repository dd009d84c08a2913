"""A reward model from preference pairs: `deepspeed fastppo/train_reward.py --config quickstart-reward`.

A score head on a language model's last hidden state learns to score the preferred answer of each pair higher. What
comes out is a sequence classifier with one label, which `rewards[].model` of PPO takes.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.checkpoint import ExportedModel, export_model
from fastppo.config import REWARD, RewardTrainingConfig
from fastppo.data import load_pairs
from fastppo.distributed import World
from fastppo.models import PrefixStates, whole_state
from fastppo.monitor import guard_output, lock_run_dir
from fastppo.offline import (
    PairEvaluation,
    Setup,
    bradley_terry,
    count_examples,
    evaluate_pairs,
    run,
    set_up,
    write_reliability,
)
from fastppo.rank import run_rank

log = logging.getLogger("fastppo")


def train(config: RewardTrainingConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out pairs, and leave the trained model with the lowest held-out loss.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        run(
            set_up(config, world, load_pairs),
            bradley_terry(config),
            statistics=("loss", "accuracy", "score_chosen", "score_rejected"),
            count=count_examples,
            evaluate=evaluate_pairs,
            leave=leave,
        )


def leave(setup: Setup[RewardTrainingConfig], evaluation: PairEvaluation | None) -> ExportedModel:
    """Export the model as it was evaluated, its scores centred, and how far its probabilities are to be believed.

    One that was never evaluated is centred on answers that it has seen. Training goes on with the head as it was. All
    ranks call it.
    """
    config, world, trained = setup.config, setup.world, setup.trained
    if evaluation is None:
        evaluation = evaluate_pairs(trained, setup.examples.first(config.batch_size), PrefixStates(), config, world)
    state = whole_state(trained.role.model, world)
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
    folder = setup.output / "reward_model"
    left = export_model(trained.role, trained.tokenizer, folder, config.model.lora, world, state)
    if world.rank == 0:
        with guard_output("reliability.jsonl"):
            write_reliability(setup.output / "reliability.jsonl", evaluation)
    return left


def main(argv: list[str] | None = None) -> None:
    run_rank(REWARD, train, argv)


if __name__ == "__main__":
    main()
