"""The algorithm, the optimizer, and how the models are spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PPOConfig:
    """The algorithm (Schulman et al., 2017; Stiennon et al., 2020). Counts are global, over all ranks."""

    batch_size: int = 512
    """Responses in each PPO step."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 1
    """Updates in each epoch."""
    microbatch_tokens: int = 8192
    """Token budget (prompt and response) of one forward and backward pass on one rank; the update does not depend on
    it."""
    estimator: str = "gae"
    """Estimator of the advantages: gae, or a function of your own as `module:function` or `file.py:function`."""
    gamma: float = 1.0
    """Discount, in [0, 1]."""
    lam: float = 0.95
    """GAE's lambda, in [0, 1] (Schulman et al., 2016)."""
    whiten_advantages: bool = True
    """Bring the advantages of the global batch to mean 0 and variance 1."""
    loss: str = "clip"
    """Loss of the policy: clip, or a function of your own as `module:function` or `file.py:function`. Entropy bonus and KL
    term stand beside it."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of tokens with negative advantage (Ye et al., 2020), off when left out."""
    entropy_coef: float = 0.0
    """Entropy bonus in the loss, per token."""
    value_coef: float = 0.1
    """Factor of the value loss; matters where actor and critic share a backbone."""
    value_clip: float | None = 0.2
    """The new value may move this far from the old one before its gradient stops; off when null."""
    kl_coef: float = 0.05
    """Coefficient beta of the KL penalty to the reference, the starting value if adaptive."""
    kl_kind: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Estimator per token: k1, k2, k3 (Schulman, 2020) or the exact sum over the vocabulary."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty acts: in each token's reward, or as a term of the loss."""
    kl_target: float | None = None
    """KL (k1, summed over a response, in nats) that an adaptive beta steers to (Ziegler et al., 2019); beta is fixed
    when left out."""
    kl_horizon: float = 10_000.0
    """Responses over which the adaptive beta reacts."""
    truncation_penalty: float = 0.0
    """Subtracted from the score of a response that was cut at `max_new_tokens`, after normalising and clipping."""
    bootstrap_truncated: bool = False
    """Add V after the last token of a response that was cut, for dense rewards; refused with a score on the last
    token."""
    score_normalise: bool = False
    """Bring scores to mean 0 and standard deviation 1 over all scores of the run so far, before they are clipped."""
    score_clip: float | None = None
    """Clip scores to [-score_clip, score_clip], off when left out."""
    length_limit: int | None = None
    """Soft limit of a response, in tokens; what is beyond it costs `length_penalty` a token. Off when left out."""
    length_penalty: float = 0.0
    """Subtracted from the score for each token beyond `length_limit`."""

    @property
    def loss_reads_reference(self) -> bool:
        """Whether the reference's logits are computed again in learning, as the exact KL in the loss needs them."""
        return self.kl_in == "loss" and self.kl_kind == "exact"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and what surrounds it. Learning rates stand with actor and critic."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Type of weights and activations; with bf16 the optimizer keeps fp32 master weights."""
    warmup_steps: int = 0
    """Updates over which a learning rate rises from 0: of the actor, its first ones, after `critic.warmup_steps`."""
    schedule: Literal["linear", "constant"] = "linear"
    """`linear` falls to 0 at the end of the run."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moments."""
    eps: float = 1e-5
    """Adam's epsilon, added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov and Hutter, 2019)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 is off."""
    max_skipped: int = 5
    """Updates in a row that may be passed over because their loss or gradient is not finite; then the run stops."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


Place = Literal["none", "cpu", "nvme"]  # where a role's states rest when they are not in use; none: on the GPU


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what the ranks share out, and what leaves the GPU."""

    stage: Literal[0, 1, 2, 3] = 1
    """What the ranks share out. 0: nothing, for fp32 alone; 1: optimizer states; 2: gradients too; 3: parameters too,
    of all roles."""
    offload: Place = "none"
    """Where optimizer states and, at stage 3, parameters are kept when not in use: on the GPU, in the host's memory or
    on NVMe. The three settings below change parts of it."""
    offload_optimizer: Place | None = None
    """The same for the optimizer states of actor and critic, which are then updated by the CPU; as `offload` when left
    out."""
    offload_parameters: Place | None = None
    """The same for the parameters of actor and critic, at stage 3; as `offload` when left out."""
    offload_frozen: Place | None = None
    """The same for the parameters of reference and reward models, at stage 3; as `offload` when left out."""
    nvme_path: str | None = None
    """Folder on a local NVMe drive, for what is offloaded to nvme. Each rank reads and writes its own part there."""
    deepspeed: str | None = None
    """A DeepSpeed configuration (a JSON file) for what has no setting here, such as bucket sizes; `auto` stands for
    the value that follows from the settings, and a value that contradicts them is refused."""

    @property
    def optimizer_on(self) -> Place:
        """Where the optimizer states of trained roles rest."""
        return self.offload if self.offload_optimizer is None else self.offload_optimizer

    @property
    def parameters_on(self) -> Place:
        """Where the parameters of trained roles rest."""
        return self._at_stage_3(self.offload_parameters)

    @property
    def frozen_on(self) -> Place:
        """Where the parameters of reference and reward models rest."""
        return self._at_stage_3(self.offload_frozen)

    def _at_stage_3(self, own: Place | None) -> Place:
        if own is None:
            return self.offload if self.stage == 3 else "none"
        return own
