"""The settings of a run, as frozen dataclasses.

Each field is documented by the string below it; `--help` shows that string. A field that holds a quantity
names its unit. `fastppo.config.validation.validate` refuses settings that cannot work together, before a model loads.
"""

from fastppo.config.data import DataConfig, PtxConfig, SamplingConfig
from fastppo.config.health import AlarmConfig, HealthConfig
from fastppo.config.learning import OptimConfig, PPOConfig, ZeroConfig
from fastppo.config.models import ActorConfig, ActorLoraConfig, CriticConfig, LoraConfig, ReferenceConfig
from fastppo.config.offline import (
    AnswersConfig,
    ExamplesConfig,
    HeldOutConfig,
    ModelConfig,
    PairsConfig,
    RewardTrainingConfig,
    SFTConfig,
)
from fastppo.config.ppo import AnyConfig, Config
from fastppo.config.rewards import RewardConfig
from fastppo.config.run import CheckpointConfig, EvalConfig, TrackConfig
from fastppo.errors import ConfigError

__all__ = [
    "ActorConfig",
    "ActorLoraConfig",
    "AlarmConfig",
    "AnswersConfig",
    "AnyConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "ExamplesConfig",
    "HealthConfig",
    "HeldOutConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "PairsConfig",
    "PtxConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardTrainingConfig",
    "SFTConfig",
    "SamplingConfig",
    "TrackConfig",
    "ZeroConfig",
]
