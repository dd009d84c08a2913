"""Grow: batches of responses, drawn from the actor, scored, measured, and written to the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from fastppo.data import Measured, Prompts, Scored, end_to_end, pack_even
from fastppo.distributed import together
from fastppo.generation import scored_rows
from fastppo.online import measure
from fastppo.rest.run import RestSetup
from fastppo.rewards import score


def batches_of(prompts: Prompts, size: int) -> Iterator[Prompts]:
    """A Grow's prompts, `size` responses at a time."""
    for start in range(0, len(prompts), size):
        yield prompts.select(range(start, min(start + size, len(prompts))))


def grow_batch(setup: RestSetup, prompts: Prompts) -> tuple[Scored, Measured]:
    """The actor's responses, their scores, and what actor and reference say of them. All ranks call it."""
    config, roles, world, timed = setup.config, setup.roles, setup.world, setup.phases
    holding = roles.residency.holding
    with timed("sampling"), holding("sampling"), together(world):
        setup.sampler.sync()
        rollout = setup.sampler.sample(prompts.of_rank(world.rank, world.ranks))
    with timed("feedback"), holding("feedback", then="experience"):
        scored = score(rollout, setup.data, setup.sources, roles.tokenizer, world, setup.judge)
    with timed("experience"), holding("experience"):
        packed = scored.rollout.packed
        parts = pack_even(torch.arange(len(packed)), packed.lengths, config.microbatch_tokens, world.groups)
        rows = measure(packed, parts[world.group :: world.groups], roles, None, config, world)
    kl = rows["old_logprobs"] - rows["ref_logprobs"]  # k1
    batch = Measured(
        packed=packed,
        scores=scored.scores,
        by_source=scored.by_source,
        judged=scored.judged,
        ended=scored.rollout.ended,
        sampler_logprobs=scored.rollout.logprobs,
        kl=kl,
        turn_rewards=scored.rollout.turn_rewards,
        **rows,
    )
    return scored, batch


def write_batch(setup: RestSetup, number: int, scored: Scored, prompts: Prompts) -> None:
    """Write a batch to the run's folder, as its part `number`. All ranks call it. Raises DataError."""
    samples, columns = setup.config.sampling.samples_per_prompt, None
    if setup.world.rank == 0:
        columns = scored_rows(scored, prompts, setup.data, setup.roles.tokenizer, samples)
    setup.parts(setup.progress.step + 1).write(number, columns)


def joined(batches: Sequence[Measured]) -> Measured:
    """The batches of a Grow, end to end."""
    packed = end_to_end([batch.packed for batch in batches])
    parts = {f.name: [getattr(b, f.name) for b in batches] for f in fields(Measured) if f.name != "packed"}
    if batches[0].turn_rewards is None:  # no environment
        del parts["turn_rewards"]
    return Measured(packed=packed, **{name: torch.cat(part) for name, part in parts.items()})
