"""The settings of a PPO run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastppo.config.commands.offline import OfflineConfig
from fastppo.config.data import DataConfig, PtxConfig, RolloutConfig, SamplingConfig
from fastppo.config.health import HealthConfig
from fastppo.config.learning import OptimConfig, PPOConfig, ZeroConfig
from fastppo.config.models import ActorConfig, CriticConfig, ReferenceConfig
from fastppo.config.rewards import RewardConfig
from fastppo.config.run import CheckpointConfig, EvalConfig, Names, TrackConfig


@dataclass(frozen=True)
class Config:
    """fastppo: PPO for language models."""

    names: ClassVar[Names] = Names("ppo.batch_size", "ppo.microbatch_tokens", "actor.lr and critic.lr")
    # Settings that may change when a run is resumed: what comes out does not depend on them, or (health) a user whose
    # run an alarm has ended may think better of it ...
    free: ClassVar[tuple[str, ...]] = (
        *("actor.lora.export", "sampling.cuda_graphs", "eval.every", "eval.show"),
        *("health.alarms", "health.window", "health.raise_kl", "health.roll_backs"),
    )
    rounding: ClassVar[tuple[str, ...]] = (
        "ppo.microbatch_tokens",
        "sampling.rows",
    )  # ... and that only round otherwise
    # of a run on another number of ranks
    new_start: ClassVar[str] = "actor's weights (--actor.model, with the first actor as --reference.model)"

    output: str = "runs/ppo"
    """Folder of the run: config, metrics, samples, and the trained actor in `output`/actor."""
    seed: int = 1
    """Seed of data order, sampling and minibatches, and of the random generators that a reward function may use."""
    steps: int = 100
    """Number of PPO steps. Each step has one batch: sampling, feedback and learning."""
    resume: str | None = None
    """`auto`: continue from the newest complete checkpoint in `output`, or start a new run if there is none; a path:
    continue from that checkpoint of `output`; null: start a new run, and rename the folder of an earlier run in
    `output`."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores divided by its ranks."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the other ranks before it ends with an error. It must exceed the largest difference
    in time between ranks in any phase of a step."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """The implementation of attention in every role: `flash` uses flash-attn (CUDA, bf16), `sdpa` uses PyTorch; `auto`
    uses flash-attn where possible and PyTorch otherwise, which is logged."""
    plan: Literal["check", "warn", "off"] = "check"
    """Whether to compute and show, before the models are loaded, the memory that each role needs in each phase. `check`
    stops a run that does not fit, `warn` warns and continues, `off` skips the computation."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """Sources of reward; their weighted sum is the score. Required."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def trained(self) -> dict[str, ActorConfig | CriticConfig]:
        """What trains, by the name of its settings; a value head on the actor's backbone is part of the actor."""
        own = {"critic": self.critic} if self.critic.kind == "separate" else {}
        return {"actor": self.actor, **own}

    @property
    def batches(self) -> tuple[int, ...]:
        """Sizes of what ranks share evenly in an update."""
        return (self.ppo.batch_size // self.ppo.minibatches, *([self.ptx.batch_size] if self.ptx.coef else []))

    @property
    def data_paths(self) -> dict[str, str]:
        """Where the data of a run is, by setting."""
        return {"data.path": self.data.path} | ({"ptx.path": self.ptx.path} if self.ptx.path else {})


AnyConfig = Config | OfflineConfig  # the settings of a command
