"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Three stages repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response, then
rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same batch).
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.batch import Prompts
from fastppo.checkpoint import Checkpoints, export, find_checkpoint
from fastppo.cli import dump, parse
from fastppo.config import Config
from fastppo.data import batches, load_prompts
from fastppo.engine import World, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.estimate import estimate
from fastppo.evaluate import evaluate, samples
from fastppo.feedback import gather_scored, load_functions, load_judge, load_sources, score
from fastppo.health import watch
from fastppo.learn import learn
from fastppo.metrics import mean_kl, step_metrics
from fastppo.microbatch import plan_step
from fastppo.ppo import step_rates
from fastppo.respond import ENDED, respond
from fastppo.roles import assemble
from fastppo.rollout import sample, stop_ids
from fastppo.stop import Stopped, together, watching
from fastppo.track import (
    Stages,
    Tracker,
    continue_folder,
    fresh_folder,
    setup_logging,
    show_samples,
    write_samples,
)


def train(config: Config, world: World) -> bool:
    """A whole run: evaluate, repeat the three stages, evaluate again, and leave the actor behind.

    Returns whether it did all its steps; an alarm may end it before. Raises Stopped where it was told to stop; what it
    has done is saved then.
    """
    ppo, n, output = config.ppo, config.sampling.samples_per_prompt, Path(config.output)
    # a typo in a function's name should not cost the minutes of loading models
    load_functions((*config.rewards, *config.health.judge))
    found = find_checkpoint(config, world)
    if world.rank == 0:
        fresh_folder(output) if found is None else continue_folder(output, found.position)
        (output / "config.yaml").write_text(dump(config), encoding="utf-8")
    roles = assemble(config, world)
    sources, judge = (load(config, roles.tokenizer, world.device) for load in (load_sources, load_judge))
    data, heldout = load_prompts(
        config.data,
        roles.tokenizer,
        prompts_heldout=config.eval.prompts,
        context=roles.context,
        reserve=config.sampling.max_new_tokens,
    )
    stops = stop_ids(roles.policy, roles.tokenizer, config.sampling)
    checkpoints = Checkpoints(config, roles, (data, heldout), world)
    run = checkpoints.load(found)
    beta, stages = run.beta, Stages(run.seconds)
    deal = partial(batches, data, size=ppo.batch_size // n, seed=config.seed, shuffle=config.data.shuffle)
    order = deal(start=run.step)

    with (
        watching(world),
        Tracker(output, config.track, steps=config.steps, rank=world.rank, done=run.step) as tracker,
        checkpoints.saved_when_stopped(run),
    ):

        def evaluate_if_due() -> None:
            due = run.step in (0, config.steps) or (config.eval.every and run.step % config.eval.every == 0)
            if config.eval.prompts and due and run.evaluated < run.step:
                run.add_evaluation(evaluate(roles, heldout, sources, stops, config, world, judge))
                tracker.log_evaluation(run.step, run.evaluations[-1].metrics)

        tracker.log_alarms([asdict(alarm) for alarm in run.health.alarms], anew=True)
        evaluate_if_due()
        while run.step < config.steps:
            step, rows = run.step, next(order)
            prompts = Prompts.of(data.tokens, rows, first=step * len(rows), samples=n)
            with tracker.profile(step + 1):
                experience = run.experience
                if experience is None:  # else the run was stopped while it learned from it, and goes on with that
                    with stages("sampling"), together(world):
                        mine = prompts.of_rank(world.rank, world.ranks)
                        rollout = sample(roles.policy, mine, config.sampling, stop_ids=stops, seed=config.seed)
                    with stages("feedback"):
                        scored = gather_scored(score(rollout, data, sources, roles.tokenizer, ppo, judge), world)
                    with stages("experience"):
                        first_epoch = plan_step(scored.rollout.packed.lengths, config, step, world.ranks)[0]
                        experience = estimate(scored, roles, first_epoch, config, beta.value, world)
                        run.add_experience(experience)
                with stages("learning"):
                    plan = plan_step(experience.packed.lengths, config, step, world.ranks)
                    updates = learn(
                        experience,
                        roles,
                        plan,
                        config,
                        step=step,
                        beta=beta.value,
                        world=world,
                        updates=run.updates,
                        skipped=run.skipped,
                    )
                with stages("health"):
                    health = watch(experience, updates, run.health, config, roles.tokenizer)
            metrics = step_metrics(experience, updates, stages.take()) | health.metrics
            rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, step)[-1], strict=True))
            tracker.log(step + 1, metrics | rates | {"kl_coef": beta.value})
            tracker.log_alarms([asdict(alarm) for alarm in health.alarms])
            beta.update(mean_kl(experience), ppo.batch_size)
            match respond(health.alarms, run, checkpoints, tracker, config, world):
                case "rolled back":
                    order = deal(start=run.step)
                    continue
                case "ended":
                    break
            run.end_step()
            evaluate_if_due()
            checkpoints.save_if_due(run)

    if world.rank == 0:
        if len(run.evaluations) > 1:
            shown = samples(heldout, run.evaluations[0], run.evaluations[-1])
            write_samples(output / "samples.jsonl", shown)
            show_samples(shown[: config.eval.show])
        export(roles.policy, roles.tokenizer, output / "actor")
    return run.step == config.steps


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    done = True
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        done = train(config, world)
    stop_world()
    if not done:
        sys.exit(ENDED)


if __name__ == "__main__":
    main()
