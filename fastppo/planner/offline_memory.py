"""Bytes that the model of a stage before PPO holds while it learns and while it is evaluated, as `memory` has it."""

from __future__ import annotations

from fastppo.config import RewardTrainingConfig, SFTConfig
from fastppo.planner.footprint import Footprint
from fastppo.planner.memory import (
    Batch,
    Bytes,
    Member,
    Places,
    Share,
    asking_needs,
    buffers,
    learning_needs,
    model_states,
    prefetch,
    reducing,
)

StageConfig = RewardTrainingConfig | SFTConfig


def stage_shares(member: Member, config: StageConfig, ranks: int) -> list[Share]:
    """The model in both on one rank, where every example is as long as it may be. Nothing leaves the GPU in between."""
    states = model_states(member, config, ranks) + buffers(member, config, ranks)
    kept = Places(gpu=Bytes(buffers=_kept(member.size, config)))
    head = isinstance(config, SFTConfig)
    learning = learning_needs(member, _batch(config, config.batch_size // ranks), head=head)
    asking = asking_needs(member, _batch(config, config.eval.examples or config.batch_size), head=head)
    return [
        Share(member.name, "learning", states + reducing(member, config, ranks) + kept + Places(gpu=learning)),
        Share(member.name, "evaluation", states + prefetch(member, config) + kept + Places(gpu=asking)),
    ]


def _batch(config: StageConfig, examples: int) -> Batch:
    """A microbatch of so many examples that a rank has, spread evenly as `microbatch.pack_even` does it."""
    each, length = _example(config)
    fit = max(config.microbatch_tokens // (each * length), 1)
    sequences = each * -(-examples // -(-examples // fit))
    # A score comes from the last token alone, a loss from every token of a response, which may be nearly all.
    responses = sequences * (length if isinstance(config, SFTConfig) else 1)
    return Batch(sequences, length, responses)


def _example(config: StageConfig) -> tuple[int, int]:
    """Sequences of an example, and the longest of them in tokens."""
    return 2 if isinstance(config, RewardTrainingConfig) else 1, config.data.max_tokens


def _kept(size: Footprint, config: StageConfig) -> int:
    """The most that may be kept of what a frozen prefix hands up, for the training examples and for those held out.

    How many there are is known once they are read; `limit` and `steps` bound it, and so does `keep_trunk_gb`.
    """
    if not size.prefix or config.zero.stage == 3:
        return 0
    each, length = _example(config)
    most, example = int(config.keep_trunk_gb * 1e9), each * length * size.width * size.bytes
    bounds = (config.data.limit, None if config.steps is None else config.steps * config.batch_size)
    trained = min((example * count for count in bounds if count is not None), default=most)
    return min(trained, most) + min(example * config.eval.examples, most)
