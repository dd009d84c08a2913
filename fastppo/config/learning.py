"""Settings of the algorithm, the optimizer, and ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ImportanceKind = Literal["none", "token", "sequence", "icepop"]
IMPORTANCE_BOUNDS: dict[ImportanceKind, tuple[float, float]] = {
    "none": (0.5, 5.0),  # weights nothing; the metric says what icepop would leave out
    "token": (0.0, 2.0),
    "sequence": (0.8, 1.25),
    "icepop": (0.5, 5.0),
}

Aggregate = Literal["token", "sequence", "constant"]
Dtype = Literal["auto", "fp32", "bf16"]  # `auto` is settled while the command line is read


class EstimatorRule(NamedTuple):
    """What an estimator of fastppo needs, and the settings that make it the one that was published."""

    critic: bool = False  # whether it reads a critic's values
    group: bool = False  # whether it compares a prompt's responses with each other
    outcome: bool = False  # whether a response has one advantage, from the sum of its rewards
    whiten: bool = False  # what `ppo.whiten_advantages: auto` is
    aggregate: Aggregate = "token"  # what `ppo.aggregate: auto` is


ESTIMATOR_RULES: dict[str, EstimatorRule] = {
    "gae": EstimatorRule(critic=True, whiten=True),
    "grpo": EstimatorRule(group=True, outcome=True, aggregate="sequence"),
    "dr_grpo": EstimatorRule(group=True, outcome=True, aggregate="constant"),
    "rloo": EstimatorRule(group=True, outcome=True),
    "reinforce++": EstimatorRule(whiten=True),
    "reinforce++_baseline": EstimatorRule(group=True, whiten=True),
}
OWN_ESTIMATOR = EstimatorRule(critic=True, whiten=True)  # a function of the user's


class Importance(NamedTuple):
    """How a token's policy loss is weighted where the sampler is not the trainer, and the bounds of its weight."""

    kind: ImportanceKind
    low: float
    high: float


