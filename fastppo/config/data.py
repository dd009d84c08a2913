"""Prompts, how they are answered, and text that is learned beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
    template: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the chat template beside the messages, as in `{enable_thinking: false}`: whatever the tokenizer's
    template reads, for prompts, `ptx`'s text and reward models with the same template."""
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
    min_new_tokens: int = 0
    """No stop token may be drawn as one of so many first tokens, as in transformers' `generate`; where it is
    `max_new_tokens`, none ever."""
    samples_per_prompt: int = 1
    """Responses to each prompt; `ppo.batch_size` counts responses."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a response, beside all EOS ids of the model's generation config: each as text, such as
    `\\n`, or as the vocabulary spells it."""
    ignore_eos: bool = False
    """Write `max_new_tokens` tokens whatever is drawn (for benchmarks)."""
    rows: int = 64
    """Rows decoded together on each rank; bounds the key/value cache."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs, where flash-attn computes attention on a GPU."""


@dataclass(frozen=True)
class RolloutConfig:
    """What draws the responses, in training and in evaluation."""

    engine: str = "inprocess"
    """`inprocess`: in the trainer's own process, on the actor's own weights; or a sampler of yours, as `module:Class` or
    `file.py:Class` (docs/how-to/engine.md)."""


@dataclass(frozen=True)
class PtxConfig:
    """Against forgetting (PPO-ptx; Ouyang et al., 2022, equation 2): a language-modelling loss on given text, mixed into
    the actor's updates."""

    coef: float = 0.0
    """Gamma: what the text's mean negative logprob a token, at temperature 1, is multiplied by before it is added to
    PPO's loss, itself a mean over tokens. 0 is off, and no text is loaded."""
    batch_size: int = 64
    """Texts in each update, over all ranks. Their microbatches are those of PPO in size (`ppo.microbatch_tokens`)."""
    path: str = ""
    """Where the text is, in the same forms as `data.path`."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset or of a saved DatasetDict."""
    response: str = "text"
    """Column with what is learned: plain text, every token of it and an EOS; or a list of chat messages, of which the
    last one, the assistant's, is learned."""
    prompt: str | None = None
    """Column with what stands before it and is not learned: text or chat messages; null where there is none."""
    messages: str | None = None
    """Column with whole conversations in place of the two above; each message of the assistant is learned."""
    chat: Literal["auto", "always", "never"] = "auto"
    """`auto`: lists of messages go through the tokenizer's chat template and text stays plain; `always`: a prompt that
    is text becomes a user's message, a response an assistant's; `never`: messages are an error."""
    max_tokens: int = 1024
    """Longest text, in tokens, prompt and EOS included."""
    too_long: Literal["drop", "cut", "error"] = "cut"
    """A text longer than `max_tokens`: `drop` leaves it out, `cut` takes its end away (and its EOS), both report how
    many; `error` stops."""
    limit: int | None = None
    """Use at most this many texts, taken after a shuffle."""
