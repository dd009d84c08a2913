"""Settings of the roles: the initial weights of each, and which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

AttentionSetting = Literal["auto", "flash", "varlen", "sdpa"]


@dataclass(frozen=True)
class LayersConfig:
    """How every model of the run is computed: actor, critic, reference, reward models."""

    fused: bool = True
    """Whether RMSNorm with the residual before it, rotary positions and gated activations (SwiGLU, GeGLU) are computed by
    one kernel each, forward and backward, in every layer that computes them; the log says which. On CPUs where oneDNN is
    faster it computes the fp32 products of linear layers. `false`: as transformers computes them."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen weights (Hu et al., 2021). There is no dropout: it would change the policy at every
    call, and the ratios would have no meaning."""

    rank: int = 0
    """Rank of the adapters; 0: no LoRA. Their learning rate is the role's `lr`, usually ten times that of full weights."""
    alpha: float = 16.0
    """The output of the adapters is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Linear layers that get an adapter: `all-linear`, or comma-separated names (`q_proj,v_proj`) or patterns
    (`*.mlp.*`). Layers whose weights the role's `train` does not select get none."""

    @property
    def exports_adapters(self) -> bool:
        """Whether adapters are exported alone, else merged into the weights."""
        return False


@dataclass(frozen=True)
class ActorLoraConfig(LoraConfig):
    """LoRA for the actor. The reference is then the actor with its adapters turned off."""

    export: Literal["merged", "adapters"] = "merged"
    """What is written to `output`/actor: a `merged` model, or only the `adapters`, for peft."""

    @property
    def exports_adapters(self) -> bool:
        return self.export == "adapters"


@dataclass(frozen=True)
class ActorConfig:
    """The policy that is trained. The frozen reference is a second copy of its initial weights; with LoRA there is no
    second copy."""

    model: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; its weights are dequantized when they are loaded."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: int | str = "all"
    """Parameters to train: `all`, an integer k for the last k layers, or comma-separated name patterns (`*.mlp.*`). With
    LoRA: the layers that may have adapters."""
    lr: float = 3e-6
    """Peak learning rate of the actor."""
    average: float | None = None
    """Decay per update of an exponential moving average of the actor's weights, for example 0.99. The average is
    evaluated (`eval/average/...`) and exported to `output`/actor-average in addition to the actor. Default: no average."""
    lora: ActorLoraConfig = field(default_factory=ActorLoraConfig)


@dataclass(frozen=True)
class CriticConfig:
    """The value function V(s): one value for each response token."""

    kind: Literal["auto", "separate", "shared", "none"] = "auto"
    """`separate`: a second model; `shared`: a value head on the actor's backbone (one engine, less memory); `none`: no
    critic, for an estimator that reads no values; `auto`: `none` for these, `separate` otherwise."""
    model: str | None = None
    """Initial weights of a separate critic: hub name, directory or `package:NAME`; it must have the actor's tokenizer.
    From the `critic` of another run, or any token classifier with one label, V starts as its logits; from a reward model
    as its score; from a language model as zero. Default: the actor's initial weights."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`."""
    train: int | str = "all"
    """Parameters of a separate critic to train, in the form of `actor.train`. The value head is always trained."""
    lr: float = 3e-6
    """Peak learning rate of a separate critic, or of the value head of a shared one."""
    warmup_steps: int = 0
    """Number of PPO steps at the start that train only the critic (shared: only the value head), on the discounted sum of
    the rewards to come, whatever lambda is (value pretraining; Yuan et al., 2025)."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model from which the KL penalty measures the actor's distance."""

    model: str | None = None
    """Hub name, directory or `package:NAME`; it must have the actor's tokenizer. Default: the actor's initial
    weights."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`."""
