"""Settings of offline methods, which learn from given data: what they share, and those of SFT, reward modelling, DPO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from fastppo.config.learning import Dtype, OptimConfig, ParallelConfig, ZeroConfig
from fastppo.config.models import AttentionSetting, LoraConfig, ReferenceConfig
from fastppo.config.run import CheckpointConfig, EvaluationConfig, Names, TrackConfig


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    path: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. A reward model may
    start from a language model or from another reward model. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`; its weights are dequantized when they are loaded."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    fused: bool = True
    """Whether RMSNorm with the residual before it, rotary positions and gated activations (SwiGLU, GeGLU) are computed by
    one kernel each, forward and backward, in every layer that computes them, in the reference of DPO too;
    the log says which. `false`: as transformers computes them."""
    train: int | str = "all"
    """Parameters to train: `all`, an integer k for the last k layers, comma-separated name patterns (`*.mlp.*`), or, for
    a reward model, `head`. With LoRA: the layers that may have adapters. The head of a reward model is always trained."""
    lr: float = 1e-5
    """Peak learning rate."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ExamplesConfig:
    """The source and the selection of examples."""

    group = "data"  # not a setting, but the name of this group of settings in messages

    path: str = ""
    """Hub dataset name, a directory of `datasets.save_to_disk`, a .jsonl, .parquet or .csv file, a folder of .parquet parts, or
    `package:NAME/FILE` (`package:NAME==VERSION/FILE`) inside an installed package. Required."""
    name: str | None = None
    """Configuration name of a hub dataset, if it has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    prompt: str | None = "prompt"
    """Column with the prompt: text, or a list of chat messages ({role, content}); null: there is no prompt, or the
    answers are whole conversations."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: the chat template is applied to lists of messages, and text is used as it is; `always`: a prompt that is
    text becomes a user message, and an answer an assistant message; `never`: messages are an error, except for whole
    conversations to learn (`messages`), whose texts then follow each other as they are."""
    template: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments that the chat template takes in addition to the messages, for example `{enable_thinking: false}`."""
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    """Tools of which the chat template tells the model, as JSON schemas of functions, in the form of PPO's `data.tools`."""
    last_tokens: int | None = None
    """Use only this many tokens from the end of each plain-text answer. The quickstart makes short answers from reviews
    in this way, since the end of a review contains its verdict."""
    eos: bool = True
    """End each answer with the EOS; a chat answer with the token that ends a turn, or, where a reward model learns, with
    everything that the template writes after it, since reward models read complete chats. PPO's responses end in the
    same way unless they are truncated. Set it to false if responses are always truncated; even then PPO completes
    chats."""
    max_tokens: int = 1024
    """Maximum length of prompt and answer, in tokens, including the EOS."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """What to do with examples longer than `max_tokens`: `drop` skips them, `cut` truncates the answer (which then has
    no EOS); both report the number. `error` stops."""
    unusable: Literal["drop", "error"] = "drop"
    """What to do with unusable examples: an empty or missing prompt or answer, a conversation without an answer or one
    that the chat template rewrites, a pair of equal answers. `drop` skips them and reports their number, `error`
    stops."""
    shuffle: bool = True
    """Shuffle with the run's seed, in a new order in every pass over the data."""
    eval_path: str | None = None
    """Held-out examples, in the forms of `path`; it may be the same as `path`. Default: `eval.examples` examples of
    `path`, chosen by `split_seed`, are held out of training."""
    eval_split: str = "train"
    """Split of `eval_path`."""
    split_seed: int = 0
    """Seed of the choice of held-out examples. It is separate from `seed`, so that runs with different seeds are
    evaluated on the same examples."""
    limit: int | None = None
    """Maximum number of examples of `path` to use, including held-out ones; they are taken after a shuffle by
    `split_seed`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The settings that name the columns of a row."""
        raise NotImplementedError


