"""A supervised start for PPO: `deepspeed fastppo/train_sft.py --config quickstart-sft`.

A language model learns to write the responses of its data: the loss is their negative logprob, that of PPO's own head.
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

from torch import Tensor

from fastppo.batch import Packed
from fastppo.checkpoint import Checkpoints, export
from fastppo.cli import SFT, dump, parse
from fastppo.config import SFTConfig
from fastppo.data import batches
from fastppo.errors import exit_with_message
from fastppo.examples import load_answers
from fastppo.folder import continue_folder, fresh_folder
from fastppo.gathered import whole_state
from fastppo.heldout import evaluate_answers, response_logprobs
from fastppo.learner import Learner, assemble_learner
from fastppo.nodes import check_output_is_shared
from fastppo.resume import find_checkpoint
from fastppo.stop import Stopped, watching
from fastppo.supervised import Training, recall_trunk, total_steps, update
from fastppo.track import Stages, Tracker, setup_logging
from fastppo.world import World, start_world, stop_world

log = logging.getLogger("fastppo")


def negative_logprob(role: Any, hidden: Tensor, *, packed: Packed, part: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a microbatch, summed over its response tokens; prompts teach nothing."""
    loss = -response_logprobs(role, hidden, packed.responses).sum()
    return loss, loss[None]


def train(config: SFTConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out responses, and leave the model with the lowest held-out loss behind.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    output = Path(config.output)
    found = find_checkpoint(config, world)
    if world.rank == 0:
        fresh_folder(output) if found is None else continue_folder(output, found.sizes)
        (output / "config.yaml").write_text(dump(config), encoding="utf-8")
    check_output_is_shared(output, world)
    learner = assemble_learner(config, world)
    answers, heldout = load_answers(
        config.data, learner.tokenizer, heldout=config.eval.examples, context=learner.context
    )
    steps = total_steps(config, answers)
    checkpoints = Checkpoints(config, {"model": learner.engine}, (answers.tokens, heldout.tokens), world)
    run, stages = checkpoints.load(found, Training.begin(config.seed, world.rank)), Stages({})
    order = batches(answers, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    trunk = recall_trunk(learner, answers, list(islice(order, run.step)), config, world)
    heldout_trunk = recall_trunk(learner, heldout, [], config, world)

    with (
        watching(world),
        Tracker(output, config.track, steps=steps, rank=world.rank, done=run.step) as tracker,
        checkpoints.saved_when_stopped(run),
    ):

        def evaluate_if_due() -> None:
            due = run.step in (0, steps) or (config.eval.every and run.step % config.eval.every == 0)
            if config.eval.examples and due and run.evaluated < run.step:
                result = evaluate_answers(learner, heldout, heldout_trunk, config, world)
                tracker.log_evaluation(run.step, result)
                if run.add_evaluation(result["loss"]):
                    leave(learner, config, world)

        evaluate_if_due()
        for step in range(run.step, steps):
            if run.is_done(config.patience):
                break
            rows = next(order)
            tokens = int(answers.response_lengths[rows].sum())
            with tracker.profile(step + 1), stages("learning"):
                done = update(
                    learner,
                    answers,
                    rows,
                    negative_logprob,
                    trunk,
                    config,
                    normalizer=tokens,
                    step=step,
                    steps=steps,
                    skipped=run.skipped,
                    world=world,
                )
            tracker.log(step + 1, {"loss": float(done.sums) / tokens} | done.metrics() | stages.take())
            run.end_step(done.skipped)
            evaluate_if_due()
            checkpoints.save_if_due(run)

    if run.best_step < 0:  # never evaluated: the last model
        leave(learner, config, world)
    elif world.rank == 0:
        log.info("lowest held-out loss: %.4f, after step %d of %d", run.best, run.best_step, run.step)


def leave(learner: Learner, config: SFTConfig, world: World) -> None:
    """Export the model as it is. All ranks call it."""
    state = whole_state(learner.model.model, world)
    if world.rank == 0:
        export(learner.model, learner.tokenizer, Path(config.output) / "model", config.model.lora, state)


def main(argv: list[str] | None = None) -> None:
    config = parse(argv, SFT)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
