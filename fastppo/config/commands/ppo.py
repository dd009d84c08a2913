"""The settings of a PPO run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fastppo.config.commands.generate import GenerateConfig
from fastppo.config.commands.offline import OfflineConfig
from fastppo.config.commands.online import OnlineConfig
from fastppo.config.data import SAMPLER_ROUNDING, PPORolloutConfig, PPOSamplingConfig, PtxConfig
from fastppo.config.learning import IMPORTANCE_BOUNDS, Importance, PPOConfig
from fastppo.config.models import CriticConfig
from fastppo.config.run import Names


@dataclass(frozen=True)
class Config(OnlineConfig):
    """fastppo: PPO for language models."""

    names: ClassVar[Names] = Names("ppo.batch_size", "ppo.microbatch_tokens", "actor.lr and critic.lr")
    rounding: ClassVar[tuple[str, ...]] = ("ppo.microbatch_tokens", *SAMPLER_ROUNDING)

    output: str = "runs/ppo"
    """Folder of the run: config, metrics, samples, and the trained actor in `output`/actor, the critic in
    `output`/critic."""
    steps: int = 100
    """Number of PPO steps. Each step has one batch: sampling, feedback and learning."""
    sampling: PPOSamplingConfig = field(default_factory=PPOSamplingConfig)
    rollout: PPORolloutConfig = field(default_factory=PPORolloutConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)

    @property
    def value_function(self) -> CriticConfig | None:
        kind = self.critic.kind
        if kind == "auto":
            kind = "separate" if self.ppo.rule.critic else "none"
        return None if kind == "none" else replace(self.critic, kind=kind)

    @property
    def critic_steps(self) -> int:
        """How many steps at the start train the critic alone."""
        return 0 if self.value_function is None else self.critic.warmup_steps

    @property
    def microbatch_tokens(self) -> int:
        return self.ppo.microbatch_tokens

    @property
    def drawn_together(self) -> int:
        return self.ppo.batch_size

    @property
    def sampled_ahead(self) -> int:
        return self.ppo.steps_ahead

    @property
    def in_flight_together(self) -> int:
        return self.ppo.batch_size if self.rollout.partial_tokens is not None else 0

    @property
    def earlier_policies(self) -> bool:
        return self.ppo.steps_ahead > 0 or self.rollout.partial_tokens is not None

    @property
    def learned_together(self) -> int:
        return self.ppo.batch_size // self.ppo.minibatches

    @property
    def exact_kl(self) -> bool:
        return self.ppo.kl_kind == "exact"

    @property
    def loss_reads_reference(self) -> bool:
        return self.ppo.loss_reads_reference

    @property
    def mixed_in(self) -> tuple[int, int] | None:
        return (self.ptx.batch_size, self.ptx.max_tokens) if self.ptx.coef else None

    @property
    def other_sampler(self) -> list[str]:
        """The settings, with their values, for which `ppo.importance: auto` weights tokens."""
        sampling, engine, partial = self.sampling, self.rollout.engine, self.rollout.partial_tokens
        another = {
            f"sampling.top_p {sampling.top_p}": sampling.top_p < 1.0,
            f"sampling.top_k {sampling.top_k}": sampling.top_k > 0,
            f"rollout.engine {engine}": engine != "inprocess",
            f"rollout.partial_tokens {partial}": partial is not None,
            f"ppo.steps_ahead {self.ppo.steps_ahead}": self.ppo.steps_ahead > 0,
        }
        return [setting for setting, is_another in another.items() if is_another]

    @property
    def importance(self) -> Importance:
        """`ppo.importance` with what `auto` stands for, and the bounds."""
        ppo = self.ppo
        kind = ppo.importance
        if kind == "auto":
            kind = "token" if self.other_sampler else "none"
        low, high = IMPORTANCE_BOUNDS[kind]
        return Importance(
            kind,
            low if ppo.importance_low is None else ppo.importance_low,
            high if ppo.importance_high is None else ppo.importance_high,
        )

    @property
    def done_before(self) -> dict[str, tuple[Any, Any]]:
        return super().done_before | {"ppo.importance": ("none", self.importance.kind)}

    @property
    def settled(self) -> dict[str, Any]:
        critic = self.value_function
        return super().settled | {
            "critic.kind": "none" if critic is None else critic.kind,
            "ppo.whiten_advantages": self.ppo.whitens,
            "ppo.aggregate": self.ppo.aggregation,
        }

    @property
    def learns_as_measured(self) -> bool:
        return True

    @property
    def data_paths(self) -> dict[str, str]:
        return super().data_paths | ({"ptx.path": self.ptx.path} if self.ptx.path else {})


TrainingConfig = OnlineConfig | OfflineConfig  # the settings of a command that trains
AnyConfig = TrainingConfig | GenerateConfig  # the settings of a command
