"""What the ranks of the tests of sequence parallelism run: whole PPO steps on made-up responses, and a reward model.

`main(OUT, CASES)`, CASES a JSON list of [sequence, model, lengths, settings]: how many ranks split a row, and what of.
Rank 0 saves what came of each case to OUT, and behind that the scores of every rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from ppo_step import config_of, learn

from fastppo.config import OptimConfig, ZeroConfig
from fastppo.data.batch import Rollout, Scored
from fastppo.data.packed import Packed, pack
from fastppo.distributed.engine import Frozen
from fastppo.distributed.neighbours import neighbours_of
from fastppo.distributed.world import World, all_gather, start_world, stop_world
from fastppo.models.parallel.group import choose_group
from fastppo.models.roles import RewardModel
from fastppo.rewards.model import ModelSource

SCORED = (3, 0, 2, 1)  # sequences that each of four ranks has to score


def made_up(lengths: Sequence[int], seed: int = 5) -> Packed:
    """Sequences of these lengths, of which the policy wrote all but a third."""
    random = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 250, (length,), generator=random).tolist() for length in lengths]
    return pack(tokens, [max(length - max(length // 3, 1), 1) for length in lengths])


def scored_of(lengths: Sequence[int], samples: int) -> Scored:
    """Such sequences as responses with a score each; samples: to a prompt."""
    packed, count = made_up(lengths), len(lengths)
    written = int(packed.response_lengths.sum())
    sources = torch.arange(count) // samples
    rollout = Rollout(packed, torch.zeros(written), torch.ones(count, dtype=torch.bool), sources)
    scores = torch.linspace(-1, 1, count)
    return Scored(rollout, scores[:, None], scores, torch.full_like(scores, torch.nan))


def outcome(sequence: int, model: str, lengths: Sequence[int], settings: Sequence[str], world: World) -> dict[str, Any]:
    world = dataclasses.replace(world, sequence=neighbours_of(world, sequence, 60.0, exchanging=True))
    split = ["--ppo.batch_size", str(len(lengths)), "--parallel.sequence", str(sequence)]
    config = config_of(model, *split, *settings)
    done = learn(config, world, scored_of(lengths, config.sampling.samples_per_prompt))
    fields = ("old_logprobs", "ref_logprobs", "entropy", "values", "kl", "advantages")
    experience = {name: getattr(done.experience, name) for name in fields}
    return {
        "parameters": done.parameters,
        "updates": [dataclasses.asdict(update) for update in done.updates],
        "experience": {name: x for name, x in experience.items() if x is not None},
    }


def scores(world: World, ranks: Sequence[int]) -> list[float]:
    """A reward model's scores of what these ranks have to score, where `world` is one of them, or all of them."""
    tokenizer = tiny.tokenizer()
    role = Frozen(RewardModel(tiny.classifier(hidden_size=32)), OptimConfig(dtype="fp32"), ZeroConfig())
    source = ModelSource(role, tokenizer, tokenizer, budget=40, zero=ZeroConfig(), world=world)
    lengths = [5 + 7 * i + rank for rank in ranks for i in range(SCORED[rank])]
    packed = pack([list(range(20, 20 + length)) for length in lengths], [1] * len(lengths))
    return source.scores(packed, [""] * len(lengths))


def main(out: str, cases: str) -> None:
    world = start_world(1)
    done: list[Any] = [outcome(*case, world) for case in json.loads(cases)]
    together = dataclasses.replace(world, sequence=neighbours_of(world, world.ranks, 60.0, exchanging=True))
    choose_group(together.sequence)
    scored = world.ranks <= len(SCORED)  # the reward model has no more heads
    done.append(all_gather(scores(together, [world.rank]), world) if scored else None)
    if world.rank == 0:
        torch.save(done, Path(out))
    stop_world()
