"""Bytes that the model of an offline method holds while it learns and while it is evaluated, as `memory` has it."""

from __future__ import annotations

from collections.abc import Iterator

from fastppo.config import OfflineConfig
from fastppo.distributed import Placement
from fastppo.planner.batch import Batch
from fastppo.planner.footprint import Footprint
from fastppo.planner.memory import (
    Bytes,
    Change,
    Places,
    Role,
    Share,
    asking_needs,
    buffers,
    learning_needs,
    model_states,
    prefetch,
    reducing,
)


def shares(roles: list[Role], config: OfflineConfig, ranks: int, _: Placement | None = None) -> list[Share]:
    """The one model in both phases on one rank, every example as long as it may be. All of it stays on the GPU.

    A model that is asked before it is loaded has a phase of its own.
    """
    role, *frozen = roles
    states = model_states(role, config, ranks) + buffers(role, config, ranks)
    kept = Places(gpu=Bytes(buffers=_kept_prefix_states(role.size, config)))
    head, groups = config.role == "policy", ranks // config.sequence_ranks
    learning = learning_needs(role, _batch(config, config.batch_size // groups), config.optim, head=head)
    asking = asking_needs(role, _batch(config, config.eval.examples or config.batch_size), head=head)
    return [
        *(Share(other.name, other.name, _asked_alone(other, config, ranks)) for other in frozen),
        Share(role.name, "learning", states + reducing(role, config, ranks, learning) + kept),
        Share(role.name, "evaluation", states + prefetch(role, config) + kept + Places(gpu=asking)),
    ]


def _asked_alone(role: Role, config: OfflineConfig, ranks: int) -> Places:
    """A frozen model while it is asked about training and held-out examples, in the microbatches of the other one."""
    groups = ranks // config.sequence_ranks
    batches = [_batch(config, config.batch_size // groups), _batch(config, config.eval.examples or config.batch_size)]
    needs = max((asking_needs(role, batch, head=True) for batch in batches), key=lambda amount: amount.total)
    return model_states(role, config, ranks) + prefetch(role, config) + buffers(role, config, ranks) + Places(gpu=needs)


def smaller_passes(config: OfflineConfig) -> Iterator[Change]:
    """Changes that need less memory in a pass, from the least to the most.

    A rule sees to it that a microbatch holds the longest example.
    """
    if config.keep_trunk_gb:
        yield {"keep_trunk_gb": 0}
    for part in (2, 4, 8):
        yield {"microbatch_tokens": config.microbatch_tokens // part}


def _batch(config: OfflineConfig, examples: int) -> Batch:
    """A microbatch of so many examples that a rank, or a group of ranks, has, spread evenly as `pack_even` does it."""
    each, length = config.sequences, config.data.max_tokens
    fit = max(config.microbatch_tokens // (each * length), 1)
    sequences = each * -(-examples // -(-examples // fit))
    # A score comes from the last token alone, a policy's loss from every token of a response, which may be nearly all.
    responses = sequences * (length if config.role == "policy" else 1)
    return Batch(sequences, length, responses, split=config.sequence_ranks)


def _kept_prefix_states(size: Footprint, config: OfflineConfig) -> int:
    """The largest number of bytes of cached outputs of the frozen prefix, for training and held-out examples.

    How many there are is known once they are read; `limit` and `steps` bound it, and so does `keep_trunk_gb`.
    """
    if not size.prefix or config.zero.stage == 3:
        return 0
    most = int(config.keep_trunk_gb * 1e9)
    example = config.sequences * config.data.max_tokens * size.width * size.bytes
    bounds = (config.data.limit, None if config.steps is None else config.steps * config.batch_size)
    trained = min((example * count for count in bounds if count is not None), default=most)
    return (min(trained, most) + min(example * config.eval.examples, most)) // config.sequence_ranks
