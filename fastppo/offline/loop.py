"""Around the updates of a stage before PPO: what it begins with, and the loop that trains, evaluates and saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import Checkpoints, ExportedModel, check_exports, find_checkpoint, replace_export
from fastppo.config import RewardTrainingConfig, SFTConfig, dump
from fastppo.data import Examples, batches
from fastppo.distributed import World, begin_clock, check_output_is_shared, watching
from fastppo.models import PrefixStates, check_embedded, context_of, load_config, load_tokenizer, model_source
from fastppo.monitor import Phases, Tracker, begin_folder, check_folder
from fastppo.offline.model import Learner
from fastppo.offline.update import Objective, Training, recall_prefix, total_steps, update
from fastppo.planner import check_plan

log = logging.getLogger("fastppo")

C = TypeVar("C", RewardTrainingConfig, SFTConfig)


@dataclass(frozen=True)
class Stage(Generic[C]):
    """What a stage before PPO has in hand before its first update."""

    config: C
    world: World
    learner: Learner
    examples: Examples  # to train on
    heldout: Examples
    checkpoints: Checkpoints
    run: Training  # where it is; the one part that changes
    order: Iterator[list[int]]  # batches of examples, from where the run is onwards
    prefix: PrefixStates  # of the training examples
    heldout_prefix: PrefixStates

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def steps(self) -> int:
        return total_steps(self.config, self.examples)


class Evaluation(Protocol):
    """A model on held-out examples."""

    @property
    def loss(self) -> float: ...

    def metrics(self) -> dict[str, float]: ...


E = TypeVar("E", bound=Evaluation)


def set_up(
    config: C,
    world: World,
    assemble: Callable[[C, World, PreTrainedTokenizerBase], Learner],
    load: Callable[..., tuple[Examples, Examples]],
) -> Stage[C]:
    """The stage's folder, its model and its examples, and where it is if it is resumed.

    load: `examples.load_pairs` or its sister. What can be wrong is looked at in the order of what it costs to find out.
    An earlier run in the folder is moved aside when only the weights are left to be read.
    """
    output, found = Path(config.output), find_checkpoint(config, world)
    if found is None and world.rank == 0:
        check_folder(output)
    begin_clock(None if found is None else found.clock, world)
    check_plan(config, world)
    model = config.model
    tokenizer = load_tokenizer("model.path", model.path, model.gguf_file, model.revision)
    context = context_of(load_config(model_source(model)))
    examples, heldout = load(config.data, tokenizer, heldout=config.eval.examples, context=context)
    for part in (examples, heldout):
        check_embedded(model_source(model), tokenizer, part.tokens, "data.path")
    if world.rank == 0:
        begin_folder(output, None if found is None else found.sizes, dump(config))
    check_output_is_shared(output, world)
    learner = assemble(config, world, tokenizer)
    checkpoints = Checkpoints(config, {"model": learner.engine}, (examples.tokens, heldout.tokens), world)
    run = checkpoints.load(found, Training.begin(config.seed, world.rank))
    order = batches(examples, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    return Stage(
        config=config,
        world=world,
        learner=learner,
        examples=examples,
        heldout=heldout,
        checkpoints=checkpoints,
        run=run,
        prefix=recall_prefix(learner, examples, list(islice(order, run.step)), config, world),
        heldout_prefix=recall_prefix(learner, heldout, [], config, world),
        order=order,
    )


def run_stage(
    stage: Stage[C],
    objective: Objective,
    *,
    statistics: Sequence[str],
    count: Callable[[list[int]], int],
    evaluate: Callable[[Learner, Examples, PrefixStates, C, World], E],
    leave: Callable[[Stage[C], E | None], ExportedModel],
) -> None:
    """Update, evaluate on held-out examples, and leave the trained model with the lowest held-out loss behind.

    statistics: names of what the objective sums over a batch; count: over how many (pairs, response tokens) their
    means and the loss's are taken; leave: exports the model as it was evaluated, or as it is if it never was. Raises
    Stopped where the run was told to stop; what it has done is saved then. Raises ExportError at the end if the model
    is elsewhere, or nowhere.
    """
    config, world, run, steps, times = stage.config, stage.world, stage.run, stage.steps, Phases({})
    left: list[ExportedModel] = []  # the model behind it, as it was left last
    with watching(world), Tracker(stage.output, config.track, steps=steps, rank=world.rank, done=run.step) as tracker:

        def leave_it(evaluation: E | None) -> None:
            left[:] = [replace_export(left, leave(stage, evaluation), world)]

        def evaluate_if_due() -> None:
            due = run.step in (0, steps) or (config.eval.every and run.step % config.eval.every == 0)
            if config.eval.examples and due and run.evaluated < run.step:
                found = evaluate(stage.learner, stage.heldout, stage.heldout_prefix, config, world)
                tracker.log_evaluation(run.step, found.metrics())
                best = run.best, run.best_step
                if run.add_evaluation(found.loss):
                    leave_it(found)
                    if left[0].folder is None:  # the next that is better than what is there is to be left, if it can be
                        run.best, run.best_step = best

        with stage.checkpoints.saved_when_stopped(run):
            evaluate_if_due()
            while run.step < steps and not run.is_done(config.patience):
                rows = next(stage.order)
                with tracker.profile(run.step + 1), times("learning"):
                    done = update(
                        stage.learner,
                        stage.examples,
                        rows,
                        objective,
                        stage.prefix,
                        config,
                        normalizer=count(rows),
                        step=run.step,
                        steps=steps,
                        skipped=run.skipped,
                        world=world,
                    )
                means = dict(zip(statistics, (done.sums / count(rows)).tolist(), strict=True))
                tracker.log(run.step + 1, means | done.metrics() | times.take())
                run.end_step(done.skipped)
                evaluate_if_due()
                stage.checkpoints.save_if_due(run)
        if run.best_step < 0:
            leave_it(None)
        if run.step > 0 and run.evaluated >= 0 and world.rank == 0:
            _tell_best(run, config)
        check_exports(left, stage.checkpoints, run)


def _tell_best(run: Training, config: RewardTrainingConfig | SFTConfig) -> None:
    if run.best < run.start:
        log.info("lowest held-out loss: %.4f, after step %d of %d", run.best, run.best_step, run.step)
        return
    log.warning(
        "the held-out loss was %.4f before training and never lower after it (at best %.4f): the exported model is no"
        " better than its start. Lower model.lr (%g), train less of the model (model.train), or give more data.",
        run.start,
        run.best,
        config.model.lr,
    )
