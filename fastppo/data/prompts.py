"""Prompts: rows of a table as tokens, split into training and held-out prompts, and batches of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastppo.config import DataConfig
from fastppo.data.continuation import decode_start, plain_tokens
from fastppo.data.conversations import (
    PLAIN_WITH_TOOLS,
    Messages,
    are_messages,
    check_template,
    template_arguments,
    template_text,
    template_tokens,
)
from fastppo.data.tables import DataError, Table, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fastppo")

RESERVED = {"prompts", "responses"}  # arguments of a reward function beside the columns


@dataclass(frozen=True)
class PromptSet:
    """P prompts, and the data about each that a reward function receives."""

    tokens: tuple[tuple[int, ...], ...]  # P prompts
    texts: tuple[str, ...]  # P; as in the data, with `suffix`; truncated ones decoded, without BOS; chat as rendered
    columns: dict[str, list[Any]]  # every column of the data, P raw values each: chat as messages, CSV as text
    messages: tuple[Messages | None, ...] = ()  # P, None for a plain prompt; empty if all prompts are plain
    table: Table | None = field(default=None, repr=False, compare=False)  # where the prompts are from, for messages
    rows: tuple[int, ...] = field(default=(), repr=False, compare=False)  # P rows of it

    def __len__(self) -> int:
        return len(self.tokens)

    def messages_of(self, rows: Sequence[int]) -> list[Messages | None]:
        return [self.messages[row] if self.messages else None for row in rows]

    def where(self, prompt: int) -> str:
        """The place of a prompt in the data, for a message."""
        return f"prompt {prompt}" if self.table is None else self.table.where(self.rows[prompt])


@dataclass(frozen=True)
class _Prompt:
    row: int
    tokens: tuple[int, ...]
    text: str
    messages: Messages | None = None


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts_heldout: int,
    context: int | None,
    reserve: int,
) -> tuple[PromptSet, PromptSet]:
    """Load training prompts, in the order of the data, and `prompts_heldout` other prompts for evaluation.

    The held-out prompts depend on the data and `split_seed` only. context: of the model, in tokens (None: unknown);
    reserve: tokens of it for the response. Raises `DataError`.
    """
    longest = config.max_prompt_tokens
    if context is not None and longest + reserve > context:
        raise DataError(
            f"data.max_prompt_tokens {longest} + sampling.max_new_tokens {reserve} = {longest + reserve} tokens, but"
            f" the model's context holds {context}. Set data.max_prompt_tokens to {max(context - reserve, 0)} or less,"
            " or lower sampling.max_new_tokens."
        )
    check_template(config, tokenizer)
    table = read_table(config.path, config.name, config.split)
    prompts = _prompts(table, _shuffled(len(table), f"{config.split_seed}")[: config.limit], config, tokenizer)
    if config.eval_path is None:
        heldout = _prompt_set(table, prompts[:prompts_heldout])
    else:
        name = config.name if config.eval_path == config.path else None
        eval_table = read_table(config.eval_path, name, config.eval_split)
        eval_rows = _shuffled(len(eval_table), f"{config.split_seed}")
        heldout = _prompt_set(eval_table, _prompts(eval_table, eval_rows, config, tokenizer)[:prompts_heldout])
    if len(heldout) < prompts_heldout:
        raise DataError(
            f"{config.eval_path or config.path} has {len(heldout)} usable prompts, but eval.prompts asks for"
            f" {prompts_heldout}. Lower eval.prompts or give more prompts."
        )
    heldout_tokens = set(heldout.tokens)  # by content: a prompt that the data repeats must not be in both sets
    training = [prompt for prompt in prompts if prompt.tokens not in heldout_tokens]
    if not training:
        raise DataError(
            f"{config.path} has {len(prompts)} usable prompts, and holding out {len(heldout)} for evaluation leaves"
            " none to train on. Lower eval.prompts or give more prompts."
        )
    if prompts_heldout:
        log.info("%s: %d prompts to train on, %d held out", config.path, len(training), len(heldout))
    else:
        log.info("%s: %d prompts", config.path, len(training))
    return _prompt_set(table, sorted(training, key=lambda prompt: prompt.row)), heldout


def batches(prompts: Sized, *, size: int, seed: int, shuffle: bool, start: int = 0) -> Iterator[list[int]]:
    """Yield batches of exactly `size` prompt indices without end, from batch number `start` on.

    The batches are consecutive parts of repeated passes over the prompts; with `shuffle` each pass has another order.
    So a batch may contain the end of one pass and the start of the next, and batch k depends on `seed` and k only.
    """
    count, position = len(prompts), start * size
    if size < 1 or count < 1:
        raise DataError(f"batches of {size} cannot be made from {count} prompts; both must be at least 1.")
    number, order = -1, list(range(count))
    while True:
        batch: list[int] = []
        while len(batch) < size:
            if shuffle and number != position // count:
                number = position // count
                order = _shuffled(count, f"{seed}/{number}")
            part = order[position % count :][: size - len(batch)]
            batch += part
            position += len(part)
        yield batch


def _shuffled(count: int, key: str) -> list[int]:
    """0 .. count - 1 in an order that depends on `key` only, the same on every machine and rank."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def _prompt_set(table: Table, prompts: list[_Prompt]) -> PromptSet:
    columns = {
        name: [values[prompt.row] for prompt in prompts]
        for name, values in table.columns.items()
        if name not in RESERVED
    }
    tokens, texts = tuple(prompt.tokens for prompt in prompts), tuple(prompt.text for prompt in prompts)
    messages, rows = tuple(prompt.messages for prompt in prompts), tuple(prompt.row for prompt in prompts)
    return PromptSet(tokens, texts, columns, messages, table, rows)


