"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Three stages repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response, then
rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same batch).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.config import PPO, Config
from fastppo.data import Experience, Prompts, plan_step
from fastppo.distributed import World, together, watching
from fastppo.monitor import claimed, watch
from fastppo.ppo import ENDED, Setup, Step, estimate, evaluate_if_due, finish, learn, log_step, mean_kl, respond, set_up
from fastppo.rank import run_rank
from fastppo.rewards import score
from fastppo.rollout import sample


def train(config: Config, world: World) -> bool:
    """A whole run: evaluate, repeat the three stages, evaluate again, and leave the actor behind.

    Returns whether it did all its steps; an alarm may end it before. Raises Stopped where it was told to stop; what it
    has done is saved then.
    """
    with claimed(Path(config.output), world.rank):
        setup = set_up(config, world)
        if setup is None:
            return False
        run, checkpoints, prompts = setup.progress, setup.checkpoints, setup.prompts()
        with watching(world), setup.tracker() as tracker:
            with checkpoints.saved_when_stopped(run):
                evaluate_if_due(setup, tracker)
                while run.step < config.steps:
                    with tracker.profile(run.step + 1):
                        done = ppo_step(setup, next(prompts))
                    log_step(setup, done, tracker)
                    run.beta.update(mean_kl(done.experience), config.ppo.batch_size)
                    match respond(done.alarms, run, checkpoints, tracker, config, world):
                        case "rolled back":
                            prompts = setup.prompts()  # from an earlier step on
                            continue
                        case "ended":
                            break
                    run.end_step()
                    evaluate_if_due(setup, tracker)
                    checkpoints.save_if_due(run)
            finish(setup, tracker)
    return run.step == config.steps


def ppo_step(setup: Setup, prompts: Prompts) -> Step:
    """Experience from a batch of prompts, several epochs of updates on it, and a look at how the policy is doing."""
    config, roles, run, phases = setup.config, setup.roles, setup.progress, setup.phases
    experience = run.experience
    if experience is None:  # else the run was stopped while it learned from it, and goes on with that
        experience = make_experience(setup, prompts)
    with phases("learning"):
        plan = plan_step(experience.packed.lengths, config, run.step, setup.world.ranks, roles.attention)
        updates = learn(
            experience,
            roles,
            plan,
            config,
            step=run.step,
            beta=run.beta.value,
            world=setup.world,
            updates=run.updates,
            skipped=run.skipped,
            texts=setup.texts,
        )
        experience = run.drop_prefix()
    with phases("health"):
        health = watch(experience, updates, run.health, config, roles.tokenizer)
    return Step(experience, plan, updates, health.metrics, health.alarms)


def make_experience(setup: Setup, prompts: Prompts) -> Experience:
    """The actor's responses, their scores, and from these the advantage of every token."""
    config, roles, run, phases, world = setup.config, setup.roles, setup.progress, setup.phases, setup.world
    with phases("sampling"), together(world):
        mine, seed = prompts.of_rank(world.rank, world.ranks), config.seed
        rollout = sample(roles.gathered.policy(), mine, config.sampling, stop_ids=setup.stop_ids, seed=seed)
    with phases("feedback"):
        scored = score(rollout, setup.data, setup.sources, roles.tokenizer, config.ppo, run.moments, world, setup.judge)
    with phases("experience"):
        first_epoch = plan_step(scored.rollout.packed.lengths, config, run.step, world.ranks, roles.attention)[0]
        experience = estimate(scored, roles, first_epoch, config, run.beta.value, world)
        run.add_experience(experience, scored.moments)
    return experience


def main(argv: list[str] | None = None) -> None:
    if run_rank(PPO, train, argv) is False:
        sys.exit(ENDED)


if __name__ == "__main__":
    main()
