"""The roles of an online run: which are trained, by which engine, and which are frozen."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastppo.config import OnlineConfig
from fastppo.distributed import Engine, Frozen, Gradients, Placement, Residency, Saved, World, check_nvme, uses
from fastppo.models.attention import choose_attention
from fastppo.models.average import Average
from fastppo.models.layers.fuse import choose_layers
from fastppo.models.loading.policies import load_policies
from fastppo.models.loading.weights import DTYPES
from fastppo.models.parallel.group import choose_group
from fastppo.models.roles import Critic, Policy, attention_ratio
from fastppo.models.sampling_weights import SamplingWeights


@dataclass(frozen=True)
class Roles:
    """Actor, critic and reference. Reward models belong to `fastppo.rewards`."""

    actor: Engine  # of a Policy
    critic: Engine | None  # of a Critic; None: the value head on the actor's backbone, or no critic at all
    reference: Frozen  # of a Policy
    sampling_weights: SamplingWeights  # the actor with whole weights, to sample from and to export
    tokenizer: PreTrainedTokenizerBase
    residency: Residency
    average: Average | None  # of the actor's weights

    @property
    def saved(self) -> dict[str, Saved]:
        """The parts of a run that checkpoints contain, by name."""
        parts: dict[str, Saved | None] = {"actor": self.actor, "critic": self.critic, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def policy(self) -> Policy:
        """The actor module. At ZeRO stage 3 its weights are partitioned; `sampling_weights.gather()` has whole ones."""
        policy: Policy = self.actor.module
        return policy

    @property
    def value_role(self) -> Critic | Policy | None:
        """The module with the value head: the critic's, the actor's where it is shared; None without a critic.

        At ZeRO stage 3 its weights are partitioned.
        """
        if self.critic is not None:
            critic: Critic = self.critic.module
            return critic
        return None if self.policy.value_head is None else self.policy

    @property
    def version(self) -> int:
        """A number that is another one after each change of the actor's weights."""
        return self.actor.version + (0 if self.average is None else self.average.version)

    @property
    def attention(self) -> float:
        """The work of attention over that of the actor's weights, for balanced microbatches (`attention_ratio`)."""
        return attention_ratio(self.policy.model)


def assemble(
    config: OnlineConfig, world: World, tokenizer: PreTrainedTokenizerBase, placement: Placement | None = None
) -> Roles:
    """Load the models of a run and make an engine for each. tokenizer: from `load_actor_tokenizer`; placement: the
    plan's, without one each part is on the GPU only while it is used."""
    placement = placement or Placement(uses(loss_reads_reference=config.loss_reads_reference))
    zero, residency = config.zero, Residency(world.device, placement)
    check_nvme(zero)
    choose_attention(config.attention, DTYPES[config.optim.dtype], world.device)
    choose_group(world.sequence)
    choose_layers(fused=config.model.fused)
    policy, critic, reference = load_policies(config, world.device)
    value_head = [] if policy.value_head is None else list(policy.value_head.parameters())
    frozen = Frozen(reference, config.optim, zero)
    residency.add("reference", frozen, "reference")
    sampling_weights = SamplingWeights(policy, zero.stage)  # before the actor is passed to DeepSpeed
    residency.add("sampling_weights", sampling_weights, "actor")
    actor = Engine(policy, [list(policy.model.parameters()), value_head], config.optim, zero)
    _add_learned(actor, "actor", residency)
    trained_critic = None if critic is None else Engine(critic, [list(critic.parameters())], config.optim, zero)
    if trained_critic is not None:
        _add_learned(trained_critic, "critic", residency)
    average = None if config.actor.average is None else Average(policy, config.actor.average, world)
    return Roles(actor, trained_critic, frozen, sampling_weights, tokenizer, residency, average)


def _add_learned(engine: Engine, role: str, residency: Residency) -> None:
    """Everything that only the learning phase uses."""
    residency.add("optimizers", engine, role)
    residency.add("gradients", Gradients(engine), role)