@dataclass(frozen=True)
class PairsConfig(ExamplesConfig):
    """Preference pairs: two answers to a prompt, one of them preferred. Answers are text, or lists of chat messages."""

    chosen: str = "chosen"
    """Column with the preferred answer."""
    rejected: str = "rejected"
    """Column with the other answer."""
    margin: str | None = None
    """Column with the margin by which the preferred answer's score should be higher, for data with clear and unclear
    preferences (Touvron et al., 2023, Llama 2); it is added to the run's `margin`."""
    rating: str | None = None
    """Column with a rating of a single answer, for data whose rows are answers instead of pairs: each answer in the
    column `answer` is paired with one to the same prompt that has a lower rating; no answer is used twice."""
    answer: str = "response"
    """Column with the answer, if `rating` is set."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "chosen", "rejected") if self.rating is None else ("prompt", "answer")


@dataclass(frozen=True)
class AnswersConfig(ExamplesConfig):
    """Prompts with the responses to learn."""

    response: str = "response"
    """Column with the response: text, or a list of chat messages."""
    messages: str | None = None
    """Column with whole conversations, in place of `prompt` and `response`; every assistant message is a response to the
    messages before it. Messages of other roles, such as a tool's, are not learned."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "response") if self.messages is None else ("messages",)


@dataclass(frozen=True)
class HeldOutConfig(EvaluationConfig):
    """Evaluation on held-out examples: before, during and after training."""

    every: int = 50
    """Updates between evaluations; 0: evaluate before and after training only."""
    examples: int = 256
    """Number of held-out examples; 0 turns evaluation off, and the model after the last update is exported."""

    @property
    def size(self) -> int:
        return self.examples


