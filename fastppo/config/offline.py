"""Learning from data that is given: what SFT, reward modelling and other offline methods have in common, and their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastppo.config.learning import OptimConfig, ZeroConfig
from fastppo.config.models import LoraConfig
from fastppo.config.run import CheckpointConfig, EvaluationConfig, Names, TrackConfig


@dataclass(frozen=True)
class ModelConfig:
    """The one model that is trained."""

    path: str = ""
    """Hugging Face hub name, a directory, or `package:NAME` for weights inside an installed package. A reward model may
    start from a language model or from another reward model. Required."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`; its weights are unpacked at load."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: int | str = "all"
    """Which parameters train: `all`, an integer k for the upper k layers, comma-separated name patterns (`*.mlp.*`), or,
    of a reward model, `head`. With LoRA: where there are adapters. The head of a reward model always trains."""
    lr: float = 1e-5
    """Peak learning rate."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ExamplesConfig:
    """Where examples come from, and which of them are used."""

    group = "data"  # no setting, but the name that these settings have in messages

    path: str = ""
    """Hub dataset name, a directory of `datasets.save_to_disk`, a .jsonl, .parquet or .csv file, or
    `package:NAME/FILE` (`package:NAME==VERSION/FILE`) inside an installed package. Required."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    prompt: str | None = "prompt"
    """Column with the prompt: text, or a list of chat messages ({role, content}); null where there is none, or where
    the answers are whole conversations."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: lists of messages go through the tokenizer's chat template and text stays plain; `always`: a prompt that
    is text becomes a user's message, an answer an assistant's; `never`: messages are an error."""
    template: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the chat template beside the messages, as in `{enable_thinking: false}`: whatever the tokenizer's
    template reads."""
    last_tokens: int | None = None
    """Keep only this many tokens from the end of each plain-text answer; the quickstart's way to make short answers out
    of reviews, whose ends say what was thought."""
    eos: bool = True
    """An answer ends with the EOS, or of chat with the token that ends a turn, as PPO's responses do unless they are cut
    at their longest; an answer of chat in a preference pair with all that the template writes behind it, as reward
    models read a chat whole. Set it to false where responses are always cut; in PPO a chat is closed even then."""
    max_tokens: int = 1024
    """Longest prompt and answer, in tokens, the EOS included."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """An example longer than `max_tokens`: `drop` leaves it out, `cut` takes the answer's end away (and its EOS), both
    report how many; `error` stops."""
    unusable: Literal["drop", "error"] = "drop"
    """An example whose prompt or answer is empty or missing, a conversation without an answer or one that the chat
    template rewrites, a pair with equal answers: `drop` leaves it out and reports how many, `error` stops."""
    shuffle: bool = True
    """Shuffle with the run's seed, anew in every pass over the data."""
    eval_path: str | None = None
    """Held-out examples in the same forms as `path`, `path` itself included; when left out, the `eval.examples` examples
    that `split_seed` picks are held out of `path`."""
    eval_split: str = "train"
    """Split of `eval_path`."""
    split_seed: int = 0
    """Seed of the held-out choice, apart from `seed` so that runs with other seeds are evaluated on the same examples."""
    limit: int | None = None
    """Use at most this many examples of `path`, those held out of it included, taken after a shuffle by `split_seed`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The settings that name the columns of a row."""
        raise NotImplementedError


@dataclass(frozen=True)
class PairsConfig(ExamplesConfig):
    """Preference pairs: two answers to a prompt, one preferred. Answers are text, or lists of chat messages."""

    chosen: str = "chosen"
    """Column with the preferred answer."""
    rejected: str = "rejected"
    """Column with the other answer."""
    margin: str | None = None
    """Column with the margin by which the preferred answer's score should lead, for pairs that differ in how clear they
    are (Touvron et al., 2023, Llama 2); added to `margin` of the run."""
    rating: str | None = None
    """Column with a number that rates a single answer, for data whose rows are answers and not pairs: each answer in
    the column `answer` is paired with one to the same prompt that is rated lower, no answer twice."""
    answer: str = "response"
    """Column with the answer where `rating` is set."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "chosen", "rejected") if self.rating is None else ("prompt", "answer")


@dataclass(frozen=True)
class AnswersConfig(ExamplesConfig):
    """Prompts with the responses to be learned."""

    response: str = "response"
    """Column with the response: text, or a list of chat messages."""
    messages: str | None = None
    """Column with whole conversations in place of `prompt` and `response`; each message of the assistant is a response
    to all that stands before it."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "response") if self.messages is None else ("messages",)


