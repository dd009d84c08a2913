"""vLLM beside the trainer on the ranks that the environment names, for a table of settings: how far their logprobs are.

`main` is for `forks.Forks`: `[MODEL, OUT, tensor_parallel_size, CASES]`, CASES being a JSON list of lists of settings.
Each rank writes what it found to OUT-RANK.json: of one turn, or, with `rollout.environment`, of conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from ppo_step import config_of, roles_of

from fastppo.data.batch import Prompts, Rollout
from fastppo.data.packed import pack
from fastppo.distributed.world import World, start_world, stop_world
from fastppo.models import Roles, token_stats
from fastppo.rollout import find_engine, make_sampler

WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 32: vLLM has none of 8
SMALL = ["--rollout.engine", "vllm", "--rollout.vllm.arguments", "{kv_cache_memory_bytes: 33554432}"]  # 32 MiB
PROMPTS = Prompts.of([(5, 6, 7, 8), (9, 10, 11), (20,)], [0, 1, 2, 1, 0], samples=2)

# An environment whose answers depend on its arguments alone; those of `slow` come after a time that differs.
PARTNER = """
import time

def answer(conversation, turn, seed):
    number = (sum(map(ord, conversation[-1]["content"])) + seed) % 6
    return None if number == 0 else ("o" * number + str(turn), number / 4)

def slow(conversation, turn, seed):
    time.sleep((seed + turn) % 4 * 0.02)
    return answer(conversation, turn, seed)
"""
STOPS = json.dumps(tiny.tokenizer().convert_ids_to_tokens(range(10, 257, 5)))
TALKS = {"rollout.turn_tokens": 7, "rollout.max_turns": 4, "sampling.max_new_tokens": 30, "sampling.stop_tokens": STOPS}


def talking(folder: Path) -> list[str]:
    """Settings of conversations with `PARTNER`, which is written into the folder."""
    (folder / "partner.py").write_text(PARTNER)
    settings = TALKS | {"rollout.environment": f"{folder}/partner.py:slow"}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def saved(folder: Path, **settings: Any) -> str:
    """A model that vLLM has on the CPU, too."""
    return tiny.saved(folder, tiny.causal(**(WIDE | settings)))


def difference(roles: Roles, rollout: Rollout, temperature: float = 1.0) -> tuple[float, float]:
    """Of the rollout's logprobs from the trainer's: the largest and the mean, in nats; at ZeRO 3 all ranks call it."""
    policy = roles.sampling_weights.gather()
    packed = rollout.packed
    if not len(packed):
        return 0.0, 0.0
    with torch.no_grad():
        stats = policy(packed, partial(token_stats, packed.responses, temperature))
    apart = (stats.logprobs - rollout.logprobs).abs()
    return float(apart.max()), float(apart.mean())


def update(roles: Roles) -> None:
    """One that changes what the actor says by far more than rounding."""
    roles.actor.train()
    loss = roles.actor(pack([(5, 6, 7)], [1]), lambda policy, hidden: policy.head(hidden).float().square().mean())
    roles.actor.backward(loss, last=True)
    roles.actor.step([1e-2, 1e-2])


def walk(model: str, settings: Sequence[str], world: World) -> dict[str, Any]:
    """Two updates; before and after each `sync` the difference, and what is drawn."""
    config = config_of(model, *SMALL, *settings)
    find_engine(config)
    roles = roles_of(config, world)
    sampler = make_sampler(config, roles, world)
    # two ranks that sample together have prompts of the first alone: the other takes part all the same
    alone = config.rollout.vllm.tensor_parallel_size > 1 and world.rank > 0
    prompts = PROMPTS.select([]) if alone else PROMPTS.of_rank(world.rank, world.ranks)
    sampler.sync()
    rollout = sampler.sample(prompts)
    again, other = sampler.sample(prompts), sampler.sample(prompts, seed=99)
    found: dict[str, Any] = {
        "fresh": [difference(roles, rollout)],
        "stale": [],
        "again": rollout.packed.tokens.equal(again.packed.tokens) and rollout.logprobs.equal(again.logprobs),
        "other seed": not rollout.packed.tokens.equal(other.packed.tokens),
        "samples differ": len({tuple(x.tolist()) for x in rollout.packed.responses.split(2)}) > 1,
        "responses": len(rollout.packed),
    }
    for _ in range(2):
        update(roles)
        found["stale"].append(difference(roles, rollout))
        sampler.sync()
        rollout = sampler.sample(prompts)
        found["fresh"].append(difference(roles, rollout))
    return found


def talk(model: str, settings: Sequence[str], world: World) -> dict[str, Any]:
    """Conversations of this rank's part of the prompts, before and after an update."""
    config = config_of(model, *SMALL, *settings)
    find_engine(config)
    roles = roles_of(config, world)
    sampler = make_sampler(config, roles, world)
    found: dict[str, Any] = {"fresh": []}
    for _ in range(2):
        sampler.sync()
        rollout = sampler.sample(PROMPTS.of_rank(world.rank, world.ranks))
        found["fresh"].append(difference(roles, rollout))
        update(roles)
    assert rollout.packed.mask is not None and rollout.turn_rewards is not None
    return found | {
        "turns": rollout.packed.turn_counts.tolist(),
        "behind": (rollout.packed.lengths - rollout.packed.prompt_lengths).tolist(),
        "written": [part.tolist() for part in rollout.packed.mask.split(rollout.packed.lengths.tolist())],
        "tokens": [part.tolist() for part in rollout.packed.tokens.split(rollout.packed.lengths.tolist())],
        "rewards": rollout.rewards_of_turns.tolist(),
        "said": rollout.conversations,
    }


def main(argv: Sequence[str]) -> None:
    model, out, size, cases = argv
    world = start_world(1)
    tensor_parallel = ["--rollout.vllm.tensor_parallel_size", size]
    found = [
        (talk if "--rollout.environment" in case else walk)(model, [*case, *tensor_parallel], world)
        for case in json.loads(cases)
    ]
    Path(f"{out}-{world.rank}.json").write_text(json.dumps(found))
    stop_world()
