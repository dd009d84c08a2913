"""Examples that are learned from beside sampled responses: preference pairs, responses to prompts, and plain text."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastppo.config import AnswersConfig, ExamplesConfig, PairsConfig, TextConfig
from fastppo.data.conversations import NO_ARGUMENTS, Answered, check_template, encode_answer, encode_turns
from fastppo.data.packed import Packed, pack
from fastppo.data.tables import DataError, Table, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fastppo")


@dataclass(frozen=True)
class Examples:
    """E examples of S packed sequences each: the chosen and the rejected answer of a pair, or one response."""

    packed: Packed  # E * S sequences, those of an example next to each other; on the CPU
    each: int  # S, the number of sequences of an example
    margins: Tensor  # (E,) fp32, of pairs; else 0

    def __len__(self) -> int:
        return len(self.packed) // self.each

    @cached_property
    def lengths(self) -> Tensor:  # (E,) int64, tokens of all sequences of an example
        return self.packed.lengths.view(-1, self.each).sum(1)

    @cached_property
    def response_lengths(self) -> Tensor:  # (E,) int64
        return self.packed.response_lengths.view(-1, self.each).sum(1)

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each sequence."""
        return [part.tolist() for part in self.packed.tokens.split(self.packed.lengths.tolist())]

    def first(self, count: int) -> Examples:
        """The first `count` examples, or all if there are fewer."""
        indices = torch.arange(min(count, len(self)))
        return Examples(self.packed.select(self.sequences(indices)), self.each, self.margins[indices])

    def sequences(self, examples: Tensor) -> Tensor:
        """Indices of the given examples' sequences in `packed`, int64."""
        return (examples[:, None] * self.each + torch.arange(self.each)).flatten()


class Example(NamedTuple):
    sequences: tuple[tuple[int, ...], ...]  # S
    response_lengths: tuple[int, ...]  # S
    margin: float


class Candidate(NamedTuple):
    where: str  # the row, for messages
    answers: tuple[Answered, ...]  # S
    margin: float = 0.0


Reader = Callable[[Table], Iterator[Candidate]]


def load_pairs(
    config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, heldout: int, context: int | None, closed: bool = True
) -> tuple[Examples, Examples]:
    """Load training pairs and `heldout` held-out pairs; no held-out answer is trained on, even if the data repeats it.

    The order of both depends on the data and `split_seed` only. context: of the model, in tokens (None: unknown);
    closed: chat answers end as the template closes them, which reward models read, and not with the token that ends a
    turn, with which a policy's responses end. Raises `DataError`.
    """
    check_template(config, tokenizer)
    pairs = _rated_pairs if config.rating is not None else _pairs
    return _load(config, partial(pairs, config=config, tokenizer=tokenizer, closed=closed), 2, heldout, context)


def load_answers(
    config: AnswersConfig, tokenizer: PreTrainedTokenizerBase, *, heldout: int, context: int | None
) -> tuple[Examples, Examples]:
    """Load training responses and `heldout` held-out responses, in the way of `load_pairs`."""
    check_template(config, tokenizer)
    return _load(config, partial(_answers, config=config, tokenizer=tokenizer), 1, heldout, context)


def load_texts(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    template: Mapping[str, Any] = NO_ARGUMENTS,
) -> Examples:
    """Load texts that are learned beside responses, one a row, in the way of `load_answers`. None is held out.

    template: arguments of the chat template.
    """
    shared_settings = {f.name for f in fields(TextConfig)} & {f.name for f in fields(AnswersConfig)}
    of_group = type("GivenTexts", (AnswersConfig,), {"group": config.group})
    answers = of_group(**{name: getattr(config, name) for name in shared_settings}, template=dict(template))
    _check_context(answers, context)
    read = partial(_answers, config=answers, tokenizer=tokenizer)
    texts = _packed(_usable(read_table(config.path, config.name, config.split), answers, read, config.limit), 1)
    log.info("%s: %d texts of %d tokens for %s", config.path, len(texts), len(texts.packed.tokens), config.group)
    return texts


def _check_context(config: ExamplesConfig, context: int | None) -> None:
    if context is not None and config.max_tokens > context:
        raise DataError(
            f"{config.group}.max_tokens is {config.max_tokens}, but the model's context holds {context} tokens. Set it"
            f" to {context} or less; {config.group}.too_long says what happens to longer examples."
        )