@dataclass(frozen=True)
class OfflineConfig:
    """The settings of an offline method: one model learns from given examples, in the loop that all methods share.

    A method's own class says what it trains and adds its settings.
    """

    role: ClassVar[Literal["policy", "reward model"]] = "policy"  # what the model is
    unit: ClassVar[str] = "responses"  # what its examples are called in messages
    sequences: ClassVar[int] = 1  # of an example; they share a microbatch

    names: ClassVar[Names] = Names("batch_size", "microbatch_tokens", "model.lr")
    free: ClassVar[tuple[str, ...]] = ()  # settings that may change when a run is resumed ...
    rounding: ClassVar[tuple[str, ...]] = ("microbatch_tokens", "keep_trunk_gb")  # ... and that only change rounding

    output: str = "runs/offline"
    """Folder of the run: config, metrics, and the trained model with the lowest held-out loss."""
    seed: int = 1
    """Seed of the data order and of the initial weights of a score head or of LoRA adapters."""
    epochs: int = 1
    """Number of passes over the examples."""
    steps: int | None = None
    """Number of updates. Default: those of `epochs` passes."""
    batch_size: int = 64
    """Number of examples (responses or pairs) per update, over all ranks."""
    microbatch_tokens: int = 8192
    """Maximum number of tokens in one forward and backward pass on one rank, including prompts and both answers of a
    pair. The update does not depend on it."""
    patience: int | None = None
    """The run ends after this many consecutive evaluations without a lower held-out loss, the evaluation before training
    included; null: it never ends early."""
    keep_trunk_gb: float = 2.0
    """Memory per rank, in GB, for the outputs of the frozen prefix (the frozen lower layers of the model). If it is
    enough for all examples, they are computed once and stored for the other epochs."""
    resume: str | None = None
    """`auto`: continue from the newest complete checkpoint in `output`, or start a new run if there is none; a path:
    continue from that checkpoint of `output`; null: start a new run, and rename the folder of an earlier run in
    `output`."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores divided by its ranks."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the other ranks before it ends with an error."""
    attention: AttentionSetting = "auto"
    """The implementation of attention: `flash` uses flash-attn and `varlen` torch's varlen_attn (both CUDA,
    bf16), `sdpa` uses PyTorch; `auto` uses the first of these that can compute it, which is logged."""
    plan: Literal["check", "warn", "off"] = "check"
    """Whether to compute and show, before the model is loaded, the memory that it needs in learning and in evaluation.
    `check` stops a run that does not fit, `warn` warns and continues, `off` skips the computation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def sequence_ranks(self) -> int:
        """Ranks that read each row of whole sequences together."""
        return self.parallel.sequence

    @property
    def trained(self) -> dict[str, ModelConfig]:
        """What trains, by the name of its settings."""
        return {"model": self.model}

    @property
    def batches(self) -> tuple[int, ...]:
        """Sizes of what ranks share evenly in an update."""
        return (self.batch_size,)

    @property
    def data_paths(self) -> dict[str, str]:
        """Where the data of a run is, by setting."""
        return {"data.path": self.data.path}

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
    def frozen_model(self) -> ReferenceConfig | None:
        """A second model of the run, which is asked and let go before the one that trains is loaded."""
        return None

    @property
    def once_resumed(self) -> Self:
        """The settings without what only the start of the run needs."""
        return self


@dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """fastppo: supervised fine-tuning on responses, from which PPO starts."""

    output: str = "runs/sft"
    """Folder of the run: config, metrics, and the trained model with the lowest held-out loss in `output`/model."""
    data: AnswersConfig = field(default_factory=AnswersConfig)


@dataclass(frozen=True)
class RewardTrainingConfig(OfflineConfig):
    """fastppo: a reward model from preference pairs (Bradley and Terry, 1952)."""

    role: ClassVar[Literal["policy", "reward model"]] = "reward model"
    unit: ClassVar[str] = "pairs"
    sequences: ClassVar[int] = 2

    output: str = "runs/reward"
    """Folder of the run: config, metrics, the calibration, and the trained model with the lowest held-out loss in
    `output`/reward_model."""
    patience: int | None = 3
    """The run ends after this many consecutive evaluations without a lower held-out loss, the evaluation before training
    included; null: it never ends early."""
    data: PairsConfig = field(default_factory=PairsConfig)
    margin: float = 0.0
    """Margin by which the preferred answer's score should be higher: the loss is
    -log sigmoid(chosen - rejected - margin)."""
    centre: Literal["pairs", "chosen", "off"] = "pairs"
    """Held-out answers whose mean score is made 0 in the exported model: those of the `pairs`, or only the `chosen`."""
    centre_coef: float = 0.01
    """Coefficient of (chosen + rejected)^2 in the loss, which keeps scores near 0 during training (Eisenstein et al.,
    2023)."""


@dataclass(frozen=True)
class DPOReferenceConfig(ReferenceConfig):
    """The model from which DPO measures how far the policy has moved."""

    model: str | None = None
    """Hub name, directory or `package:NAME` of a language model with the tokenizer of `model.path`. Default: the model as
    training starts. Another one is in memory only before training, while its logprobs of the answers are computed."""


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """fastppo: direct preference optimisation on preference pairs (Rafailov et al., 2023)."""

    role: ClassVar[Literal["policy", "reward model"]] = "policy"
    unit: ClassVar[str] = "pairs"
    sequences: ClassVar[int] = 2
    free: ClassVar[tuple[str, ...]] = ("chosen_fall",)

    output: str = "runs/dpo"
    """Folder of the run: config, metrics, and the trained model with the lowest held-out loss in `output`/model."""
    patience: int | None = 3
    """The run ends after this many consecutive evaluations without a lower held-out loss, the evaluation before training
    included; null: it never ends early."""
    data: PairsConfig = field(default_factory=PairsConfig)
    loss: Literal["dpo", "ipo"] = "dpo"
    """`dpo`: -log sigmoid(beta * margin), the margin being the chosen answer's log ratio of policy and reference, summed
    over its tokens, minus that of the rejected one; `ipo`: (margin - 1 / (2 beta))^2, with means over tokens (Azar et
    al., 2023), whose margins stay finite where every pair is ordered."""
    beta: float = 0.1
    """How strongly the policy is held to the reference: the higher, the closer it stays."""
    label_smoothing: float = 0.0
    """Share of pairs, below 0.5, whose preference is taken to be wrong (conservative DPO, Mitchell, 2023). `dpo` only."""
    nll_coef: float = 0.0
    """Coefficient of the chosen answer's negative mean logprob in the loss, which keeps it likely (Pang et al., 2024, use
    1). The metric `loss` is without it."""
    chosen_fall: float | None = 0.5
    """An alarm is raised (a line in the log, in `alarms.jsonl` and in the report) when the chosen answers' mean logprob
    in an update is lower than the reference's by more than this, in nats a token: DPO can raise the margin while both
    answers become unlikely (Razin et al., 2024). At 0.5 each token has e^-0.5 = 0.61 times its probability on average,
    an answer of 50 tokens e^-25. null: no alarm."""
    reference: DPOReferenceConfig = field(default_factory=DPOReferenceConfig)

    @property
    def frozen_model(self) -> DPOReferenceConfig | None:
        return None if self.reference.model is None else self.reference

    @property
    def once_resumed(self) -> Self:
        return replace(self, reference=DPOReferenceConfig())
