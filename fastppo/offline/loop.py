"""The run of an offline method: its set-up, and the loop that trains, evaluates and saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.checkpoint import (
    Checkpoints,
    ExportedModel,
    check_exports,
    export_model,
    find_run,
    open_folder,
    replace_export,
)
from fastppo.config import OfflineConfig
from fastppo.data import Examples, batches
from fastppo.distributed import Saved, World, watching
from fastppo.models import (
    PrefixStates,
    check_embedded,
    context_of,
    load_config,
    load_tokenizer,
    model_source,
    whole_state,
)
from fastppo.monitor import Phases, Tracker
from fastppo.offline.heldout import Evaluation, evaluation_of
from fastppo.offline.model import TrainedModel, assemble
from fastppo.offline.updates import Objective, Training, Watched, recall_prefix, total_steps, update
from fastppo.planner import check_plan
from fastppo.ppo import learning_rate

log = logging.getLogger("fastppo")

C = TypeVar("C", bound=OfflineConfig)
E = TypeVar("E", bound=Evaluation)


@dataclass(frozen=True)
class Setup(Generic[C]):
    """The parts of a run before its first update."""

    config: C
    world: World
    trained: TrainedModel
    examples: Examples  # to train on
    heldout: Examples
    checkpoints: Checkpoints
    progress: Training  # where the run is; the one part that changes
    order: Iterator[list[int]]  # batches of examples, from where the run is onwards
    prefix: PrefixStates  # of the training examples
    heldout_prefix: PrefixStates

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def steps(self) -> int:
        return total_steps(self.config, self.examples)

    def tracker(self) -> Tracker:
        done = self.progress.step
        return Tracker(self.output, self.config.track, steps=self.steps, rank=self.world.rank, done=done)


def set_up(
    config: C,
    world: World,
    load: Callable[..., tuple[Examples, Examples]],
    saved: Mapping[str, Saved] | None = None,
    check: Callable[[C, PreTrainedTokenizerBase], None] | None = None,
    before: Callable[[C, Examples, Examples], None] | None = None,
) -> Setup[C]:
    """The run's folder, its model and its examples, and where it is if it is resumed.

    load: `examples.load_pairs` or `examples.load_answers`; saved: further parts of the checkpoints beside the model, by
    name; they are read if the run is resumed. Cheap checks come first. The folder of an earlier run is renamed only
    when everything but the weights has been read. Of a run that is not resumed, check: further cheap checks, with the
    model's tokenizer; before: what is computed of the training and held-out examples before the model is loaded.
    """
    found = find_run(config, world)
    planned = check_plan(config if found is None else config.once_resumed, world).config
    model = config.model
    tokenizer = load_tokenizer("model.path", model.path, model.gguf_file, model.revision)
    context = context_of(load_config(model_source(model)))
    examples, heldout = load(config.data, tokenizer, heldout=config.eval.examples, context=context)
    for part in (examples, heldout):
        check_embedded(model_source(model), tokenizer, part.tokens, "data.path")
    if found is None and check is not None:
        check(config, tokenizer)
    open_folder(config, found, world)
    if found is None and before is not None:
        before(config, examples, heldout)
    trained = assemble(replace(config, optim=planned.optim), world, tokenizer)
    parts: dict[str, Saved] = {"model": trained.engine, **(saved or {})}
    checkpoints = Checkpoints(config, parts, (examples.tokens, heldout.tokens), world)
    progress = checkpoints.load(found, Training.begin(config.seed, world.rank))
    order = batches(examples, size=config.batch_size, seed=config.seed, shuffle=config.data.shuffle)
    return Setup(
        config=config,
        world=world,
        trained=trained,
        examples=examples,
        heldout=heldout,
        checkpoints=checkpoints,
        progress=progress,
        prefix=recall_prefix(trained, examples, list(islice(order, progress.step)), config, world),
        heldout_prefix=recall_prefix(trained, heldout, [], config, world),
        order=order,
    )


def count_examples(examples: Examples, rows: Tensor) -> int:
    return len(rows)


def count_response_tokens(examples: Examples, rows: Tensor) -> int:
    return int(examples.response_lengths[rows].sum())


def leave(setup: Setup[Any], evaluation: object) -> ExportedModel:
    """Export the model as it is. All ranks call it."""
    config, world, trained = setup.config, setup.world, setup.trained
    state = whole_state(trained.role.model, world)
    return export_model(trained.role, trained.tokenizer, setup.output / "model", config.model.lora, world, state)


def run(
    setup: Setup[C],
    objective: Objective,
    *,
    statistics: Sequence[str] = ("loss",),
    count: Callable[[Examples, Tensor], int] = count_examples,
    evaluate: Callable[[TrainedModel, Examples, PrefixStates, C, World], E] | None = None,
    leave: Callable[[Setup[C], E | None], ExportedModel] = leave,
    watch: Callable[[int, Mapping[str, float]], Sequence[Watched]] | None = None,
) -> None:
    """Update, evaluate on held-out examples, and leave the trained model with the lowest held-out loss behind.

    statistics: names of what the objective sums, `loss` among them; count: over how many of these examples' pairs or
    response tokens their means and the loss's are taken; evaluate: on held-out examples, by the objective itself where
    it is None; leave: exports the model as it was evaluated, or as it is if it never was;
    watch: called after each update with its number, from 1, and the means of the statistics; it gives the figures that
    are to stay within a level, each of which raises an alarm when it is beyond.

    Raises Stopped where the run was told to stop; what it has done is saved then. Raises ExportError at the end if the
    model is elsewhere, or nowhere.
    """
    config, world, progress, steps, times = setup.config, setup.world, setup.progress, setup.steps, Phases({})
    held_out: Any = evaluate or evaluation_of(objective, statistics, count)
    left: list[ExportedModel] = []  # the model behind it, as it was left last
    with watching(world), setup.tracker() as tracker:

        def leave_it(evaluation: E | None) -> None:
            left[:] = [replace_export(left, leave(setup, evaluation), world)]

        def evaluate_if_due() -> None:
            if not config.eval.is_due(progress.step, steps, progress.evaluated):
                return
            found = held_out(setup.trained, setup.heldout, setup.heldout_prefix, config, world)
            tracker.log_evaluation(progress.step, found.metrics())
            best = progress.best, progress.best_step
            if progress.add_evaluation(found.loss):
                leave_it(found)
                if left[0].folder is None:  # the next that is better than what is there is to be left, if it can be
                    progress.best, progress.best_step = best

        with setup.checkpoints.saved_when_stopped(progress):
            evaluate_if_due()
            while progress.step < steps and not progress.is_done(config.patience):
                rows = next(setup.order)
                counted = count(setup.examples, torch.tensor(rows))
                with tracker.profile(progress.step + 1), times("learning"):
                    done = update(
                        setup.trained,
                        setup.examples,
                        rows,
                        objective,
                        setup.prefix,
                        config,
                        normalizer=counted,
                        rate=_rate(config, progress.step, steps),
                        step=progress.step,
                        skipped=progress.skipped,
                        world=world,
                    )
                means = dict(zip(statistics, (done.sums / counted).tolist(), strict=True))
                tracker.log(progress.step + 1, means | done.metrics() | times.take())
                if watch is not None:
                    tracker.log_alarms(map(asdict, progress.alarms(watch(progress.step + 1, means))))
                progress.end_step(done.skipped)
                evaluate_if_due()
                setup.checkpoints.save_if_due(progress)
        if progress.best_step < 0:
            leave_it(None)
        if progress.step > 0 and progress.evaluated >= 0 and world.rank == 0:
            _tell_best(progress, config)
        check_exports(left, setup.checkpoints, progress)


def _rate(config: OfflineConfig, step: int, steps: int) -> float:
    return learning_rate(config.model.lr, step, steps, config.optim.warmup_steps, config.optim.schedule)


def _tell_best(progress: Training, config: OfflineConfig) -> None:
    if progress.best < progress.start:
        log.info("lowest held-out loss: %.4f, after step %d of %d", progress.best, progress.best_step, progress.step)
        return
    log.warning(
        "the held-out loss was %.4f before training and never lower after it (at best %.4f): the exported model is no"
        " better than its start. Lower model.lr (%g), train less of the model (model.train), or give more data.",
        progress.start,
        progress.best,
        config.model.lr,
    )
