"""Bytes that the models of `fastppo.generate` hold while responses are drawn and while they are scored.

Nothing trains, so that there are weights and what a pass needs. What is on the GPU when is said by a `Placement`, the
same that `Residency` has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastppo.config import GenerateConfig
from fastppo.distributed import PartName, Placement, uses
from fastppo.planner.batch import Batch, in_microbatch, prompts_of, rows_of
from fastppo.planner.memory import (
    Bytes,
    Change,
    Places,
    Role,
    Share,
    asking_needs,
    buffers,
    model_states,
    placed,
    prefetch,
    recording_holds,
    sampling_needs,
)
from fastppo.planner.vllm_memory import samples_with_vllm, streaming_needs

PHASES = ("sampling", "feedback")
SAMPLED = "model"  # the name of the model that responses are drawn from; all others score


def shares(roles: list[Role], config: GenerateConfig, ranks: int, placement: Placement | None = None) -> list[Share]:
    """Every model in both phases on one rank, with prompts and responses as long as they may be.

    placement: without one each model is on the GPU only while it is used.
    """
    batch, placement = batch_of(config, ranks), placement or least(config)
    found = []
    for phase in PHASES:
        for role in roles:
            sampled, used = role.name == SAMPLED, placement.uses_in(phase, _name(role))
            places = _weights(role, phase, config, ranks, placement)
            if sampled:
                places += Places(gpu=recording_holds(role.size, config, batch))
            if used and sampled:
                alone = replace(config, rewards_on="gpu")  # the sampled model is whole, wherever the others are
                vllm = samples_with_vllm(config)
                needs = streaming_needs(role.size, alone) if vllm else sampling_needs(role.size, alone, batch)
                places += Places(gpu=needs)
            elif used:
                places += prefetch(role, config) + Places(gpu=asking_needs(role, batch, head=False))
            found.append(Share(role.name, phase, places))
    return found


def batch_of(config: GenerateConfig, ranks: int) -> Batch:
    """What one rank draws, and what it scores at once."""
    prompt = config.data.first_tokens or config.data.max_prompt_tokens
    length, mine = prompt + config.sampling.max_new_tokens, -(-config.batch_size // ranks)
    sequences = in_microbatch(mine, length, config)
    rows = rows_of(config, mine)
    prefilled = prompts_of(min(rows, mine), config.sampling.samples_per_prompt)
    return Batch(sequences, length, responses=sequences, rows=rows, prompt=prompt, prefilled=prefilled)


def least(config: GenerateConfig) -> Placement:
    """Each model is on the GPU only while it is used."""
    return Placement(uses(loss_reads_reference=False))


def parts(roles: list[Role], config: GenerateConfig, ranks: int) -> dict[PartName, Bytes]:
    """What may be moved, with what each part has on the GPU in the phases that use it."""
    found: dict[PartName, Bytes] = {}
    for role in roles:
        states, live = _states(role, config, ranks)
        amount = Bytes(weights=states.gpu.weights - live)
        found[_name(role)] = found.get(_name(role), Bytes()) + amount  # an ensemble has one name
    return found


def _name(role: Role) -> PartName:
    return "sampled" if role.name == SAMPLED else "rewards", role.name


def _states(role: Role, config: GenerateConfig, ranks: int) -> tuple[Places, int]:
    """Its weights, and how many bytes of them are those of the module that is whole while it is asked."""
    if role.name == SAMPLED:
        return model_states(role, replace(config, rewards_on="gpu"), ranks), 0
    states = model_states(role, config, ranks) + buffers(role, config, ranks)
    return states, role.size.largest * role.size.bytes if config.zero.stage == 3 else 0


def _weights(role: Role, phase: str, config: GenerateConfig, ranks: int, placement: Placement) -> Places:
    states, live = _states(role, config, ranks)
    if role.size.on_cpu:
        return states
    moved = placed(_name(role), Bytes(weights=states.gpu.weights - live), phase, placement, cpu=False)
    gathered = live if placement.uses_in(phase, _name(role)) else 0  # nothing is gathered while it waits
    return replace(states, gpu=Bytes(weights=gathered)) + moved


def smaller_passes(config: GenerateConfig) -> Iterator[Change]:
    """Changes that need less memory, from the least cost to the most."""
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    for part in (2, 4, 8):
        if config.microbatch_tokens // part >= longest:
            yield {"microbatch_tokens": config.microbatch_tokens // part}
    for part in () if samples_with_vllm(config) else (2, 4):
        if (rows := config.sampling.settled_rows // part) >= 4:
            yield {"sampling.rows": rows}
    if config.rewards or config.judge:
        places = ("gpu", "ranks", "cpu")
        for place in places[places.index(config.rewards_on) + 1 :]:
            yield {"rewards_on": place}
