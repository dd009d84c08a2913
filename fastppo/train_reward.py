"""A reward model from preference pairs: `deepspeed fastppo/train_reward.py --config quickstart-reward`.

A score head on a language model's last hidden state learns to score the preferred answer of each pair higher. What
comes out is a sequence classifier with one label, which `rewards[].model` of PPO takes.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from fastppo.batch import Packed
from fastppo.checkpoint import Checkpoints, export
from fastppo.cli import REWARD, dump, parse
from fastppo.config import RewardTrainingConfig
from fastppo.data import batches
from fastppo.errors import exit_with_message
from fastppo.examples import Examples, load_pairs
from fastppo.folder import continue_folder, fresh_folder
from fastppo.gathered import whole_state
from fastppo.heldout import PairEvaluation, evaluate_pairs, write_reliability
from fastppo.learner import Learner, assemble_scorer
from fastppo.nodes import check_output_is_shared
from fastppo.preference import centring_loss, preference_loss
from fastppo.resume import find_checkpoint
from fastppo.stop import Stopped, watching
from fastppo.supervised import Objective, Training, Update, recall_trunk, total_steps, update
from fastppo.track import Stages, Tracker, setup_logging
from fastppo.trunk import TrunkStates
from fastppo.world import World, start_world, stop_world

log = logging.getLogger("fastppo")


def bradley_terry(pairs: Examples, config: RewardTrainingConfig) -> Objective:
    """The loss of a microbatch of pairs, and sums over them: loss, pairs with the right order, scores of both."""

    def objective(role: Any, hidden: Tensor, *, packed: Packed, part: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = role.head(hidden).view(-1, 2).unbind(1)
        losses = preference_loss(chosen, rejected, pairs.margins[part].to(hidden.device) + config.margin)
        loss = losses + config.centre_coef * centring_loss(chosen, rejected)
        return loss.sum(), torch.stack([losses.sum(), (chosen > rejected).sum(), chosen.sum(), rejected.sum()])

    return objective


def train(config: RewardTrainingConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out pairs, and leave the model with the lowest held-out loss behind.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    output = Path(config.output)
    found = find_checkpoint(config, world)
    if world.rank == 0:
        fresh_folder(output) if found is None else continue_folder(output, found.sizes)
        (output / "config.yaml").write_text(dump(config), encoding="utf-8")
    check_output_is_shared(output, world)
    learner = assemble_scorer(config, world)
    pairs, heldout = load_pairs(config.data, learner.tokenizer, heldout=config.eval.examples, context=learner.context)
    steps, objective = total_steps(config, pairs), bradley_terry(pairs, config)
    checkpoints = Checkpoints(config, {"model": learner.engine}, (pairs.tokens, heldout.tokens), world)
    run, stages = checkpoints.load(found, Training.begin(config.seed, world.rank)), Stages({})
    order = batches(pairs, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    trunk = recall_trunk(learner, pairs, list(islice(order, run.step)), config, world)
    heldout_trunk = recall_trunk(learner, heldout, [], config, world)

    with (
        watching(world),
        Tracker(output, config.track, steps=steps, rank=world.rank, done=run.step) as tracker,
        checkpoints.saved_when_stopped(run),
    ):

        def evaluate_if_due() -> None:
            due = run.step in (0, steps) or (config.eval.every and run.step % config.eval.every == 0)
            if config.eval.examples and due and run.evaluated < run.step:
                evaluation = evaluate_pairs(learner, heldout, heldout_trunk, config, world)
                tracker.log_evaluation(run.step, evaluation.metrics())
                if run.add_evaluation(evaluation.loss):
                    leave(learner, evaluation, config, world)

        evaluate_if_due()
        for step in range(run.step, steps):
            if run.is_done(config.patience):
                break
            rows = next(order)
            with tracker.profile(step + 1), stages("learning"):
                done = update(
                    learner,
                    pairs,
                    rows,
                    objective,
                    trunk,
                    config,
                    normalizer=len(rows),
                    step=step,
                    steps=steps,
                    skipped=run.skipped,
                    world=world,
                )
            tracker.log(step + 1, metrics(done, len(rows)) | stages.take())
            run.end_step(done.skipped)
            evaluate_if_due()
            checkpoints.save_if_due(run)

    if run.best_step < 0:  # never evaluated: the last model, centred on answers that it has seen
        evaluation = evaluate_pairs(learner, pairs.first(config.batch_size), TrunkStates(), config, world)
        leave(learner, evaluation, config, world)
    elif world.rank == 0:
        log.info("lowest held-out loss: %.4f, after step %d of %d", run.best, run.best_step, run.step)


def metrics(done: Update, pairs: int) -> dict[str, float]:
    """Means over the pairs of an update."""
    names = ("loss", "accuracy", "score_chosen", "score_rejected")
    return dict(zip(names, (done.sums / pairs).tolist(), strict=True)) | done.metrics()


def leave(learner: Learner, evaluation: PairEvaluation, config: RewardTrainingConfig, world: World) -> None:
    """Export the model as it was evaluated, its scores centred, and how far its probabilities are to be believed.

    Training goes on with the head as it was. All ranks call it.
    """
    state, output = whole_state(learner.model.model, world), Path(config.output)
    if world.rank == 0:
        if evaluation.centring is not None:
            state["score.weight"] = evaluation.centring.weight(state["score.weight"])
        export(learner.model, learner.tokenizer, output / "reward_model", config.model.lora, state)
        write_reliability(output / "reliability.jsonl", evaluation)


def main(argv: list[str] | None = None) -> None:
    config = parse(argv, REWARD)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
