"""The one model of a stage before PPO: loaded, and with an engine under it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
)

from fastppo.config import RewardTrainingConfig, SFTConfig
from fastppo.data import IDLE, Examples, Packed
from fastppo.distributed import Engine, World, check_nvme
from fastppo.models import (
    DTYPES,
    Backbone,
    PrefixStates,
    choose_attention,
    load_learner,
    load_scorer,
    model_source,
    set_padding,
    starts_as_scorer,
    trained_partitions,
    width_of,
)

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class Learner:
    """The one model of a stage before PPO."""

    engine: Engine  # of a RewardModel or a Policy
    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> Backbone:
        model: Backbone = self.engine.module
        return model

    @property
    def bytes_of_state(self) -> int:
        """Of one token's hidden state."""
        return width_of(self.model.model) * self.model.model.dtype.itemsize

    def select(self, examples: Examples, part: Tensor, prefix: PrefixStates) -> tuple[Packed, Tensor | None]:
        """The sequences of these examples on the device, and what the frozen prefix hands up for them.

        Of no examples it is a sequence whose outputs are to be left out (`engine.even_passes`).
        """
        if not len(part):
            return IDLE.to(self.model.device), None
        sequences = examples.sequences(part)
        packed = examples.packed.select(sequences).to(self.model.device)
        return packed, prefix(self.model, packed, sequences)


def assemble_scorer(config: RewardTrainingConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> Learner:
    """Load a reward model that is to be trained and put an engine under it. tokenizer: its own, set to pad with."""
    check_nvme(config.zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    partitions = trained_partitions(config)
    model = load_scorer(config.model, config.optim, config.seed, world.device, partitions)
    set_padding(model.model, tokenizer, keep=starts_as_scorer(model_source(config.model)))
    head = {id(parameter) for parameter in model.head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in head]
    return Learner(Engine(model, [backbone, list(model.head.parameters())], config.optim, config.zero), tokenizer)


def assemble_learner(config: SFTConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> Learner:
    """Load a language model that is to be trained and put an engine under it. tokenizer: its own."""
    check_nvme(config.zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    partitions = trained_partitions(config)
    model = load_learner(config.model, config.optim, config.seed, world.device, partitions)
    return Learner(Engine(model, [list(model.parameters())], config.optim, config.zero), tokenizer)
