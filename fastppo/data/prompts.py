"""Prompts: rows of a table turned into tokens, split into training and held-out ones, dealt out in batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastppo.config import DataConfig
from fastppo.data.continuation import decode_start, plain_tokens
from fastppo.data.conversations import Messages, are_messages, check_arguments, template_text, template_tokens
from fastppo.data.tables import DataError, Table, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fastppo")

RESERVED = {"prompts", "responses"}  # what a reward function receives beside the columns


@dataclass(frozen=True)
class PromptSet:
    """P prompts, and what a reward function is told about each."""

    tokens: tuple[tuple[int, ...], ...]  # P prompts
    texts: tuple[str, ...]  # P; as in the data; cut ones decoded, without BOS; chat as the template writes it
    columns: dict[str, list[Any]]  # every column of the data, P raw values each: chat as messages, CSV as text
    messages: tuple[Messages | None, ...] = ()  # P, None where a prompt is plain text; none at all where all are

    def __len__(self) -> int:
        return len(self.tokens)

    def messages_of(self, rows: Sequence[int]) -> list[Messages | None]:
        return [self.messages[row] if self.messages else None for row in rows]


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
    """Training prompts in the order of the data, and `prompts_heldout` evaluation prompts that are not among them.

    The held-out choice depends on the data and `split_seed` alone. `context` is the model's longest sequence, in
    tokens (None: unknown), of which `reserve` are kept for the response. Raises `DataError`.
    """
    longest = config.max_prompt_tokens
    if context is not None and longest + reserve > context:
        raise DataError(
            f"data.max_prompt_tokens {longest} + sampling.max_new_tokens {reserve} = {longest + reserve} tokens, but"
            f" the model's context holds {context}. Set data.max_prompt_tokens to {max(context - reserve, 0)} or less,"
            " or lower sampling.max_new_tokens."
        )
    check_arguments("data.template", config.template, tokenizer)
    table = read_table(config.path, config.name, config.split)
    prompts = _prompts(table, _shuffled(len(table), f"{config.split_seed}")[: config.limit], config, tokenizer)
    if config.eval_path is None:
        heldout = _prompt_set(table, prompts[:prompts_heldout])
    else:
        name = config.name if config.eval_path == config.path else None
        other = read_table(config.eval_path, name, config.eval_split)
        found = _prompts(other, _shuffled(len(other), f"{config.split_seed}"), config, tokenizer)
        heldout = _prompt_set(other, found[:prompts_heldout])
    if len(heldout) < prompts_heldout:
        raise DataError(
            f"{config.eval_path or config.path} has {len(heldout)} usable prompts, but eval.prompts asks for"
            f" {prompts_heldout}. Lower eval.prompts or give more prompts."
        )
    seen = set(heldout.tokens)  # by content: a prompt that the data repeats may not stand on both sides
    rest = [prompt for prompt in prompts if prompt.tokens not in seen]
    if not rest:
        raise DataError(
            f"{config.path} has {len(prompts)} usable prompts, and holding out {len(heldout)} for evaluation leaves"
            " none to train on. Lower eval.prompts or give more prompts."
        )
    log.info("%s: %d prompts to train on, %d held out", config.path, len(rest), len(heldout))
    return _prompt_set(table, sorted(rest, key=lambda prompt: prompt.row)), heldout


def batches(prompts: Sized, *, size: int, seed: int, shuffle: bool, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of exactly `size` prompt indices, from batch number `start` on.

    The batches are cut from one long row of passes over the prompts; with `shuffle` each pass has an order of its
    own. So a batch may span passes, and batch k is a function of `seed` and k alone.
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
    """0 .. count - 1 in an order that depends on `key` alone, the same on every machine and rank."""
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
    return PromptSet(tokens, texts, columns, tuple(prompt.messages for prompt in prompts))


def _prompts(table: Table, rows: list[int], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[_Prompt]:
    """The rows that make usable prompts, in the given order."""
    values = table.column(config.column)
    chats = {row for row in rows if config.chat == "always" or not isinstance(values[row], str)}
    made = {row: _chat_prompt(row, table, config, tokenizer) for row in chats}
    made |= _plain_prompts([row for row in rows if row not in chats], table, config, tokenizer)
    kept = []
    short = long = 0
    for row in rows:
        length = len(made[row].tokens)
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
            kept.append(made[row])
    _report(table, config, len(rows), short, long)
    return kept


def _report(table: Table, config: DataConfig, rows: int, short: int, long: int) -> None:
    """One log line about what was left out; an error if that was all."""
    dropped = [f"{long} longer than data.max_prompt_tokens {config.max_prompt_tokens}"] if long else []
    dropped += [f"{short} shorter than data.first_tokens {config.first_tokens}"] if short else []
    if short + long == rows:
        raise DataError(f"{table.source}: none of its {rows} prompts is left: {', '.join(dropped)}.")
    if dropped:
        log.info("%s: left out %d of %d prompts: %s", table.source, short + long, rows, ", ".join(dropped))
    if clash := sorted(RESERVED.intersection(table.columns)):
        log.info("%s: reward functions do not receive %s; the names are taken", table.source, ", ".join(clash))


def _plain_prompts(
    rows: list[int], table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[int, _Prompt]:
    texts = [table.column(config.column)[row] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not text.strip() and config.first_tokens is None:
            raise DataError(f"{table.where(row)}: the prompt in column {config.column} is empty.")
    encoded = list(_plain_tokens(texts, config.first_tokens, tokenizer))
    if config.first_tokens is not None:
        texts = [decode_start(ids, tokenizer) for ids in encoded]
    return {row: _Prompt(row, ids, text) for row, ids, text in zip(rows, encoded, texts, strict=True)}


def _plain_tokens(texts: list[str], first: int | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    """The tokens of each text, or only the first so many.

    Tokenizing thousands of long texts for a few tokens each is slow, so only the start of a text is tokenized, with
    room to spare (a token has 4 characters on average). The cut can change tokens near it, but hardly further away
    than the word it goes through: tokenizers split text into words first. So the first tokens are those of the whole
    text if some more follow them, and where none do the whole text is tokenized.
    """
    starts = texts if first is None else [text[: 8 * first] for text in texts]
    for text, start, ids in zip(texts, starts, plain_tokens(starts, tokenizer), strict=True):
        if first is not None and len(start) < len(text) and len(ids) < first + 8:
            ids = plain_tokens([text], tokenizer)[0]
        yield tuple(ids[:first])


def _chat_prompt(row: int, table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _Prompt:
    """A list of messages, or with `chat: always` a text, through the tokenizer's chat template."""
    value, where = table.column(config.column)[row], f"{table.where(row)}: the prompt in column {config.column}"
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not are_messages(messages):
        raise DataError(
            f"{where} is neither text nor a list of chat messages ({{role, content}}), but {str(value)[:80]!r}"
            f" ({type(value).__name__})."
        )
    if config.chat == "never":
        raise DataError(f"{where} is a list of chat messages, and data.chat is never. Set it to auto or always.")
    if not messages[-1]["content"].strip():
        raise DataError(f"{where} is empty.")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where} ends with an assistant's message: it holds the answer already. Remove that message.")
    given = config.template
    ids = template_tokens(messages, where, tokenizer, to_be_answered=True, arguments=given)
    text = template_text(messages, where, tokenizer, to_be_answered=True, arguments=given)
    return _Prompt(row, ids, text, messages)
