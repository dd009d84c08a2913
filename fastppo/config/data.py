"""Settings of prompts, sampling, and the text of PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class DataConfig:
    """Prompts for training and for evaluation."""

    path: str = ""
    """Hub dataset name, a directory of `datasets.save_to_disk`, a .jsonl, .parquet or .csv file, a folder of .parquet parts, or
    `package:NAME/FILE` (`package:NAME==VERSION/FILE`) inside an installed package. Required."""
    name: str | None = None
    """Configuration name of a hub dataset, if it has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages ({role, content})."""
    suffix: str = ""
    """Text that is added to the end of each prompt, in chat to the end of the last message; for example an instruction how
    to answer."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: the chat template is applied to lists of messages, and text is used as it is; `always`: text becomes one
    user message; `never`: messages are an error."""
    template: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments that the chat template takes in addition to the messages, for example `{enable_thinking: false}`. They
    apply to prompts, to the text of `ptx`, and to reward models with the same template."""
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    """Tools that the actor may call, as JSON schemas of functions (`{type: function, function: {name, description,
    parameters}}`). The chat template tells the actor of them, and reward models with the same template; with
    `rollout.environment` the actor's turns are searched for calls."""
    tool_format: Literal["auto", "hermes", "llama3"] = "auto"
    """How the actor writes tool calls: `hermes` (also Qwen): a JSON object between `<tool_call>` and `</tool_call>`;
    `llama3`: a JSON object with `name` and `parameters` as the whole turn; `auto`: as its chat template says."""
    first_tokens: int | None = None
    """Use only this many tokens from the start of each plain-text prompt; shorter rows are dropped. The quickstart makes
    prompts from whole texts in this way."""
    max_prompt_tokens: int = 512
    """Maximum prompt length, in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """What to do with prompts longer than `max_prompt_tokens`: `drop` skips them and reports their number, `error`
    stops."""
    shuffle: bool = True
    """Shuffle with the run's seed, in a new order in every pass over the data."""
    eval_path: str | None = None
    """Held-out prompts for evaluation, in the forms of `path`; it may be the same as `path`. Default: `eval.prompts`
    prompts of `path`, chosen by `split_seed`, are held out of training."""
    eval_split: str = "train"
    """Split of `eval_path`."""
    split_seed: int = 0
    """Seed of the choice of held-out prompts. It is separate from `seed`, so that runs with different seeds are
    evaluated on the same prompts."""
    limit: int | None = None
    """Maximum number of rows of `path` to use, including held-out ones; they are taken after a shuffle by
    `split_seed`."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the actor samples its responses. Learning uses the same temperature."""

    temperature: float = 1.0
    """The logits are divided by it, in sampling and in learning; > 0."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this total probability, in (0, 1]; 1: from
    all tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all tokens."""
    max_new_tokens: int = 128
    """Maximum response length, in tokens, including the EOS. With `rollout.environment` it is the maximum of a whole
    conversation behind its prompt: of all turns and observations together."""
    min_new_tokens: int = 0
    """No stop token is sampled among the first `min_new_tokens` tokens, as in transformers' `generate`; if it equals
    `max_new_tokens`, no stop token is sampled at all."""
    samples_per_prompt: int = 1
    """Number of responses to each prompt; `ppo.batch_size` counts responses."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a response, in addition to all EOS ids of the model's generation config: each as text, such as
    `\\n`, or as written in the vocabulary."""
    ignore_eos: bool = False
    """Always generate `max_new_tokens` tokens and ignore stop tokens (for benchmarks)."""
    rows: int | Literal["auto"] = 64
    """Number of responses decoded together on each rank; it bounds the size of the key/value cache. One that ends makes
    room for the next, so a rank may have any number of prompts. `auto`: as many as the memory plan has room for and a
    rank has responses to draw, at most 64 on a CPU; a line says how many. Responses do not depend on it. vLLM has
    `max_num_seqs` in its place (`rollout.vllm.arguments`)."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs, on a GPU. vLLM records its own, unless `rollout.vllm.arguments` has
    `enforce_eager: true`."""

    @property
    def settled_rows(self) -> int:
        """`rows`, once the plan has chosen it."""
        assert self.rows != "auto", "rows are chosen by the plan, before anything is sampled"
        return self.rows


@dataclass(frozen=True)
class PPOSamplingConfig(SamplingConfig):
    """How the actor samples its responses. Learning uses the same temperature."""

    until_informative: int | None = None
    """Dynamic sampling (DAPO; Yu et al., 2025): a step draws further batches of `ppo.batch_size` responses until as many
    of them belong to prompts whose responses differ in score, and learns from these; it draws at most `until_informative`
    batches, 2 or more. If they are too few then, responses to other prompts fill the batch up. Default: one batch, from
    which all is learned. Needs `samples_per_prompt` of 2 or more (docs/data-and-rewards.md)."""


