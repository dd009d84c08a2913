"""ReST and rejection sampling fine-tuning: `deepspeed fastppo/train_rest.py --config quickstart-rest`.

Two halves repeat (Gulcehre et al., 2023). Grow: the actor writes responses to many prompts, and they are scored.
Improve: the actor is fine-tuned on those of them whose score is above a threshold, which rises from one Improve to the
next. One Improve on each prompt's best response is rejection sampling fine-tuning (RAFT, Dong et al., 2023).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.config import REST, RestConfig
from fastppo.data import Measured, Prompts
from fastppo.distributed import World, watching
from fastppo.monitor import check_figures, figures, lock_run_dir
from fastppo.online import ENDED, act_on_alarms, evaluate_if_due, finish
from fastppo.rank import run_rank
from fastppo.rest import (
    RestSetup,
    Step,
    batches_of,
    begin_improve,
    grow_batch,
    improve,
    joined,
    log_step,
    select,
    set_up,
    write_batch,
)


def train(config: RestConfig, world: World) -> bool:
    """A whole run: evaluate, repeat Grow and Improve, evaluate again, and leave the actor behind.

    Returns whether it did all its steps; an alarm may end it before. Raises Stopped where it was told to stop; what it
    has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        setup = set_up(config, world)
        if setup is None:
            return False
        run, checkpoints, grows = setup.progress, setup.checkpoints, setup.grows()
        with watching(world), setup.tracker() as tracker:
            with checkpoints.saved_when_stopped(run):
                evaluate_if_due(setup, tracker)
                while run.step < config.steps:
                    with tracker.profile(run.step + 1):
                        done = rest_step(setup, next(grows))
                    log_step(setup, done, tracker)
                    if act_on_alarms(done.alarms, run, checkpoints, tracker, config, world) == "ended":
                        break
                    run.end_step()
                    evaluate_if_due(setup, tracker)
                    checkpoints.save_if_due(run)
            finish(setup, tracker)
    return run.step == config.steps


def rest_step(setup: RestSetup, prompts: Prompts) -> Step:
    """A Grow, all Improves on it, and a look at how the policy that grew it was doing."""
    config, run, timed, holding = setup.config, setup.progress, setup.phases, setup.roles.residency.holding
    grown = grow(setup, prompts)
    with timed("learning"), holding("learning"):
        learn(setup, grown)
    with timed("health"), holding("health"):
        found, responses = figures(grown, exact_kl=False), len(grown.packed)
        health = check_figures(found, grown, responses, run.health, config, setup.roles.tokenizer)
    return Step(grown, health.metrics, health.alarms)


def grow(setup: RestSetup, prompts: Prompts) -> Measured:
    """The responses to all prompts, with their scores. What a run that is resumed has of them is not drawn again."""
    run = setup.progress
    parts = list(batches_of(prompts, setup.config.grow.batch_size))
    for number in range(len(run.grown), len(parts)):
        scored, batch = grow_batch(setup, parts[number])
        write_batch(setup, number, scored, parts[number])
        run.add_batch(batch)
        setup.save_within_step(number + 1)
    return joined(run.grown)


def learn(setup: RestSetup, grown: Measured) -> None:
    """The Improves of a step, each on the responses that reach its threshold."""
    improves, levels = setup.progress.improves, setup.config.improve.levels
    for number in range(max(len(improves) - 1, 0), len(levels)):
        selection = select(grown, levels[number], setup.config)
        if number == len(improves):
            begin_improve(setup, selection)
        for _ in improve(setup, grown, selection):
            setup.save_within_step(improves[-1].updates)


def main(argv: list[str] | None = None) -> None:
    run_rank(REST, train, argv, unfinished=ENDED)


if __name__ == "__main__":
    main()
