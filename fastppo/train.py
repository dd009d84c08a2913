"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Three stages repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response, then
rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same batch).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from fastppo.batch import Prompts
from fastppo.checkpoint import export
from fastppo.cli import dump, parse
from fastppo.config import Config
from fastppo.data import batches, load_prompts
from fastppo.engine import World, start_world, stop_world
from fastppo.errors import exit_with_message
from fastppo.estimate import estimate
from fastppo.evaluate import evaluate, samples
from fastppo.feedback import gather_scored, load_functions, load_sources, score
from fastppo.learn import learn
from fastppo.metrics import mean_kl, speeds, step_metrics
from fastppo.microbatch import plan_epochs
from fastppo.ppo import KLController, step_rates
from fastppo.roles import assemble
from fastppo.rollout import sample, stop_ids
from fastppo.track import Stages, Tracker, fresh_folder, setup_logging, show_samples, write_samples


def train(config: Config, world: World) -> None:
    """A whole run: evaluate, repeat the three stages, evaluate again, and leave the actor behind."""
    ppo, output = config.ppo, Path(config.output)
    load_functions(config.rewards)  # a typo in a function's name should not cost the minutes of loading models
    roles = assemble(config, world)
    sources = load_sources(config, roles.tokenizer, world.device)
    data, heldout = load_prompts(
        config.data,
        roles.tokenizer,
        prompts_heldout=config.eval.prompts,
        context=roles.context,
        reserve=config.sampling.max_new_tokens,
    )
    stops = stop_ids(roles.policy, roles.tokenizer, config.sampling)
    each, n = ppo.batch_size // config.sampling.samples_per_prompt, config.sampling.samples_per_prompt
    order = batches(data, size=each, seed=config.seed, shuffle=config.data.shuffle)
    beta = KLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
    stages = Stages()
    if world.rank == 0:
        fresh_folder(output)
        (output / "config.yaml").write_text(dump(config))

    with Tracker(output, config.track, steps=config.steps, rank=world.rank) as tracker:
        before = after = evaluate(roles, heldout, sources, stops, config, world) if config.eval.prompts else None
        if before:
            tracker.log_evaluation(0, before.metrics)
        for step in range(config.steps):
            with tracker.profile(step + 1):
                prompts = Prompts.of(data.tokens, next(order), first=step * each, samples=n)
                mine = prompts.of_rank(world.rank, world.ranks)

                with stages("sampling"):
                    rollout = sample(
                        roles.policy,
                        mine,
                        config.sampling,
                        stop_ids=stops,
                        seed=config.seed,
                        temperature=config.sampling.temperature,
                    )
                with stages("feedback"):
                    scored = score(rollout, data, sources, roles.tokenizer, ppo)
                    scored = gather_scored(scored, world)
                with stages("experience"):
                    plan = plan_epochs(
                        scored.rollout.packed.lengths,
                        epochs=ppo.epochs,
                        minibatches=ppo.minibatches,
                        budget=ppo.microbatch_tokens,
                        ranks=world.ranks,
                        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step),
                    )
                    experience = estimate(scored, roles, plan[0], config, beta.value, world)
                with stages("learning"):
                    updates = learn(
                        experience,
                        roles,
                        plan,
                        config,
                        beta=beta.value,
                        rates=step_rates(config, step),
                        train_actor=step >= config.critic.warmup_steps,
                        world=world,
                    )
            used = beta.value
            beta.update(mean_kl(experience), ppo.batch_size)

            packed, seconds = experience.packed, stages.take()
            metrics = step_metrics(experience, updates) | {"kl_coef": used} | seconds
            metrics |= dict(zip(("actor_lr", "critic_lr"), step_rates(config, step)[-1], strict=True))
            metrics |= speeds(seconds, len(packed.responses), len(packed.tokens), ppo.epochs)
            tracker.log(step + 1, metrics)
            if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.steps:
                tracker.log_evaluation(step + 1, evaluate(roles, heldout, sources, stops, config, world).metrics)

        if config.eval.prompts and config.steps:
            after = evaluate(roles, heldout, sources, stops, config, world)
            tracker.log_evaluation(config.steps, after.metrics)

    if world.rank == 0:
        if before and after:
            rows = samples(heldout, before, after)
            write_samples(output / "samples.jsonl", rows)
            show_samples(rows[: config.eval.show])
        export(roles.policy, roles.tokenizer, output / "actor")


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    world = start_world(config.threads)
    setup_logging(world.rank)
    with exit_with_message(world.rank):
        train(config, world)
    stop_world()


if __name__ == "__main__":
    main()
