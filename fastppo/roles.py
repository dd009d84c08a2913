"""The cast of a run: who is trained, by which engine, and who is only asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.batch import Packed
from fastppo.config import Config, RewardTrainingConfig, SFTConfig
from fastppo.engine import Engine, World
from fastppo.examples import Examples
from fastppo.load import load_learner, load_policies, load_scorer
from fastppo.models import Backbone, Policy
from fastppo.trunk import TrunkStates


@dataclass(frozen=True)
class Roles:
    """Actor, critic and reference. Reward models belong to `fastppo.feedback`."""

    actor: Engine  # of a Policy
    critic: Engine | None  # of a Critic; None: the value head on the actor's backbone
    reference: Policy
    tokenizer: PreTrainedTokenizerBase

    @property
    def engines(self) -> dict[str, Engine]:
        """Those that train, by the role's name."""
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def policy(self) -> Policy:
        """The actor's module, to sample from and to export."""
        policy: Policy = self.actor.module
        return policy

    @property
    def context(self) -> int | None:
        """The longest sequence that the actor takes, in tokens; None if its config does not tell."""
        return _context(self.policy)


def assemble(config: Config, world: World) -> Roles:
    """Load the models of a run and put an engine under each that is trained."""
    policy, critic, reference, tokenizer = load_policies(config, world.device)
    value_head = [] if policy.value_head is None else list(policy.value_head.parameters())
    actor = Engine(policy, [list(policy.model.parameters()), value_head], config.optim, config.zero)
    trained_critic = None if critic is None else Engine(critic, [list(critic.parameters())], config.optim, config.zero)
    return Roles(actor, trained_critic, reference, tokenizer)


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
    def context(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None if its config does not tell."""
        return _context(self.model)

    @property
    def bytes_of_state(self) -> int:
        """Of one token's hidden state."""
        return int(self.model.model.config.get_text_config().hidden_size) * self.model.model.dtype.itemsize

    def select(self, examples: Examples, part: Tensor, trunk: TrunkStates) -> tuple[Packed, Tensor | None]:
        """The sequences of these examples on the device, and what the trunk hands up for them."""
        sequences = examples.sequences(part)
        packed = examples.packed.select(sequences).to(self.model.device)
        return packed, trunk(self.model, packed, sequences)


def assemble_scorer(config: RewardTrainingConfig, world: World) -> Learner:
    """Load a reward model that is to be trained and put an engine under it."""
    model, tokenizer = load_scorer(config.model, config.optim, config.seed, world.device)
    head = {id(parameter) for parameter in model.head.parameters()}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in head]
    return Learner(Engine(model, [backbone, list(model.head.parameters())], config.optim, config.zero), tokenizer)


def assemble_learner(config: SFTConfig, world: World) -> Learner:
    """Load a language model that is to be trained and put an engine under it."""
    model, tokenizer = load_learner(config.model, config.optim, world.device)
    return Learner(Engine(model, [list(model.parameters())], config.optim, config.zero), tokenizer)


def _context(role: Backbone) -> int | None:
    return getattr(role.model.config.get_text_config(), "max_position_embeddings", None)
