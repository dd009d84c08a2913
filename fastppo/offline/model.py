"""The one model that an offline method trains, and DPO's reference: loaded, and with an engine under it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.config import DPOConfig, OfflineConfig
from fastppo.data import IDLE, Examples, Packed
from fastppo.distributed import Engine, Frozen, World, check_nvme
from fastppo.models import (
    DTYPES,
    Backbone,
    Policy,
    PrefixStates,
    RewardModel,
    choose_attention,
    choose_group,
    choose_layers,
    frozen_partitions,
    is_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    model_source,
    set_padding,
    trained_partitions,
    width_of,
)


@dataclass(frozen=True)
class AskedModel:
    """A model that is asked about examples."""

    engine: Engine | Frozen  # of a Policy or a RewardModel

    @property
    def role(self) -> Backbone:
        role: Backbone = self.engine.module
        return role

    @property
    def bytes_of_state(self) -> int:
        """Of one token's hidden state."""
        return width_of(self.role.model) * self.role.model.dtype.itemsize

    def select(self, examples: Examples, part: Tensor, prefix: PrefixStates) -> tuple[Packed, Tensor | None]:
        """The sequences of these examples on the device, and the output of the frozen prefix for them.

        Of no examples it is a sequence whose outputs are to be left out (`engine.even_passes`).
        """
        if not len(part):
            return IDLE.to(self.role.device), None
        sequences = examples.sequences(part)
        packed = examples.packed.select(sequences).to(self.role.device)
        return packed, prefix(self.role, packed, sequences)


@dataclass(frozen=True)
class TrainedModel(AskedModel):
    """The one model that an offline method trains."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase


def assemble_reference(config: DPOConfig, world: World) -> Frozen:
    """Load the reference of a run where it is a model of its own."""
    _prepare(config, world)
    policy = load_reference(config, world.device, frozen_partitions(config))
    return Frozen(policy, config.optim, config.zero)


def assemble(config: OfflineConfig, world: World, tokenizer: PreTrainedTokenizerBase) -> TrainedModel:
    """Load the model that `config.role` names and put an engine under it.

    tokenizer: its own; of a reward model it is set to pad with what the model is.
    """
    _prepare(config, world)
    load = load_policy if config.role == "policy" else load_reward_model
    role: Policy | RewardModel = load(config.model, config.optim, config.seed, world.device, trained_partitions(config))
    groups = [list(role.parameters())]
    if config.role == "reward model":
        set_padding(role.model, tokenizer, keep=is_reward_model(model_source(config.model)))
        head = list(role.head.parameters())
        ids = {id(parameter) for parameter in head}
        groups = [[parameter for parameter in role.parameters() if id(parameter) not in ids], head]
    return TrainedModel(Engine(role, groups, config.optim, config.zero), tokenizer)


def _prepare(config: OfflineConfig, world: World) -> None:
    check_nvme(config.zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    choose_group(world.sequence)
    choose_layers(fused=config.model.fused)
