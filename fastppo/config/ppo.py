"""The settings of a PPO run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastppo.config.data import DataConfig, PtxConfig, RolloutConfig, SamplingConfig
from fastppo.config.health import HealthConfig
from fastppo.config.learning import OptimConfig, PPOConfig, ZeroConfig
from fastppo.config.models import ActorConfig, CriticConfig, ReferenceConfig
from fastppo.config.offline import RewardTrainingConfig, SFTConfig
from fastppo.config.rewards import RewardConfig
from fastppo.config.run import CheckpointConfig, EvalConfig, TrackConfig


@dataclass(frozen=True)
class Config:
    """fastppo: PPO for language models."""

    output: str = "runs/ppo"
    """Folder of the run: config, metrics, samples, and the trained actor in `output`/actor."""
    seed: int = 1
    """Seed of data order, sampling and minibatches, and of the generators that a reward function may draw from."""
    steps: int = 100
    """PPO steps: one batch each of sampling, feedback and learning."""
    resume: str | None = None
    """`auto`: go on from the newest whole checkpoint in `output`, or begin if there is none; a path: from that
    checkpoint of `output`; null: begin anew, an earlier run in `output` being moved aside."""
    threads: int | None = None
    """CPU threads of each rank; when left out, the machine's cores divided by the ranks on it."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it ends with an error; more than the slowest stage can differ
    between ranks."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """What computes attention, in every role: `flash` flash-attn (CUDA, bf16), `sdpa` PyTorch; `auto` flash-attn where
    it can be used and PyTorch elsewhere, which the log says."""
    plan: Literal["check", "warn", "off"] = "check"
    """Before models load, the memory that each role needs in each stage is computed and shown. `check` refuses a run
    that does not fit, `warn` says so and goes on, `off` leaves the computation out."""
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


AnyConfig = Config | RewardTrainingConfig | SFTConfig  # the settings of a command
