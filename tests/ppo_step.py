"""One PPO step of a tiny model, in this process or on several ranks; shared by the tests of learning.

As a script: `python ppo_step.py OUT MODEL CASES` on the ranks that the environment names, CASES being a JSON list of
lists of settings; rank 0 saves the updated parameters and the updates of each case to OUT.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from fastppo.config import Config
from fastppo.config.command_line import parse
from fastppo.data.batch import Experience, Moments, Prompts, Rollout, Scored, Update
from fastppo.data.microbatches import Minibatch, plan_step
from fastppo.data.packed import pack_turns
from fastppo.distributed.engine import gathered
from fastppo.distributed.world import World, start_world, stop_world
from fastppo.models.assembly import Roles, assemble
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.models.loading.policies import load_actor_tokenizer
from fastppo.ppo.advantages import load_estimator
from fastppo.ppo.experience import StepContext, compute_experience
from fastppo.ppo.losses import load_loss
from fastppo.ppo.ptx import Texts, read_texts
from fastppo.ppo.update import run_updates
from fastppo.rollout import InProcess

PROMPTS = [tuple(range(5, 5 + n)) for n in (3, 9, 4, 7, 3, 5, 12, 6)]
# Of each prompt's conversation the tokens of turns (positive) and observations (negative), in order.
SHAPES = [(3,), (2, -4, 1), (1, -1, 1, -2, 3), (5, -1, 2), (1,), (2, -3, 2, -3, 2), (4, -2, 1), (1, -5, 1)]


@dataclasses.dataclass
class Step:
    parameters: dict[str, torch.Tensor]
    updates: list[Update]
    experience: Experience


def config_of(model: str, *arguments: str) -> Config:
    fixed = ["--actor.model", model, "--rewards", '[{"function": "none:none"}]', "--data.path", "none", "--steps", "1"]
    small = ["--ppo.batch_size", "8", "--ppo.microbatch_tokens", "1000", "--optim.dtype", "fp32", "--actor.lr", "1e-2"]
    short = ["--sampling.max_new_tokens", "10", "--data.max_prompt_tokens", "16", "--critic.lr", "1e-2"]
    once = ["--ppo.epochs", "1", "--eval.prompts", "0", "--optim.schedule", "constant"]
    return parse([*fixed, *small, *short, *once, *arguments])


def roles_of(config: Config, world: World) -> Roles:
    return assemble(config, world, load_actor_tokenizer(config))


def responses(roles: Roles, samples: int = 1) -> Scored:
    """Responses of many lengths and a made-up score for each; samples: to a prompt."""
    config = config_of("none").sampling
    prompts = Prompts.of(PROMPTS, range(len(PROMPTS) // samples), samples=samples)
    sampler = InProcess(roles.sampling_weights, config, stop_ids=range(0, 257, 9))
    sampler.sync()
    rollout: Rollout = sampler.sample(prompts, temperature=config.temperature, seed=7)
    scores = torch.linspace(-1, 1, len(PROMPTS))
    return Scored(rollout, scores[:, None], scores, torch.full_like(scores, torch.nan))


def conversations(samples: int = 1) -> Scored:
    """Made-up conversations of many lengths, with a reward for each turn but the last and a score at the end."""
    random = torch.Generator().manual_seed(3)
    tokens, masks = [], []
    for i, shape in enumerate(SHAPES):
        prompt = PROMPTS[i // samples]
        behind = torch.randint(5, 250, (sum(map(abs, shape)),), generator=random).tolist()
        tokens.append([*prompt, *behind])
        masks.append([False] * len(prompt) + [count > 0 for count in shape for _ in range(abs(count))])
    packed = pack_turns(tokens, masks)
    rewards = torch.zeros(len(packed.responses))
    ends = packed.turn_lengths.cumsum(0) - 1
    rewards[ends] = torch.linspace(0.5, -0.5, len(ends))
    rewards[packed.last_response_tokens] = 0.0
    sources = torch.arange(len(PROMPTS)) // samples
    rollout = Rollout(packed, torch.zeros(len(rewards)), torch.ones(len(PROMPTS), dtype=torch.bool), sources, rewards)
    scores = torch.linspace(-1, 1, len(PROMPTS))
    of_turns = rollout.rewards_of_turns.float()
    return Scored(rollout, torch.stack([scores, of_turns], 1), scores + of_turns, scores * torch.nan, scores)


def context_of(config: Config, roles: Roles, world: World, *, step: int = 0) -> StepContext:
    texts = Texts.of(read_texts(config, roles.tokenizer, None), config)
    estimator, loss = load_estimator(config.ppo), load_loss(config.ppo)
    return StepContext(roles, config, world, estimator, loss, texts, step=step, kl_coef=config.ppo.kl_coef)


def step(config: Config, world: World, *, plan: list[list[Minibatch]] | None = None) -> Step:
    """From responses, or with an environment, which nobody asks, from made-up conversations."""
    roles, samples = roles_of(config, world), config.sampling.samples_per_prompt
    roles.residency.enter("sampling")
    scored = responses(roles, samples) if config.rollout.environment is None else conversations(samples)
    return learn(config, world, scored, plan, roles)


def learn(
    config: Config,
    world: World,
    scored: Scored,
    plan: list[list[Minibatch]] | None = None,
    roles: Roles | None = None,
) -> Step:
    """From these responses."""
    roles = roles or roles_of(config, world)
    plan = plan or plan_step(scored.rollout.packed.lengths, config, 0, world.groups, roles.attention)
    context, prefix_cache = context_of(config, roles, world), PrefixStates()
    roles.residency.enter("experience")
    experience = compute_experience(scored, Moments().add(scored.end_scores), plan[0], prefix_cache, context)
    roles.residency.enter("learning")
    updates = list(run_updates(experience, plan, prefix_cache, context))
    parameters = {}
    for name, engine in (("actor", roles.actor), ("critic", roles.critic)):
        if engine is not None:
            with gathered(engine.module.parameters()):
                parameters |= {f"{name}.{n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    return Step(parameters, updates, experience)


def main(out: str, model: str, cases: str) -> None:
    here = start_world(1)
    done = [step(config_of(model, *case), here) for case in json.loads(cases)]
    if here.rank == 0:
        torch.save([(d.parameters, [dataclasses.asdict(u) for u in d.updates]) for d in done], Path(out))
    stop_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
