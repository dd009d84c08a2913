"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Three stages repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response, then
rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same batch).
"""

from __future__ import annotations

import sys
from contextlib import suppress
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
from fastppo.feedback import load_functions, load_sources, score
from fastppo.folder import continue_folder, fresh_folder
from fastppo.learn import learn
from fastppo.metrics import mean_kl, step_metrics
from fastppo.microbatch import imbalance, plan_step
from fastppo.nodes import check_output_is_shared
from fastppo.plan import check_plan
from fastppo.ppo import step_rates
from fastppo.progress import Progress, recall_experience
from fastppo.responses import heldout_responses, training_responses
from fastppo.roles import assemble
from fastppo.rollout import sample, stop_ids
from fastppo.stop import Stopped, together, watching
from fastppo.track import (
    Stages,
    Tracker,
    setup_logging,
    show_samples,
    write_samples,
)


def train(config: Config, world: World) -> None:
    """A whole run: evaluate, repeat the three stages, evaluate again, and leave the actor behind.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    ppo, n, output = config.ppo, config.sampling.samples_per_prompt, Path(config.output)
    load_functions(config.rewards)  # a typo in a function's name should not cost the minutes of loading models
    found = find_checkpoint(config, world)
    if world.rank == 0:
        fresh_folder(output) if found is None else continue_folder(output, found.sizes)
        (output / "config.yaml").write_text(dump(config), encoding="utf-8")
    check_output_is_shared(output, world)
    check_plan(config, world)
    roles = assemble(config, world)
    sources = load_sources(config, roles.tokenizer, world, roles.residency)
    data, heldout = load_prompts(
        config.data,
        roles.tokenizer,
        prompts_heldout=config.eval.prompts,
        context=roles.context,
        reserve=config.sampling.max_new_tokens,
    )
    stops = stop_ids(roles.policy, roles.tokenizer, config.sampling)
    checkpoints = Checkpoints(config, roles.engines, (data.tokens, heldout.tokens), world, enter=roles.residency.enter)
    run = checkpoints.load(found, Progress.begin(config, world.rank))
    recall_experience(run, roles, config, world)
    beta, stages = run.beta, Stages(run.seconds, roles.residency.enter)
    order = batches(data, size=ppo.batch_size // n, seed=config.seed, shuffle=config.data.shuffle, start=run.step)

    with (
        watching(world),
        Tracker(output, config.track, steps=config.steps, rank=world.rank, done=run.step) as tracker,
        checkpoints.saved_when_stopped(run),
    ):

        def evaluate_if_due() -> None:
            due = run.step in (0, config.steps) or (config.eval.every and run.step % config.eval.every == 0)
            if config.eval.prompts and due and run.evaluated < run.step:
                found = evaluate(roles, heldout, sources, stops, config, world)
                run.add_evaluation(found)
                tracker.log_evaluation(run.step, found.metrics)
                kept = heldout_responses(heldout.texts, found.responses, found.scores, count=config.track.responses)
                tracker.log_responses(run.step, kept)

        evaluate_if_due()
        for step in range(run.step, config.steps):
            rows = next(order)
            prompts = Prompts.of(data.tokens, rows, first=step * len(rows), samples=n)
            with tracker.profile(step + 1):
                experience = run.experience
                if experience is None:  # else the run was stopped while it learned from it, and goes on with that
                    with stages("sampling"), together(world):
                        mine = prompts.of_rank(world.rank, world.ranks)
                        rollout = sample(
                            roles.gathered.policy(), mine, config.sampling, stop_ids=stops, seed=config.seed
                        )
                    with stages("feedback"):
                        scored = score(rollout, data, sources, roles.tokenizer, ppo, run.moments, world)
                    with stages("experience"):
                        plan = plan_step(scored.rollout.packed.lengths, config, step, world.ranks, roles.attention)
                        experience = estimate(scored, roles, plan[0], config, beta.value, world)
                        run.add_experience(experience, scored.moments)
                with stages("learning"):
                    plan = plan_step(experience.packed.lengths, config, step, world.ranks, roles.attention)
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
            metrics = step_metrics(experience, updates, stages.take())
            rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, step)[-1], strict=True))
            spread = imbalance(plan, experience.packed.lengths, world.ranks, roles.attention)
            tracker.log(step + 1, metrics | rates | {"kl_coef": beta.value, "imbalance": spread})
            if tracker.wants_responses(step + 1):
                kept = training_responses(experience, roles.tokenizer, count=config.track.responses)
                tracker.log_responses(step + 1, kept)
            beta.update(mean_kl(experience), ppo.batch_size)
            run.end_step()
            evaluate_if_due()
            checkpoints.save_if_due(run)

    roles.residency.enter("sampling")
    trained = roles.gathered.policy()
    if world.rank == 0:
        if len(run.evaluations) > 1:
            shown = samples(heldout, run.evaluations[0], run.evaluations[-1])
            write_samples(output / "samples.jsonl", shown)
            show_samples(shown[: config.eval.show])
        export(trained, roles.tokenizer, output / "actor", config.actor.lora)


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    world = start_world(config.threads, config.timeout)
    setup_logging(world.rank)
    with exit_with_message(world.rank), suppress(Stopped):  # a run that was told to stop has done as it was told
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
