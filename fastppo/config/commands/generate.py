"""Settings of drawing responses from a model and scoring them, with which nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from fastppo.config.data import SAMPLER_ROUNDING, SAMPLER_SPEED, DataConfig, RolloutConfig, SamplingConfig
from fastppo.config.learning import Dtype, OptimConfig, ZeroConfig
from fastppo.config.models import ActorConfig, AttentionSetting
from fastppo.config.rewards import RewardConfig
from fastppo.config.run import Names


@dataclass(frozen=True)
class SampledConfig:
    """The model that responses are drawn from."""

    path: str = ""
    """Hugging Face hub name, a directory (the exported model of a run, for example), or `package:NAME` for weights inside
    an installed package. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`; its weights are dequantized when they are loaded."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    fused: bool = True
    """Whether RMSNorm with the residual before it, rotary positions and gated activations (SwiGLU, GeGLU) are computed by
    one kernel each, forward and backward, in every layer that computes them, in reward models and judges too;
    the log says which. `false`: as transformers computes them."""


@dataclass(frozen=True)
class PromptsConfig(DataConfig):
    """The prompts. All of them are answered, in one pass."""

    shuffle: bool = False
    """Answer the prompts in another order, which depends on `seed`; `prompt_index` is then the place in that order."""
    eval_path: str | None = None
    """Not used here, since no prompts are held out; must be null."""
    eval_split: str = "train"
    """Not used here, since no prompts are held out; must be train."""
    split_seed: int = 0
    """Seed of the shuffle before `limit`, as in training: with the same `limit`, the same rows are used."""
    limit: int | None = None
    """Maximum number of rows of `path` to use; they are taken after a shuffle by `split_seed`, and answered in the order
    of the data."""


@dataclass(frozen=True)
class GenerateConfig:
    """fastppo: responses of a model to prompts, with their scores."""

    names: ClassVar[Names] = Names("batch_size", "microbatch_tokens", "")  # nothing is learned
    judge_setting: ClassVar[str] = "judge"
    # Settings that may change when a run is resumed: what comes out does not depend on them ...
    free: ClassVar[tuple[str, ...]] = ("progress", *SAMPLER_SPEED)
    # ... or only in how it is rounded
    rounding: ClassVar[tuple[str, ...]] = ("microbatch_tokens", *SAMPLER_ROUNDING, "rewards_on")

    output: str = "runs/generate"
    """Folder of the run: config, metrics, and the responses in `output`/responses.jsonl or `output`/responses."""
    seed: int = 1
    """Seed of sampling, of the random generators that a reward function may use, and of `data.shuffle`. A response
    depends on the model, the seed, its `prompt_index` and its `sample` only."""
    resume: Literal["auto"] | None = None
    """`auto`: continue after the last whole batch in `output`, or start a new run if there is none; null: start a new
    run, and rename the folder of an earlier run in `output`."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores divided by its ranks."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the other ranks before it ends with an error. It must exceed the largest difference
    in time between ranks in a batch."""
    attention: AttentionSetting = "auto"
    """The implementation of attention in every model: `flash` uses flash-attn and `varlen` torch's varlen_attn (both CUDA,
    bf16), `sdpa` uses PyTorch; `auto` uses the first of these that can compute it, which is logged."""
    plan: Literal["check", "warn", "off"] = "check"
    """Whether to compute and show, before the models are loaded, the memory that each model needs in each phase. `check`
    stops a run that does not fit, `warn` warns and continues, `off` skips the computation."""
    dtype: Dtype = "bf16"
    """Type of weights and activations of all models; `auto` as in `optim.dtype` of the commands that train."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """`jsonl`: one file, `output`/responses.jsonl; `parquet`: a file for each batch, `output`/responses/part-00000.parquet
    and so on."""
    batch_size: int = 512
    """Number of responses, over all ranks, that are drawn, scored and written together. A run that is killed loses at
    most one batch."""
    microbatch_tokens: int = 8192
    """Maximum number of tokens (prompts and responses) that a reward model reads at once on one rank."""
    rewards_on: Literal["gpu", "ranks", "cpu"] = "gpu"
    """Where the weights of reward models and judges are while they score: `gpu`: whole on each GPU; `ranks`: partitioned
    over the ranks and gathered layer by layer (ZeRO stage 3); `cpu`: as `ranks`, with the parts in the host's memory. The
    model that is sampled is always whole on each GPU."""
    progress: Literal["auto", "always", "never"] = "auto"
    """`auto`: a progress bar if the output is a terminal, otherwise one line per batch."""
    model: SampledConfig = field(default_factory=SampledConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """Sources of reward; their weighted sum is the score, to which `rollout.environment` adds its rewards for turns. Empty,
    and no environment: responses have no score."""
    judge: tuple[RewardConfig, ...] = ()
    """Sources of a score for comparison, for which nothing should be chosen or trained, in the form of `rewards`."""
    data: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def optim(self) -> OptimConfig:
        """Nothing is optimised; the models have its dtype."""
        return OptimConfig(dtype=self.dtype)

    @property
    def zero(self) -> ZeroConfig:
        """Of reward models."""
        if self.rewards_on == "gpu":
            return ZeroConfig()
        return ZeroConfig(stage=3, offload_frozen="cpu" if self.rewards_on == "cpu" else "none")

    def with_dtype(self, dtype: Dtype) -> Self:
        """These settings with another `dtype`."""
        return replace(self, dtype=dtype)

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
    def sequence_ranks(self) -> int:
        """Each rank reads what it drew."""
        return 1

    @property
    def trained(self) -> dict[str, ActorConfig]:
        """Nothing."""
        return {}

    @property
    def batches(self) -> tuple[int, ...]:
        """There are no updates."""
        return ()

    @property
    def drawn_together(self) -> int:
        """Number of responses of all ranks that are drawn before they are scored."""
        return self.batch_size

    @property
    def data_paths(self) -> dict[str, str]:
        """Where the data of a run is, by setting."""
        return {"data.path": self.data.path}
