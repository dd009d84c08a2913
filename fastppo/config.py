"""The settings of a run, as frozen dataclasses.

Each field is documented by the string below it; `--help` shows that string. A field that holds a quantity
names its unit. `fastppo.rules.validate` refuses settings that cannot work together, before a model loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting, or two settings together, that cannot work. The message says which, why and what to do."""


@dataclass(frozen=True)
class ActorConfig:
    """The policy that is trained. The frozen reference is a second copy of the same weights."""

    model: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; its weights are unpacked at load."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: int | str = "all"
    """Which parameters train: `all`, an integer k for the upper k layers, or comma-separated name patterns
    (`*.mlp.*`)."""
    lr: float = 3e-6
    """Peak learning rate of the actor."""


@dataclass(frozen=True)
class CriticConfig:
    """The value function V(s), one number for each response token."""

    kind: Literal["separate", "shared"] = "separate"
    """`separate`: a model of its own; `shared`: a value head on the actor's backbone (one engine, less memory)."""
    model: str | None = None
    """Weights of a separate critic: hub name, directory or `package:NAME`; the actor's when left out."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""
    train: int | str = "all"
    """Which parameters of a separate critic train, as for the actor. The value head always trains."""
    lr: float = 3e-6
    """Peak learning rate of a separate critic, or of the value head of a shared one."""
    warmup_steps: int = 0
    """PPO steps at the start that train the critic alone (shared: the value head alone)."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that the KL penalty holds the actor to."""

    model: str | None = None
    """Hub name, directory or `package:NAME`; the actor's own starting weights when left out. It must share the
    actor's tokenizer."""
    gguf_file: str | None = None
    """GGUF file inside `model`."""


@dataclass(frozen=True)
class RewardConfig:
    """One source of reward: a model or a Python function. Exactly one of the two is set."""

    function: str | None = None
    """`module:function` or `file.py:function`; called with prompts, responses and the data's columns; returns one
    number each."""
    model: str | None = None
    """An `AutoModelForSequenceClassification` with one label: hub name or directory. It may use a tokenizer of its
    own."""
    weight: float = 1.0
    """Factor of this source in the weighted sum of all sources."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts for training and for evaluation."""

    path: str = ""
    """Hub dataset name, a directory of `datasets.save_to_disk`, a .jsonl, .parquet or .csv file, or
    `package:NAME/FILE` (`package:NAME==VERSION/FILE`) inside an installed package. Required."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages ({role, content})."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: lists of messages go through the tokenizer's chat template and text stays plain; `always`: text becomes
    one user message; `never`: messages are an error."""
    first_tokens: int | None = None
    """Keep only this many tokens from the start of each plain-text prompt (rows that are shorter are left out); the
    quickstart's way to make prompts out of texts."""
    max_prompt_tokens: int = 512
    """Longest prompt, in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """A prompt longer than `max_prompt_tokens`: `drop` leaves it out and reports how many, `error` stops."""
    shuffle: bool = True
    """Shuffle with the run's seed, anew in every pass over the data."""
    eval_path: str | None = None
    """Held-out prompts for evaluation in the same forms as `path`, `path` itself included; when left out, the
    `eval.prompts` prompts that `split_seed` picks are held out of `path`."""
    eval_split: str = "train"
    """Split of `eval_path`."""
    split_seed: int = 0
    """Seed of the held-out choice, apart from `seed` so that runs with other seeds are evaluated on the same
    prompts."""
    limit: int | None = None
    """Use at most this many rows of `path`, held-out ones included, taken after a shuffle by `split_seed`."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the actor writes its responses. The learner uses the same temperature."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in learning; > 0."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with at least this probability, in (0, 1]; 1 is off."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    max_new_tokens: int = 128
    """Longest response, in tokens, the EOS included."""
    min_new_tokens: int = 1
    """No stop token may be drawn before this many tokens."""
    samples_per_prompt: int = 1
    """Responses to each prompt; `ppo.batch_size` counts responses."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response, beside all EOS ids of the model's generation config."""
    ignore_eos: bool = False
    """Write `max_new_tokens` tokens whatever is drawn (for benchmarks)."""
    rows: int = 64
    """Rows decoded together on each rank; bounds the key/value cache."""


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
    gamma: float = 1.0
    """Discount, in [0, 1]."""
    lam: float = 0.95
    """GAE's lambda, in [0, 1] (Schulman et al., 2016)."""
    whiten_advantages: bool = True
    """Bring the advantages of the global batch to mean 0 and variance 1."""
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
    """Subtracted from the score of a response that was cut at `max_new_tokens`."""
    bootstrap_truncated: bool = False
    """Add V after the last token of a response that was cut, for dense rewards; refused with a score on the last
    token."""
    score_clip: float | None = None
    """Clip scores to [-score_clip, score_clip], off when left out."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and what surrounds it. Learning rates stand with actor and critic."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Type of weights and activations; with bf16 the optimizer keeps fp32 master weights."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0."""
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


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2] = 1
    """What the ranks share out. 0: nothing, for fp32 alone; 1: optimizer states; 2: gradients too."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts, with a seed of its own, before training and at the end."""

    every: int = 0
    """PPO steps between evaluations; 0 evaluates before and after training only."""
    prompts: int = 64
    """Held-out prompts; 0 turns evaluation off."""
    seed: int = 1234
    """Seed of the samples, the same in every evaluation and for every `seed`."""
    temperature: float = 1.0
    """Temperature of the samples."""
    show: int = 4
    """Responses shown before and after, side by side, at the end of the run."""


@dataclass(frozen=True)
class TrackConfig:
    """What a run records beside `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard events to `output`/tensorboard."""
    progress: Literal["auto", "always", "never"] = "auto"
    """`auto`: a progress bar if the output is a terminal, else one line a step."""
    profile_steps: tuple[int, ...] = ()
    """PPO steps, counted from 1, to record with torch's profiler, each stage named; traces go to `output`/profile."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run saves of itself in `output`/checkpoints, to be resumed from there bit for bit."""

    every: int = 50
    """PPO steps between checkpoints; 0 saves only when the run is told to stop."""
    keep_last: int = 2
    """How many of the newest checkpoints stay; older ones are deleted once a newer one is whole."""
    keep_best: int = 0
    """How many checkpoints with the highest held-out score stay beside those; each checkpoint must be evaluated then
    (`eval.every`)."""
    on_error: Literal["continue", "stop"] = "continue"
    """A checkpoint that cannot be written, on a full disk for example: `continue` logs the error and trains on, `stop`
    ends the run."""


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
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """Sources of reward; their weighted sum is the score. Required."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
