"""What the ranks of the tests of sequence parallelism run: whole steps, with responses of given lengths.

`main(OUT, RANKS, CASES)`, CASES a JSON list of [model, lengths, settings]; rank 0 saves what came of each case to OUT.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ppo_step import config_of, learn

from fastppo.data.batch import Rollout, Scored
from fastppo.data.packed import pack
from fastppo.distributed.world import World, start_world, stop_world


def scored_of(lengths: Sequence[int], samples: int) -> Scored:
    """Made-up sequences of these lengths, of which the policy wrote all but a third, and a score for each."""
    random = torch.Generator().manual_seed(5)
    tokens = [torch.randint(5, 250, (length,), generator=random).tolist() for length in lengths]
    packed = pack(tokens, [max(length - max(length // 3, 1), 1) for length in lengths])
    count, written = len(lengths), int(packed.response_lengths.sum())
    rollout = Rollout(packed, torch.zeros(written), torch.ones(count, dtype=torch.bool), torch.arange(count) // samples)
    scores = torch.linspace(-1, 1, count)
    return Scored(rollout, scores[:, None], scores, torch.full_like(scores, torch.nan))


def outcome(model: str, lengths: Sequence[int], settings: Sequence[str], world: World) -> dict[str, Any]:
    size, together = str(len(lengths)), str(world.sequence.size)
    config = config_of(model, "--ppo.batch_size", size, "--parallel.sequence", together, *settings)
    done = learn(config, world, scored_of(lengths, config.sampling.samples_per_prompt))
    fields = ("old_logprobs", "ref_logprobs", "entropy", "values", "kl", "advantages")
    experience = {name: getattr(done.experience, name) for name in fields}
    return {
        "parameters": done.parameters,
        "updates": [dataclasses.asdict(update) for update in done.updates],
        "experience": {name: x for name, x in experience.items() if x is not None},
    }


def main(out: str, sequence: int, cases: str) -> None:
    world = start_world(1, sequence=sequence)
    done = [outcome(*case, world) for case in json.loads(cases)]
    if world.rank == 0:
        torch.save(done, Path(out))
    stop_world()
