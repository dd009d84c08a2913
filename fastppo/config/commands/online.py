"""Settings of methods whose model learns from responses of its own, and of whatever draws responses and scores them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

from fastppo.config.data import SAMPLER_ROUNDING, SAMPLER_SPEED, DataConfig, RolloutConfig, SamplingConfig
from fastppo.config.health import HealthConfig
from fastppo.config.learning import Dtype, OptimConfig, ParallelConfig, ZeroConfig
from fastppo.config.models import ActorConfig, AttentionSetting, CriticConfig, LayersConfig, ReferenceConfig
from fastppo.config.rewards import RewardConfig
from fastppo.config.run import CheckpointConfig, EvalConfig, Names, TrackConfig


class ResponseSettings(Protocol):
    """What rollout engines and sources of reward read of a run's settings, whatever the run does with the responses."""

    judge_setting: ClassVar[str]  # the name of `judge` in messages

    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def rewards(self) -> tuple[RewardConfig, ...]: ...
    @property
    def judge(self) -> tuple[RewardConfig, ...]: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def zero(self) -> ZeroConfig: ...
    @property
    def timeout(self) -> float: ...
    @property
    def microbatch_tokens(self) -> int:
        """Maximum number of tokens that a rank reads at once."""


@dataclass(frozen=True)
class OnlineConfig:
    """The settings that online methods share: an actor samples, sources score, and the actor learns."""

    names: ClassVar[Names] = Names("batch_size", "microbatch_tokens", "actor.lr")
    judge_setting: ClassVar[str] = "health.judge"
    # Settings that may change when a run is resumed: what comes out does not depend on them, or (health) a user whose
    # run an alarm has ended may think better of it ...
    free: ClassVar[tuple[str, ...]] = (
        *("actor.lora.export", *SAMPLER_SPEED, "eval.every", "eval.show"),
        *("health.alarms", "health.window", "health.raise_kl", "health.roll_backs"),
    )
    rounding: ClassVar[tuple[str, ...]] = SAMPLER_ROUNDING  # ... and that only round otherwise

    output: str = "runs/online"
    """Folder of the run: config, metrics, samples, and the trained actor in `output`/actor."""
    seed: int = 1
    """Seed of data order, sampling and minibatches, and of the random generators that a reward function may use."""
    steps: int = 100
    """Number of steps."""
    resume: str | None = None
    """`auto`: continue from the newest complete checkpoint in `output`, or start a new run if there is none; a path:
    continue from that checkpoint of `output`; null: start a new run, and rename the folder of an earlier run in
    `output`."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores divided by its ranks."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the other ranks before it ends with an error. It must exceed the largest difference
    in time between ranks in any phase of a step."""
    attention: AttentionSetting = "auto"
    """The implementation of attention in every role: `flash` uses flash-attn and `varlen` torch's varlen_attn (both CUDA,
    bf16), `sdpa` uses PyTorch; `auto` uses the first of these that can compute it, which is logged."""
    plan: Literal["check", "warn", "off"] = "check"
    """Whether to compute and show, before the models are loaded, the memory that each role needs in each phase. `check`
    stops a run that does not fit, `warn` warns and continues, `off` skips the computation."""
    model: LayersConfig = field(default_factory=LayersConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """Sources of reward; their weighted sum is the score, to which `rollout.environment` adds its rewards for turns.
    Required, but with an environment."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def judge(self) -> tuple[RewardConfig, ...]:
        return self.health.judge

    @property
    def sequence_ranks(self) -> int:
        """Ranks that read each row of whole sequences together."""
        return self.parallel.sequence

    def with_dtype(self, dtype: Dtype) -> Self:
        """These settings with another `optim.dtype`."""
        return replace(self, optim=replace(self.optim, dtype=dtype))

    @property
    def done_before(self) -> dict[str, tuple[Any, Any]]:
        """Settings that do by default what runs did not do before there was the setting: by name, what was done then and
        what these settings do."""
        return {"model.fused": (False, self.model.fused)}

    @property
    def settled(self) -> dict[str, Any]:
        """Settings that may be left to others, by name, with what they then are."""
        return {}

    @property
    def value_function(self) -> CriticConfig | None:
        """None for a method without a critic."""
        return None

    @property
    def trained(self) -> dict[str, ActorConfig | CriticConfig]:
        """What trains, by the name of its settings; a value head on the actor's backbone is part of the actor."""
        critic = self.value_function
        return {"actor": self.actor} | ({"critic": critic} if critic is not None and critic.kind == "separate" else {})

    @property
    def microbatch_tokens(self) -> int:
        raise NotImplementedError

    @property
    def drawn_together(self) -> int:
        """Responses of all ranks that are sampled, scored and measured at once."""
        raise NotImplementedError

    @property
    def drawn_in_a_step(self) -> int:
        """Responses of all ranks that a step samples, perhaps in several batches."""
        return self.drawn_together

    @property
    def sampled_ahead(self) -> int:
        """How many steps before it is learned from a batch is sampled."""
        return 0

    @property
    def in_flight_together(self) -> int:
        """The most responses of all ranks that go on from one step to the next; they are sampled beside a batch."""
        return 0

    @property
    def earlier_policies(self) -> bool:
        """Whether tokens may be from policies before the one that learns from them."""
        return False

    @property
    def learned_together(self) -> int:
        """Responses of all ranks in an update."""
        raise NotImplementedError

    @property
    def mixed_in(self) -> tuple[int, int] | None:
        """Given texts that an update learns from beside responses: how many, and the most tokens of one."""
        return None

    @property
    def exact_kl(self) -> bool:
        """Whether the KL to the reference is that over the whole vocabulary, and not estimated from sampled tokens."""
        return False

    @property
    def loss_reads_reference(self) -> bool:
        """Whether the reference is asked again in learning."""
        return False

    @property
    def learns_as_measured(self) -> bool:
        """Whether responses are measured in the microbatches in which they are learned from. The outputs of frozen lower
        layers are then kept from the one to the other."""
        return False

    @property
    def batches(self) -> tuple[int, ...]:
        """Sizes of what ranks share evenly in an update."""
        return (self.learned_together, *([] if self.mixed_in is None else [self.mixed_in[0]]))

    @property
    def data_paths(self) -> dict[str, str]:
        """Where the data of a run is, by setting."""
        return {"data.path": self.data.path}
