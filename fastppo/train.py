"""PPO for language models: `deepspeed fastppo/train.py --config quickstart`.

Three stages repeat: sampling (the actor writes a response to each prompt), feedback (a score for each response, then
rewards, values and advantages for each token) and learning (several epochs of clipped updates on the same batch).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

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
from fastppo.metrics import mean_kl, step_metrics
from fastppo.microbatch import plan_step
from fastppo.ppo import KLController, step_rates
from fastppo.roles import assemble
from fastppo.rollout import sample, stop_ids
from fastppo.track import Stages, Tracker, fresh_folder, setup_logging, show_samples, write_samples


def train(config: Config, world: World) -> None:
    """A whole run: evaluate, repeat the three stages, evaluate again, and leave the actor behind."""
    ppo, n, output = config.ppo, config.sampling.samples_per_prompt, Path(config.output)
    load_functions(config.rewards)  # a typo in a function's name should not cost the minutes of loading models
    if world.rank == 0:
        fresh_folder(output)
        (output / "config.yaml").write_text(dump(config), encoding="utf-8")
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
    order = batches(data, size=ppo.batch_size // n, seed=config.seed, shuffle=config.data.shuffle)
    beta, stages = KLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon), Stages()

    with Tracker(output, config.track, steps=config.steps, rank=world.rank) as tracker:
        evaluations = []

        def evaluate_after(steps: int) -> None:
            if config.eval.prompts:
                evaluations.append(evaluate(roles, heldout, sources, stops, config, world))
                tracker.log_evaluation(steps, evaluations[-1].metrics)

        evaluate_after(0)
        for step in range(config.steps):
            rows = next(order)
            prompts = Prompts.of(data.tokens, rows, first=step * len(rows), samples=n)
            with tracker.profile(step + 1):
                with stages("sampling"):
                    mine = prompts.of_rank(world.rank, world.ranks)
                    rollout = sample(roles.policy, mine, config.sampling, stop_ids=stops, seed=config.seed)
                with stages("feedback"):
                    scored = gather_scored(score(rollout, data, sources, roles.tokenizer, ppo), world)
                with stages("experience"):
                    plan = plan_step(scored.rollout.packed.lengths, config, step, world.ranks)
                    experience = estimate(scored, roles, plan[0], config, beta.value, world)
                with stages("learning"):
                    updates = learn(experience, roles, plan, config, step=step, beta=beta.value, world=world)
            metrics = step_metrics(experience, updates, stages.take())
            rates = dict(zip(("actor_lr", "critic_lr"), step_rates(config, step)[-1], strict=True))
            tracker.log(step + 1, metrics | rates | {"kl_coef": beta.value})
            beta.update(mean_kl(experience), ppo.batch_size)
            if step + 1 == config.steps or (config.eval.every and (step + 1) % config.eval.every == 0):
                evaluate_after(step + 1)

    if world.rank == 0:
        if len(evaluations) > 1:
            shown = samples(heldout, evaluations[0], evaluations[-1])
            write_samples(output / "samples.jsonl", shown)
            show_samples(shown[: config.eval.show])
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