def _load(
    config: ExamplesConfig, read: Reader, each: int, heldout: int, context: int | None
) -> tuple[Examples, Examples]:
    _check_context(config, context)
    usable = _usable(read_table(config.path, config.name, config.split), config, read, config.limit)
    if config.eval_path is None:
        held_out = usable[:heldout]
    else:
        name = config.name if config.eval_path == config.path else None
        held_out = _usable(read_table(config.eval_path, name, config.eval_split), config, read, heldout)
    if len(held_out) < heldout:
        raise DataError(
            f"{config.eval_path or config.path} has {len(held_out)} usable examples, but eval.examples asks for"
            f" {heldout}. Lower eval.examples or give more data."
        )
    heldout_sequences = {sequence for example in held_out for sequence in example.sequences}
    training = [example for example in usable if heldout_sequences.isdisjoint(example.sequences)]
    if not training:
        raise DataError(
            f"{config.path} has {len(usable)} usable examples, and holding out {len(held_out)} for evaluation leaves"
            " none to train on. Lower eval.examples or give more data."
        )
    log.info("%s: %d examples to train on, %d held out", config.path, len(training), len(held_out))
    return _packed(training, each), _packed(held_out, each)


def _packed(examples: Sequence[Example], each: int) -> Examples:
    sequences = [sequence for example in examples for sequence in example.sequences]
    lengths = [length for example in examples for length in example.response_lengths]
    return Examples(pack(sequences, lengths), each, torch.tensor([example.margin for example in examples]))


