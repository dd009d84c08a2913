"""Improve: updates of the actor on the responses of a Grow that score well, mixed with demonstrations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastppo.checkpoint import random_state
from fastppo.config import RestConfig
from fastppo.data import Examples, Measured, batches, end_to_end
from fastppo.models import PrefixStates
from fastppo.offline import TrainedModel, negative_logprob, update
from fastppo.rest.progress import Improved
from fastppo.rest.run import RestSetup
from fastppo.rest.selection import Selection


def improve(setup: RestSetup, grown: Measured, selection: Selection) -> Iterator[None]:
    """Do the updates of the newest Improve of the step that are not done yet; yields after each.

    The loss is the mean negative logprob of an update's response tokens, demonstrations included. Raises TrainingFault
    after too many updates that were not finite, and Stopped between two microbatches.
    """
    config, run, roles, world = setup.config, setup.progress, setup.roles, setup.world
    now, number = run.improves[-1], len(run.improves) - 1
    trained = TrainedModel(roles.actor, roles.tokenizer)
    examples, total = learned_from(grown, selection, setup.texts), updates_of(config, now.kept)
    for rows in batches_of_rows(setup, now):
        tokens = int(examples.response_lengths[rows].sum())
        rate = learning_rate(config, run.updates, run.step, number, now.updates / total)
        if roles.average is not None:
            roles.average.before_step()
        done = update(
            trained,
            examples,
            rows,
            negative_logprob,
            PrefixStates(keep=False),
            config,
            normalizer=tokens,
            rate=rate,
            step=run.updates,
            skipped=run.skipped,
            world=world,
        )
        if roles.average is not None and not done.skipped:
            roles.average.update()
        now.add(done, tokens)
        run.updates, run.skipped, run.random = run.updates + 1, done.skipped, random_state()
        yield


def begin_improve(setup: RestSetup, selection: Selection) -> None:
    """Note in the run's progress that the next Improve of its step learns from these."""
    found = Improved(kept=len(selection.rows), prompts=selection.prompts, threshold=selection.threshold)
    setup.progress.improves.append(found)


def learned_from(grown: Measured, selection: Selection, demonstrations: Examples | None) -> Examples:
    """The chosen responses, and behind them all demonstrations."""
    packed = grown.packed.select(selection.rows)
    if demonstrations is not None:
        packed = end_to_end([packed, demonstrations.packed])
    return Examples(packed, 1, torch.zeros(len(packed)))


def updates_of(config: RestConfig, kept: int) -> int:
    """Of an Improve that learns from so many responses."""
    return -(-config.improve.epochs * kept // min(config.learned_together, kept))


def batches_of_rows(setup: RestSetup, now: Improved) -> Iterator[list[int]]:
    """Rows of `learned_from` for each update of an Improve that is not done yet.

    Which they are depends on the run's seed, the number of the step and the Improve, and of demonstrations on the
    number of the update in the run.
    """
    config, run, kept = setup.config, setup.progress, now.kept
    seed = (config.seed * 1_000_003 + run.step) * 1_009 + len(run.improves)
    size = min(config.learned_together, kept)
    responses = batches(range(kept), size=size, seed=seed, shuffle=True, start=now.updates)
    given: Iterator[list[int]] | None = None
    if setup.texts is not None:
        given = batches(setup.texts, size=config.demonstrations, seed=config.seed, shuffle=True, start=run.updates)
    for _ in range(now.updates, updates_of(config, kept)):
        rows = next(responses)
        yield rows + ([] if given is None else [kept + row for row in next(given)])


def learning_rate(config: RestConfig, update: int, step: int, improve: int, done: float) -> float:
    """The rate of an update: rises over `optim.warmup_steps`, then (`linear`) falls to 0 at the end of the run.

    update: of the run; step, improve: which one, all counted from 0; done: the share of the Improve's updates before
    this one. How many updates a run has is not known before it has grown its responses, so that the fall goes by shares
    of steps and Improves.
    """
    optim, improves = config.optim, len(config.improve.levels)
    peak = config.actor.lr * config.improve.lr_factor**improve
    if update < optim.warmup_steps:
        return peak * (update + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return peak
    return peak * (1 - (step + (improve + done) / improves) / config.steps)
