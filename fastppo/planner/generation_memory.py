"""Bytes that the models of `fastppo.generate` hold while responses are drawn and while they are scored.

Nothing trains, so that there are weights and what a pass needs. What is on the GPU when is decided by the table of
`residency`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastppo.config import GenerateConfig
from fastppo.distributed import uses
from fastppo.planner.memory import (
    Batch,
    Bytes,
    Change,
    Places,
    Role,
    Share,
    asking_needs,
    buffers,
    in_microbatch,
    model_states,
    prefetch,
    prompts_of,
    recording_holds,
    rows_of,
    sampling_needs,
)
from fastppo.planner.vllm_memory import samples_with_vllm, streaming_needs

PHASES = ("sampling", "feedback")
SAMPLED = "model"  # the name of the model that responses are drawn from; all others score


def shares(roles: list[Role], config: GenerateConfig, ranks: int) -> list[Share]:
    """Every model in both phases on one rank, with prompts and responses as long as they may be."""
    batch, table = batch_of(config, ranks), uses(loss_reads_reference=False)
    found = []
    for phase in PHASES:
        for role in roles:
            sampled = role.name == SAMPLED
            used = ("sampled" if sampled else "rewards") in table[phase]
            places = _weights(role, config, ranks, sampled=sampled, used=used)
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


def _weights(role: Role, config: GenerateConfig, ranks: int, *, sampled: bool, used: bool) -> Places:
    """Its weights: those of a model that waits for its phase are in the host's memory, where there is a GPU."""
    states = model_states(role, replace(config, rewards_on="gpu") if sampled else config, ranks)
    states += Places() if sampled else buffers(role, config, ranks)
    if used or role.size.on_cpu:
        return states
    live = role.size.largest * role.size.bytes if config.zero.stage == 3 and not sampled else 0
    waiting = Bytes(weights=states.gpu.weights - live)  # nothing is gathered while it waits
    return replace(states, gpu=Bytes(), host=states.host + waiting)


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