def _usable(table: Table, config: ExamplesConfig, read: Reader, limit: int | None) -> list[Example]:
    """The usable examples, at most `limit`; logs how many were dropped or cut."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()  # reason -> number of examples
    cut = 0
    for candidate in read(table):
        problem = _problem(candidate)
        if problem is not None and config.unusable == "error":
            raise DataError(f"{candidate.where}: {problem}. Remove the row, or set {config.group}.unusable to drop.")
        longest = max(len(each.prompt) + len(each.answer) for each in candidate.answers)
        if problem is None and longest > config.max_tokens:
            if config.too_long == "error":
                raise DataError(
                    f"{candidate.where}: prompt and answer have {longest} tokens, more than {config.group}.max_tokens"
                    f" {config.max_tokens}. Raise it, or set {config.group}.too_long to drop or cut."
                )
            if config.too_long == "drop":
                problem = f"longer than {config.group}.max_tokens {config.max_tokens}"
            else:
                candidate, cut = _cut(candidate, config.max_tokens), cut + 1
                if (problem := _problem(candidate)) is not None:
                    problem = f"{problem} after cutting at {config.group}.max_tokens {config.max_tokens}"
        if problem is not None:
            dropped[problem] += 1
            continue
        examples.append(_example(candidate))
        if len(examples) == limit:
            break
    reasons = ", ".join(f"{count} ({reason})" for reason, count in dropped.items())
    if not examples:
        raise DataError(f"{table.source}: there is no usable example: {reasons}. {_way_out(dropped, config)}")
    if dropped:
        count = dropped.total()
        log.warning("%s: dropped %d of %d examples: %s", table.source, count, count + len(examples), reasons)
    if cut:
        bound = f"{config.group}.max_tokens {config.max_tokens}"
        log.warning("%s: cut the answers of %d examples at %s", table.source, cut, bound)
    return examples


def _way_out(dropped: Counter[str], config: ExamplesConfig) -> str:
    """The way out if no example is usable, for the message."""
    group = config.group
    if any(f"{group}.max_tokens" in reason for reason in dropped):
        return f"Raise {group}.max_tokens, or, if the prompts are shorter than that, set {group}.too_long to cut."
    if any("chat template" in reason for reason in dropped):
        return "Use a tokenizer with another chat template, or give plain text."
    names = ", ".join(f"{group}.{name}" for name in config.columns)
    return f"Correct the rows, or name other columns ({names})."


def _problem(candidate: Candidate) -> str | None:
    answers = candidate.answers
    if (problem := next((each.problem for each in answers if each.problem is not None), None)) is not None:
        return problem
    if any(not each.answer for each in answers):
        return "an empty answer"
    if len(answers) == 2 and answers[0] == answers[1]:
        return "the two answers are equal"
    if any(len(each.prompt) + len(each.answer) < 2 for each in answers):
        return "a single token, which no other token predicts"
    return None


def _cut(candidate: Candidate, longest: int) -> Candidate:
    """Cut each answer so that prompt and answer have `longest` tokens; the EOS is cut off too."""
    cut = (each._replace(answer=each.answer[: max(longest - len(each.prompt), 0)]) for each in candidate.answers)
    return candidate._replace(answers=tuple(cut))


def _example(candidate: Candidate) -> Example:
    sequences = tuple((*each.prompt, *each.answer) for each in candidate.answers)
    # without a prompt and without a BOS no token predicts the first one
    lengths = tuple(len(each.answer) if each.prompt else len(each.answer) - 1 for each in candidate.answers)
    return Example(sequences, lengths, candidate.margin)


def _pairs(
    table: Table, config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, closed: bool
) -> Iterator[Candidate]:
    prompts = _prompts(table, config)
    answers = (_column(table, config, "chosen"), _column(table, config, "rejected"))
    margins = None if config.margin is None else _column(table, config, "margin")
    for row in _order(table, config):
        margin = 0.0 if margins is None else _number(margins[row], _where(table, row, config.margin))
        both = (
            encode_answer(
                prompts[row], column[row], config, _where(table, row, config.prompt, name), tokenizer, closed=closed
            )
            for column, name in zip(answers, (config.chosen, config.rejected), strict=True)
        )
        yield Candidate(_where(table, row, config.prompt, config.chosen, config.rejected), tuple(both), margin)


def _rated_pairs(
    table: Table, config: PairsConfig, tokenizer: PreTrainedTokenizerBase, *, closed: bool
) -> Iterator[Candidate]:
    """Pairs of answers to one prompt: the best with the worst, the second best with the second worst, and so on."""
    assert config.rating is not None
    prompts = _prompts(table, config)
    answers, ratings = _column(table, config, "answer"), _column(table, config, "rating")
    of_prompt: dict[str, list[tuple[float, int]]] = {}
    for row in _order(table, config):
        rating = _number(ratings[row], _where(table, row, config.rating))
        of_prompt.setdefault(json.dumps(prompts[row]), []).append((rating, row))
    pairs = []
    for rated in of_prompt.values():
        rated.sort(key=lambda pair: pair[0])
        best_and_worst = zip(reversed(rated), islice(rated, len(rated) // 2), strict=False)
        pairs += [(best, worst) for (high, best), (low, worst) in best_and_worst if high > low]
    if not pairs:
        raise DataError(
            f"{table.source} contains no pair: no two answers to one prompt have different ratings in the column"
            f" {config.rating} ({_few(ratings)}), over {len(of_prompt)} different prompts. Name another column with"
            " data.rating or data.prompt."
        )
    random.Random(f"{config.split_seed}").shuffle(pairs)
    for rows in pairs:
        wheres = [_where(table, row, config.prompt, config.answer) for row in rows]
        both = (
            encode_answer(prompts[row], answers[row], config, where, tokenizer, closed=closed)
            for row, where in zip(rows, wheres, strict=True)
        )
        yield Candidate(f"{table.where(rows[0])} and {wheres[1]}", tuple(both))


def _few(values: Sequence[Any]) -> str:
    """The first different values, for messages."""
    different = list(dict.fromkeys(map(str, values)))
    return ", ".join(different[:4]) + ", ..." * (len(different) > 4)


def _answers(table: Table, config: AnswersConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Candidate]:
    if config.messages is not None:
        conversations = _column(table, config, "messages")
        for row in _order(table, config):
            where = _where(table, row, config.messages)
            for turn in encode_turns(conversations[row], config, where, tokenizer):
                yield Candidate(where, (turn,))
        return
    prompts, responses = _prompts(table, config), _column(table, config, "response")
    for row in _order(table, config):
        where = _where(table, row, config.prompt, config.response)
        yield Candidate(where, (encode_answer(prompts[row], responses[row], config, where, tokenizer),))


def _where(table: Table, row: int, *columns: str | None) -> str:
    """A row and its columns, for messages. None: a column that is not used."""
    *others, last = [name for name in columns if name is not None]
    named = f"columns {', '.join(others)} and {last}" if others else f"column {last}"
    return f"{table.where(row)}, {named}"


def _prompts(table: Table, config: ExamplesConfig) -> list[Any]:
    name = config.prompt
    if name is not None and name not in table.columns:
        raise DataError(
            f"{table.source} has no column {name}. It has {', '.join(table.columns)}; name one with"
            f" {config.group}.prompt, or set it to null if answers have no prompt or are whole conversations."
        )
    return [None] * len(table) if name is None else table.columns[name]


def _column(table: Table, config: ExamplesConfig, setting: str) -> list[Any]:
    """The values of the column that this setting names."""
    return table.column(getattr(config, setting), f"{config.group}.{setting}")


def _order(table: Table, config: ExamplesConfig) -> list[int]:
    """The rows in random order, so that the first rows are a random sample."""
    rows = list(range(len(table)))
    random.Random(f"{config.split_seed}").shuffle(rows)
    return rows


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where} contains {value!r}, which is not a number. Correct or remove the row.")
    return number
