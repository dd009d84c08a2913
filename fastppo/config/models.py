"""The roles: which weights each starts from, and what of them trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank on frozen weights (Hu et al., 2021). There is no dropout: a policy that drops at random is
    another policy at every call, and ratios would mean nothing."""

    rank: int = 0
    """Rank of the adapters; 0 is off. They learn at the role's `lr`, usually ten times what whole weights take."""
    alpha: float = 16.0
    """What the adapters add is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Which linear layers get an adapter: `all-linear`, or comma-separated names (`q_proj,v_proj`) or patterns
    (`*.mlp.*`); of these, those whose weights the role's `train` chooses."""

    @property
    def exports_adapters(self) -> bool:
        """Whether adapters are exported alone, else merged into the weights."""
        return False


@dataclass(frozen=True)
class ActorLoraConfig(LoraConfig):
    """The actor's adapters. The reference is then the actor with its adapters off."""

    export: Literal["merged", "adapters"] = "merged"
    """What is left in `output`/actor: a `merged` model, or the `adapters` alone, for peft."""

    @property
    def exports_adapters(self) -> bool:
        return self.export == "adapters"


@dataclass(frozen=True)
class ActorConfig:
    """The policy that is trained. The frozen reference is a second copy of its weights; with LoRA it needs none."""

    model: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; its weights are unpacked at load."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: int | str = "all"
    """Which parameters train: `all`, an integer k for the upper k layers, or comma-separated name patterns
    (`*.mlp.*`). With LoRA: where there are adapters."""
    lr: float = 3e-6
    """Peak learning rate of the actor."""
    average: float | None = None
    """Decay, for each update, of an exponential moving average of the actor's weights, 0.99 for example. It is
    evaluated (`eval/average/...`) and exported to `output`/actor-average beside the actor; off when left out."""
    lora: ActorLoraConfig = field(default_factory=ActorLoraConfig)


@dataclass(frozen=True)
class CriticConfig:
    """The value function V(s), one number for each response token."""

    kind: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own; `shared`: a value head on the actor's backbone (one engine, less memory)."""
    model: str | None = None
    """Weights of a separate critic: hub name, directory or `package:NAME`; the actor's when left out. It must share the
    actor's tokenizer."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""
    train: int | str = "all"
    """Which parameters of a separate critic train, as for the actor. The value head always trains."""
    lr: float = 3e-6
    """Peak learning rate of a separate critic, or of the value head of a shared one."""
    warmup_steps: int = 0
    """PPO steps at the start that train the critic alone (shared: the value head alone)."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that the KL penalty holds the actor to."""

    model: str | None = None
    """Hub name, directory or `package:NAME`; the actor's own starting weights when left out. It must share the
    actor's tokenizer."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""