@dataclass(frozen=True)
class PPOConfig:
    """The PPO algorithm (Schulman et al., 2017; Stiennon et al., 2020). Counts are over all ranks together."""

    batch_size: int = 512
    """Number of responses per PPO step."""
    epochs: int = 4
    """Number of passes over each batch."""
    steps_ahead: Literal[0, 1] = 0
    """How many steps ahead responses are sampled. 1: a step first samples the responses of the next one, from the policy
    that it is about to update; functions and services score them while it learns."""
    minibatches: int = 1
    """Number of updates per epoch."""
    microbatch_tokens: int = 8192
    """Maximum number of tokens (prompts and responses) in one forward and backward pass on one rank. The update does
    not depend on it."""
    estimator: str = "gae"
    """Estimator of the advantages: `gae` with a critic's values (Schulman et al., 2016); without a critic `grpo` (Shao et
    al., 2024), `dr_grpo` (Liu et al., 2025) and `rloo` (Ahmadian et al., 2024), which compare a prompt's responses,
    `reinforce++`, which compares all of the batch, and `reinforce++_baseline`, which does both (Hu et al., 2025); or your
    own function as `module:function` or `file.py:function`."""
    gamma: float = 1.0
    """Discount factor, in [0, 1]; 1 for grpo, dr_grpo and rloo, which see the sum of a response's rewards."""
    lam: float | Literal["adaptive"] = 0.95
    """GAE's lambda, in [0, 1] (Schulman et al., 2016); `adaptive`: max(0, 1 - 1 / (`lam_alpha` l)) for a response of l
    tokens (VAPO; Yue et al., 2025)."""
    lam_alpha: float = 0.05
    """With `lam: adaptive`: lambda is 0 for responses of up to 1 / lam_alpha tokens, and nearer to 1 for longer ones."""
    lam_critic: float | None = None
    """Lambda of the returns that the critic learns, in [0, 1]; 1, the sum of all rewards to come, in VC-PPO (Yuan et al.,
    2025) and VAPO. Default: that of the advantages."""
    whiten_advantages: bool | Literal["auto"] = "auto"
    """Normalise the advantages of the batch, over all ranks, to mean 0 and variance 1. `auto`: as the estimator was
    published; not for grpo, dr_grpo and rloo, which have a scale of their own."""
    loss: str = "clip"
    """Policy loss: `clip` (Schulman et al., 2017), `gspo`, which clips the ratio of whole responses (Zheng et al., 2025),
    `cispo`, which clips the weight of a token's gradient (MiniMax, 2025), or your own function as `module:function` or
    `file.py:function`. The entropy bonus and the KL term are added to any loss."""
    aggregate: Aggregate | Literal["auto"] = "auto"
    """How the tokens of a minibatch add up to its loss, entropy bonus and KL term. `token`: their mean; `sequence`: the
    mean over responses of the mean over a response's tokens; `constant`: their sum over the number of responses times
    `sampling.max_new_tokens`, by which no token counts less for standing in a longer response. `auto`: as it was
    published: `sequence` for grpo and for gspo, `constant` for dr_grpo, `token` otherwise."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low, by clip and cispo."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high, by clip and cispo. A higher one than clip_low (DAPO's clip-higher; Yu et al.,
    2025) lets unlikely tokens become likelier."""
    gspo_clip_low: float = 3e-4
    """The ratio of a response, the geometric mean of its tokens' ratios, is clipped at 1 - gspo_clip_low."""
    gspo_clip_high: float = 4e-4
    """The ratio of a response is clipped at 1 + gspo_clip_high."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of tokens with negative advantage (dual clip; Ye et al., 2020), of clip and gspo. Default: no
    bound."""
    nll_coef: float = 0.0
    """Coefficient of the mean negative log likelihood of the tokens of good responses, as a term of the loss; 0.1 in VAPO
    (Yue et al., 2025). Good are responses with a score above `nll_above`."""
    nll_above: float = 0.0
    """The score, before it is normalised, that a response must exceed for `nll_coef`."""
    importance: Literal["auto", "none", "token", "sequence", "icepop"] = "auto"
    """Weight of a token's policy loss, from rho = the probability that the trainer gives it / that with which it was
    drawn. `token`: min(rho, `importance_high`) (Yao et al., 2025); `icepop`: rho within the bounds, 0 outside;
    `sequence`: 1 for the tokens of a response whose geometric mean of rho is within the bounds, 0 for others; `none`: 1;
    `auto`: `token` with `sampling.top_p` below 1, `sampling.top_k` above 0, `rollout.partial_tokens`, `ppo.steps_ahead` 1
    or another `rollout.engine` than inprocess, `none` otherwise. The mean is over all tokens, those with weight 0 included."""
    importance_low: float | None = None
    """Lower bound of icepop and sequence, less than 1. Default: 0.5 for icepop, 0.8 for sequence."""
    importance_high: float | None = None
    """Upper bound of token, icepop and sequence, greater than 1. Default: 2 for token, 5 for icepop, 1.25 for
    sequence."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus in the loss, per token."""
    value_coef: float = 0.1
    """Coefficient of the value loss; it has an effect if actor and critic share a backbone."""
    value_clip: float | None = 0.2
    """Maximum change of a value from the old one; beyond it the gradient is 0. null: no clipping."""
    kl_coef: float = 0.05
    """Coefficient beta of the KL penalty to the reference; the initial value if beta is adaptive."""
    kl_kind: Literal["k1", "k2", "k3", "exact"] = "k1"
    """KL estimator per token: k1, k2, k3 (Schulman, 2020), or the exact sum over the vocabulary."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL penalty is applied: in each token's reward, or as a term of the loss."""
    kl_target: float | None = None
    """Target KL (k1, summed over a response, in nats) of an adaptive beta (Ziegler et al., 2019). Default: beta is
    fixed."""
    kl_horizon: float = 10_000.0
    """Horizon of the adaptive beta, in responses; a larger one makes beta change more slowly."""
    truncation_penalty: float = 0.0
    """Subtracted from the score of a response that was truncated at `max_new_tokens`, after normalising and clipping."""
    bootstrap_truncated: bool = False
    """Add the value after the last token of a truncated response to its return. For dense rewards; not allowed with a
    score on the last token."""
    score_normalise: bool = False
    """Normalise scores to mean 0 and standard deviation 1 over all scores of the run so far, before clipping."""
    score_clip: float | None = None
    """Clip scores to [-score_clip, score_clip]. Default: no clipping."""
    length_limit: int | None = None
    """Soft limit of the response length, in tokens; each token beyond it costs `length_penalty`. Default: no limit."""
    length_penalty: float = 0.0
    """Subtracted from the score for each token beyond `length_limit`."""

    @property
    def rule(self) -> EstimatorRule:
        """That of the estimator."""
        return ESTIMATOR_RULES.get(self.estimator, OWN_ESTIMATOR)

    @property
    def whitens(self) -> bool:
        """`whiten_advantages`, with what `auto` stands for."""
        return self.rule.whiten if self.whiten_advantages == "auto" else self.whiten_advantages

    @property
    def aggregation(self) -> Aggregate:
        """`aggregate`, with what `auto` stands for."""
        if self.aggregate != "auto":
            return self.aggregate
        return "sequence" if self.loss == "gspo" else self.rule.aggregate

    @property
    def loss_is_fused(self) -> bool:
        """Whether one op computes the loss with the vocabulary head: it has one weight a token, for its advantage alone,
        and no other term than entropy and KL."""
        alone = self.entropy_coef == 0 and self.kl_in == "reward"
        return self.loss == "clip" and self.nll_coef == 0 and (alone or self.aggregation != "sequence")

    @property
    def loss_reads_reference(self) -> bool:
        """Whether learning computes the reference's logits again, which the exact KL in the loss needs."""
        return self.kl_in == "loss" and self.kl_kind == "exact"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning rate schedule. The learning rates are settings of the trained models."""

    dtype: Dtype = "bf16"
    """Type of weights and activations; with bf16 the optimizer keeps fp32 master weights. `auto`: bf16 on GPUs and
    processors that have instructions for its products (on x86, AVX-512), fp32 on others, where torch computes a product in
    bf16 many times more slowly."""
    warmup_steps: int = 0
    """Number of updates over which a learning rate rises from 0. The actor's warm-up starts after
    `critic.warmup_steps`."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up: `linear` falls to 0 at the end of the run."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moments."""
    eps: float = 1e-5
    """Adam's epsilon, added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov and Hutter, 2019)."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to this one; 0: no limit."""
    max_skipped: int = 5
    """Number of consecutive updates that may be skipped because their loss or gradient is not finite; after more the run
    stops."""
    activation_checkpointing: bool | int | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, a third more time. `true`: those of all layers; a number:
    of so many layers, the lowest; `false`: none. `auto`: of as few as the memory plan has room for, none without a plan.
    The result is the same, bit for bit."""

    def recomputed_layers(self, depth: int) -> int:
        """How many of so many layers recompute their activations; `auto` is settled by the plan before it is asked."""
        setting = self.activation_checkpointing
        if setting is True:
            return depth
        return 0 if isinstance(setting, str) else min(int(setting), depth)


Place = Literal["none", "cpu", "nvme"]  # where a role's states are stored while not in use; none: on the GPU


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is partitioned over the ranks, and what is offloaded from the GPU."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned over the ranks. 0: nothing (fp32 only); 1: optimizer states; 2: also gradients; 3: also the
    parameters of all roles."""
    offload: Place = "none"
    """Where optimizer states and, at stage 3, parameters are stored while not in use: `none` on the GPU, `cpu` in the
    host's memory, `nvme` on NVMe. The three settings below override it for a part of them."""
    offload_optimizer: Place | None = None
    """The same for the optimizer states of actor and critic; if offloaded, the CPU computes the updates. Default: as
    `offload`."""
    offload_parameters: Place | None = None
    """The same for the parameters of actor and critic, at stage 3. Default: as `offload`."""
    offload_frozen: Place | None = None
    """The same for the parameters of reference and reward models, at stage 3. Default: as `offload`."""
    nvme_path: str | None = None
    """Folder on a local NVMe drive for the states that are offloaded to nvme. Each rank reads and writes its part
    there."""
    deepspeed: str | None = None
    """DeepSpeed configuration (a JSON file) for options without a setting here, such as bucket sizes. `auto` stands for
    the value that the settings give; a value that contradicts the settings is an error."""

    @property
    def optimizer_on(self) -> Place:
        """Where the optimizer states of trained roles are stored while not in use."""
        return self.offload if self.offload_optimizer is None else self.offload_optimizer

    @property
    def parameters_on(self) -> Place:
        """Where the parameters of trained roles are stored while not in use."""
        return self._at_stage_3(self.offload_parameters)

    @property
    def frozen_on(self) -> Place:
        """Where the parameters of reference and reward models are stored while not in use."""
        return self._at_stage_3(self.offload_frozen)

    def _at_stage_3(self, override: Place | None) -> Place:
        if override is None:
            return self.offload if self.stage == 3 else "none"
        return override


@dataclass(frozen=True)
class ParallelConfig:
    """What ranks share beside the states that ZeRO partitions."""

    sequence: Literal[1, 2, 4, 8] = 1
    """Number of ranks, one after the other, that read each packed row of whole sequences together (Ulysses; Jacobs et
    al., 2023): each has a part of the tokens, and in attention a part of the heads, so that activations of a rank fall to
    1 / `sequence`. It divides the number of ranks, and a model has at least as many attention heads. Sampling is not
    split."""