@dataclass(frozen=True)
class HeldOutConfig(EvaluationConfig):
    """Evaluation on held-out examples, before training, on the way and at the end."""

    every: int = 50
    """Updates between evaluations; 0 evaluates before and after training only."""
    examples: int = 256
    """Held-out examples; 0 turns evaluation off, and what is exported is the model after the last update."""

    @property
    def size(self) -> int:
        return self.examples


@dataclass(frozen=True)
class OfflineConfig:
    """The settings of an offline method: one model learns from examples that are given, in one loop for all methods.

    A method's own class says what it trains and adds its settings.
    """

    role: ClassVar[Literal["policy", "reward model"]] = "policy"  # what the model is
    unit: ClassVar[str] = "responses"  # what its examples are called in messages
    sequences: ClassVar[int] = 1  # of an example; they share a microbatch

    names: ClassVar[Names] = Names("batch_size", "microbatch_tokens", "model.lr")
    free: ClassVar[tuple[str, ...]] = ()  # settings that may change when a run is resumed ...
    rounding: ClassVar[tuple[str, ...]] = ("microbatch_tokens", "keep_trunk_gb")  # ... and that only round otherwise
    new_start: ClassVar[str] = "exported model (--model.path)"  # of a run on another number of ranks

    output: str = "runs/offline"
    """Folder of the run: config, metrics, and the trained model with the lowest held-out loss."""
    seed: int = 1
    """Seed of the data order, and of weights that are new: a score head, adapters."""
    epochs: int = 1
    """Passes over the examples."""
    steps: int | None = None
    """Updates; those that `epochs` needs when left out."""
    batch_size: int = 64
    """Examples in each update, over all ranks: responses, or pairs."""
    microbatch_tokens: int = 8192
    """Token budget (prompts, and both answers of a pair, included) of one forward and backward pass on one rank; the
    update does not depend on it."""
    patience: int | None = None
    """Evaluations in a row without a lower held-out loss, the start's included, after which the run ends; never when
    null."""
    keep_trunk_gb: float = 2.0
    """Memory on each rank, in GB, for what the model's frozen lower layers hand up. Where it is enough for all examples,
    each is computed once and kept for the other epochs."""
    resume: str | None = None
    """`auto`: go on from the newest whole checkpoint in `output`, or begin if there is none; a path: from that
    checkpoint of `output`; null: begin anew, an earlier run in `output` being moved aside."""
    threads: int | None = None
    """CPU threads of each rank; when left out, the machine's cores divided by the ranks on it."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it ends with an error."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """What computes attention: `flash` flash-attn (CUDA, bf16), `sdpa` PyTorch; `auto` flash-attn where it can be used
    and PyTorch elsewhere, which the log says."""
    plan: Literal["check", "warn", "off"] = "check"
    """Before the model loads, the memory that it needs in learning and in evaluation is computed and shown. `check`
    refuses a run that does not fit, `warn` says so and goes on, `off` leaves the computation out."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

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


@dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """fastppo: supervised fine-tuning on responses, where PPO starts from."""

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
    """Evaluations in a row without a lower held-out loss, the start's included, after which the run ends; never when
    null."""
    data: PairsConfig = field(default_factory=PairsConfig)
    margin: float = 0.0
    """By how much the preferred answer's score should lead: the loss is -log sigmoid(chosen - rejected - margin)."""
    centre: Literal["pairs", "chosen", "off"] = "pairs"
    """Which held-out answers score 0 on average in the model that is exported: all of the `pairs`, or the `chosen`."""
    centre_coef: float = 0.01
    """Coefficient of (chosen + rejected)^2 in the loss, which keeps scores near 0 while the model trains (Eisenstein et
    al., 2023)."""
