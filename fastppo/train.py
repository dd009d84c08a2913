"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Four phases repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response),
experience (rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same
batch). Each is timed, and holds on the GPU what it uses. With `sampling.until_informative` the first two may repeat
within a step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.checkpoint import random_state
from fastppo.config import PPO, Config
from fastppo.data import Experience, Prompts, plan_step
from fastppo.distributed import World, watching
from fastppo.models import PrefixStates
from fastppo.monitor import lock_run_dir, watch
from fastppo.online import ENDED, Draws, StepResponses, act_on_alarms, evaluate_if_due, finish
from fastppo.ppo import (
    PPOSetup,
    Step,
    StepBatch,
    StepContext,
    compute_experience,
    log_step,
    mean_kl,
    next_kl_coef,
    recompute_prefix,
    run_updates,
    set_up,
)
from fastppo.rank import run_rank
from fastppo.rewards import score


def train(config: Config, world: World) -> bool:
    """A whole run: evaluate, repeat the four phases, evaluate again, and leave the actor behind.

    Returns whether it did all its steps; an alarm may end it before. Raises Stopped where it was told to stop; what it
    has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        setup = set_up(config, world)
        if setup is None:
            return False
        run, checkpoints = setup.progress, setup.checkpoints
        with watching(world), setup.tracker() as tracker, closing(setup.feedback):
            with checkpoints.saved_when_stopped(run):
                prompts = setup.go_on()
                evaluate_if_due(setup, tracker)
                while run.step < config.steps:
                    with tracker.profile(run.step + 1):
                        done = ppo_step(setup, prompts)
                    log_step(setup, done, tracker)
                    run.kl_coef = next_kl_coef(run.kl_coef, mean_kl(done.experience), config, run.step)
                    match act_on_alarms(done.alarms, run, checkpoints, tracker, config, world):
                        case "rolled back":
                            prompts = setup.go_on()  # from an earlier step on
                            continue
                        case "ended":
                            break
                    run.end_step()
                    evaluate_if_due(setup, tracker)
                    checkpoints.save_if_due(run)
            finish(setup, tracker)
    return run.step == config.steps


def ppo_step(setup: PPOSetup, prompts: Iterator[Prompts]) -> Step:
    """Experience from the next prompts, several epochs of updates on it, and a look at how the policy is doing."""
    config, roles, run, world = setup.config, setup.roles, setup.progress, setup.world
    timed, holding = setup.phases, roles.residency.holding
    context, prefix_cache = setup.step_context(), PrefixStates()
    experience = run.experience
    if experience is None:
        experience = make_experience(setup, prompts, prefix_cache, context)
    else:  # the run was stopped while it learned from it, and goes on with that
        with timed("experience"), holding("experience", then="learning"):
            recompute_prefix(experience, len(run.updates), prefix_cache, context)
    with timed("learning"), holding("learning"):
        plan = plan_step(experience.packed.lengths, config, run.step, world.groups, roles.attention)
        for update in run_updates(experience, plan, prefix_cache, context, done=run.updates):
            run.updates.append(update)
        prefix_cache.clear()  # sampling wants its memory
    with timed("health"), holding("health"):
        health = watch(experience, run.updates, run.health, config, roles.tokenizer)
    return Step(experience, plan, run.updates, health.metrics, health.alarms)


def make_experience(
    setup: PPOSetup, prompts: Iterator[Prompts], prefix_cache: PrefixStates, context: StepContext
) -> Experience:
    """The actor's responses, their scores, and from these the advantage of every token."""
    config, roles, run, world = setup.config, setup.roles, setup.progress, setup.world
    timed, holding = setup.phases, roles.residency.holding
    batch = next_batch(setup, prompts) if config.ppo.steps_ahead == 0 else next_batch_ahead(setup, prompts)
    with timed("experience"), holding("experience", then="learning"):
        scored = batch.scored
        first_epoch = plan_step(scored.rollout.packed.lengths, config, run.step, world.groups, roles.attention)[0]
        moments = run.moments.add(batch.end_scores)
        experience = compute_experience(scored, moments, first_epoch, prefix_cache, context)
        run.add_experience(experience, moments, batch)
    return experience


def next_batch(setup: PPOSetup, prompts: Iterator[Prompts]) -> StepBatch:
    """Responses of the actor, and their scores."""
    config, roles, run, world = setup.config, setup.roles, setup.progress, setup.world
    timed, holding = setup.phases, roles.residency.holding
    draws, responses = Draws(config), StepResponses(config, run.in_flight, run.step, setup.data, world)
    while not draws.done:  # once, unless `sampling.until_informative` asks for more
        with timed("sampling"), holding("sampling"):
            setup.sampler.sync()
            rollout = responses.sample(setup.sampler, prompts)
        with timed("feedback"), holding("feedback", then="experience"):
            draws.add(score(rollout, setup.data, setup.sources, roles.tokenizer, world, setup.judge))
    scored, drawn = draws.batch()
    in_flight, continued = responses.in_flight, responses.continued
    return StepBatch(scored, draws.end_scores, responses.batches, in_flight, drawn=drawn, continued=continued)


def next_batch_ahead(setup: PPOSetup, prompts: Iterator[Prompts]) -> StepBatch:
    """The responses that the step before has sampled, and their scores; and the responses of the next step, which the
    actor writes before this step's update, and which functions and services score while this step learns."""
    config, run, feedback = setup.config, setup.progress, setup.feedback
    timed, holding = setup.phases, setup.roles.residency.holding
    batch, ahead = run.ahead, None
    if batch is None:  # no step was before
        with timed("sampling"), holding("sampling"):
            setup.sync_sampler()
            batch = setup.sample_ahead(prompts, run.step, run.in_flight)
        feedback.begin(batch.rollout)
    if run.step + 1 < config.steps:
        with timed("sampling"), holding("sampling"):
            setup.sync_sampler()
            ahead = setup.sample_ahead(prompts, run.step + 1, batch.in_flight)
    with timed("feedback"), holding("feedback", then="experience"):
        scored, random = feedback.take(), random_state()
        if ahead is not None:
            feedback.begin(ahead.rollout)
    in_flight, continued = batch.in_flight, batch.continued
    return StepBatch(scored, scored.end_scores, batch.batches, in_flight, None, continued, ahead, random)


def main(argv: list[str] | None = None) -> None:
    run_rank(PPO, train, argv, unfinished=ENDED)


if __name__ == "__main__":
    main()
