"""The cast of a run: who is trained, by which engine, and who is only asked."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config
from fastppo.engine import Engine, World
from fastppo.load import load_policies
from fastppo.models import Policy


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
        config = self.policy.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def assemble(config: Config, world: World) -> Roles:
    """Load the models of a run and put an engine under each that is trained."""
    policy, critic, reference, tokenizer = load_policies(config, world.device)
    value_head = [] if policy.value_head is None else list(policy.value_head.parameters())
    actor = Engine(policy, [list(policy.model.parameters()), value_head], config.optim, config.zero)
    trained_critic = None if critic is None else Engine(critic, [list(critic.parameters())], config.optim, config.zero)
    return Roles(actor, trained_critic, reference, tokenizer)