@dataclass(frozen=True)
class VllmConfig:
    """vLLM in the process of each rank (`rollout.engine: vllm`)."""

    tensor_parallel_size: int = 1
    """Number of neighbouring ranks that hold one copy of the model together and draw their responses together; it divides
    the number of ranks."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory that vLLM takes while it samples, for its weights and its cache; in (0, 1]."""
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of vLLM's class `LLM`, for example `{max_num_seqs: 256, enforce_eager: true}` (docs/vllm.md)."""


@dataclass(frozen=True)
class RolloutConfig:
    """What draws the responses, in training and in evaluation."""

    engine: str = "inprocess"
    """`inprocess`: in the trainer's own process, on the actor's own weights; `vllm`: vLLM, in the same process; or a sampler
    of yours, as `module:Class` or `file.py:Class` (docs/how-to/engine.md)."""
    environment: str | None = None
    """What answers the actor, as `module:NAME` or `file.py:NAME`: a function that is called after each of the actor's
    turns and returns the next observation, or None to end the conversation; or a class with `reset` and `step`
    (docs/environments.md). Default: each response is one turn."""
    max_turns: int = 8
    """Maximum number of turns of the actor in a conversation with the environment."""
    turn_tokens: int | None = None
    """Maximum number of tokens in a turn, including the token that ends it. Default: what is left of
    `sampling.max_new_tokens`, the maximum of the whole conversation."""
    time_limit: float = 60.0
    """Seconds that the environment may take to answer a turn; an answer that takes longer ends the run with an error."""
    concurrency: int = 64
    """Number of simultaneous calls of the environment per rank; other responses are drawn meanwhile."""
    vllm: VllmConfig = VllmConfig()


@dataclass(frozen=True)
class PPORolloutConfig(RolloutConfig):
    """What draws the responses, in training and in evaluation."""

    partial_tokens: int | None = None
    """Partial rollouts (Kimi Team, 2025, section 2.6): the most tokens that the actor writes on a response at a time. One
    that is not complete then goes on in the next step, with the policy of that step; what is in flight is part of
    checkpoints. A step learns from complete responses only, as many as ever. Tokens of a response then come from several
    policies, which `ppo.importance` corrects, and a response depends on more than the seed and its prompt
    (docs/scaling.md). Needs `engine: inprocess`. Default: each response is completed at once."""


# Settings of how responses are drawn that change none.
SAMPLER_SPEED = ("sampling.cuda_graphs", "rollout.time_limit", "rollout.concurrency")
# Settings that decide how many responses are computed together, and where: their tokens only round otherwise.
SAMPLER_ROUNDING = ("sampling.rows", "rollout.vllm.tensor_parallel_size", "rollout.vllm.gpu_memory_utilization")


@dataclass(frozen=True)
class TextConfig:
    """Given texts that an actor learns from beside its own responses."""

    group: ClassVar[str] = ""  # not a setting, but the name of this group of settings in messages

    path: str = ""
    """The texts, in the forms of `data.path`."""
    name: str | None = None
    """Configuration name of a hub dataset, if it has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    response: str = "text"
    """Column with the text to learn: plain text, of which every token and an EOS are learned; or a list of chat
    messages, of which the last one, the assistant's, is learned."""
    prompt: str | None = None
    """Column with the text or the chat messages before it, which are not learned; null: there is no such column."""
    messages: str | None = None
    """Column with whole conversations, in place of the two above; every assistant message is learned."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: the chat template is applied to lists of messages, and text is used as it is; `always`: a prompt that is
    text becomes a user message, and a response an assistant message; `never`: messages are an error, except for whole
    conversations (`messages`), whose texts then follow each other as they are."""
    max_tokens: int = 1024
    """Maximum length of prompt and text, in tokens, including the EOS."""
    too_long: Literal["drop", "cut", "error"] = "cut"
    """What to do with texts longer than `max_tokens`: `drop` skips them, `cut` truncates them (they then have no EOS);
    both report the number. `error` stops."""
    limit: int | None = None
    """Maximum number of texts to use, taken after a shuffle."""


@dataclass(frozen=True)
class PtxConfig(TextConfig):
    """PPO-ptx (Ouyang et al., 2022, equation 2): a language-modelling loss on given text, added to the actor's updates
    to reduce forgetting."""

    group: ClassVar[str] = "ptx"

    coef: float = 0.0
    """Coefficient gamma of the text's loss in the actor's loss. Both are means over tokens; the text's is the negative
    logprob at temperature 1. 0: no text is loaded."""
    batch_size: int = 64
    """Number of texts per update, over all ranks. Their microbatches have the size of PPO's (`ppo.microbatch_tokens`)."""


@dataclass(frozen=True)
class MixtureConfig(TextConfig):
    """Given demonstrations that are mixed with the responses of a ReST run."""

    group: ClassVar[str] = "mixture"

    share: float = 0.0
    """Share of each update's responses that are demonstrations; 0: none are loaded."""
    response: str = "response"
    """Column with the response to learn: text, or a list of chat messages."""
    prompt: str | None = "prompt"
    """Column with the prompt: text, or a list of chat messages; null: there is no prompt."""