def _prompts(table: Table, rows: list[int], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[_Prompt]:
    """The usable prompts of the rows, in the given order."""
    values = table.column(config.column)
    chats = {row for row in rows if config.chat == "always" or not isinstance(values[row], str)}
    prompts = {row: _chat_prompt(row, table, config, tokenizer) for row in chats}
    prompts |= _plain_prompts([row for row in rows if row not in chats], table, config, tokenizer)
    usable = []
    short = long = 0
    for row in rows:
        length = len(prompts[row].tokens)
        if length > config.max_prompt_tokens:
            if config.too_long == "error":
                raise DataError(
                    f"{table.where(row)}: the prompt has {length} tokens, more than data.max_prompt_tokens"
                    f" {config.max_prompt_tokens}. Raise it, or set data.too_long to drop."
                )
            long += 1
        elif row not in chats and length < (config.first_tokens or 0):
            short += 1
        else:
            usable.append(prompts[row])
    _log_dropped(table, config, len(rows), short, long)
    return usable


def _log_dropped(table: Table, config: DataConfig, rows: int, short: int, long: int) -> None:
    """Log the number of dropped prompts; raise DataError if all were dropped."""
    reasons = [f"{long} longer than data.max_prompt_tokens {config.max_prompt_tokens}"] if long else []
    reasons += [f"{short} shorter than data.first_tokens {config.first_tokens}"] if short else []
    if short + long == rows:
        raise DataError(f"{table.source}: none of its {rows} prompts can be used: {', '.join(reasons)}.")
    if reasons:
        log.info("%s: dropped %d of %d prompts: %s", table.source, short + long, rows, ", ".join(reasons))
    if clash := sorted(RESERVED.intersection(table.columns)):
        log.info("%s: reward functions do not receive the columns %s: reserved names", table.source, ", ".join(clash))


def _plain_prompts(
    rows: list[int], table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[int, _Prompt]:
    if config.tools and rows:
        raise DataError(f"{table.where(rows[0])}, column {config.column}: {PLAIN_WITH_TOOLS}")
    texts = [table.column(config.column)[row] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not text.strip() and config.first_tokens is None:
            raise DataError(f"{table.where(row)}: the prompt in column {config.column} is empty.")
    texts = [text + config.suffix for text in texts]
    encoded = list(_plain_tokens(texts, config.first_tokens, tokenizer))
    if config.first_tokens is not None:
        texts = [decode_start(ids, tokenizer) for ids in encoded]
    return {row: _Prompt(row, ids, text) for row, ids, text in zip(rows, encoded, texts, strict=True)}


def _plain_tokens(texts: list[str], first: int | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    """Yield the tokens of each text, or only the first `first` ones.

    Tokenizing thousands of long texts for a few tokens each is slow, so only the start of a text is tokenized, twice as
    long as needed on average (a token has 4 characters). The cut can change the tokens of the word in which it is, but
    hardly earlier ones, because tokenizers split text into words first. So if at least 8 more tokens follow, the first
    ones are those of the whole text; otherwise the whole text is tokenized.
    """
    starts = texts if first is None else [text[: 8 * first] for text in texts]
    for text, start, ids in zip(texts, starts, plain_tokens(starts, tokenizer), strict=True):
        if first is not None and len(start) < len(text) and len(ids) < first + 8:
            ids = plain_tokens([text], tokenizer)[0]
        yield tuple(ids[:first])


def _chat_prompt(row: int, table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _Prompt:
    """The prompt of a list of messages, or of a text with `chat: always`, by the chat template of the tokenizer."""
    value, where = table.column(config.column)[row], f"{table.where(row)}: the prompt in column {config.column}"
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not are_messages(messages):
        raise DataError(
            f"{where} is neither text nor a list of chat messages ({{role, content}}), but {str(value)[:80]!r}"
            f" ({type(value).__name__})."
        )
    if config.chat == "never":
        raise DataError(f"{where} is a list of chat messages, and data.chat is never. Set it to auto or always.")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where} ends with an assistant's message: it already contains the answer. Remove that message."
        )
    if not messages[-1]["content"].strip():
        raise DataError(f"{where} is empty.")
    messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + config.suffix}]
    arguments = template_arguments(config)
    ids = template_tokens(messages, where, tokenizer, to_be_answered=True, arguments=arguments)
    text = template_text(messages, where, tokenizer, to_be_answered=True, arguments=arguments)
    return _Prompt(row, ids, text, messages)
