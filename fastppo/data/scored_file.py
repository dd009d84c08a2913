"""Scored responses in a file: its columns, how it is read, and how a file of rows is written whole.

One row is one response. The file is JSONL, or Parquet, or a folder of Parquet parts, whose rows follow each other in
the order of the parts' names. `COLUMNS` lists the columns; all others belong to the data that the prompts came from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.data.tables import DataError, Table, read_table

BY_SOURCE = "score/"  # score/0, score/1, ...: the score of each source of `rewards`, before weights


@dataclass(frozen=True)
class Column:
    """A column of scored responses."""

    name: str
    kind: str  # text, whole, number, flag, list, any
    meaning: str
    required: bool = False  # by every reader; the others may be absent, or null in every row


COLUMNS = (
    Column("prompt", "any", "the prompt as in the data: text, or chat messages", required=True),
    Column("prompt_index", "whole", "number of the prompt from 0; the samples of one prompt share it", required=True),
    Column("sample", "whole", "number of the response among those to its prompt, from 0", required=True),
    Column("response", "text", "the response as text, without the token that ends it; turns on lines", required=True),
    Column("tokens", "list", "the response's token ids; of a conversation those that the policy wrote"),
    Column("logprobs", "list", "of each token, in nats, as the sampler gave it"),
    Column("conversation", "list", "with an environment: messages of prompt, turns and observations"),
    Column("turn_rewards", "list", "with an environment: its reward for each turn"),
    Column("score", "number", "the weighted score of all sources: the proxy", required=True),
    Column("judge", "number", "the score of the judge, for which nothing is chosen or trained"),
    Column("ended", "flag", "whether the response ended by itself, and not at the maximum length"),
)
PER_TOKEN = ("tokens", "logprobs")  # most of a file; a reader that does not need them leaves them out
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "text"),
    "whole": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "flag": ((bool,), "true or false"),
    "list": ((list,), "a list"),
}


def is_reserved(name: str) -> bool:
    """Whether a column has a meaning here, so that a column of the data cannot have this name."""
    return name.startswith(BY_SOURCE) or name in {column.name for column in COLUMNS}


@dataclass(frozen=True)
class ScoredResponses:
    """The rows of a file of scored responses, checked."""

    table: Table
    prompts: tuple[tuple[int, ...], ...]  # for each prompt, its rows by sample number

    @property
    def scores(self) -> list[list[float]]:
        return self._by_prompt("score")

    @property
    def judges(self) -> list[list[float]] | None:
        """None if no row has a judge."""
        return self._by_prompt("judge") if "judge" in self.table.columns else None

    def _by_prompt(self, name: str) -> list[list[float]]:
        values = self.table.columns[name]
        return [[float(values[row]) for row in rows] for rows in self.prompts]

    @property
    def data_columns(self) -> list[str]:
        """The columns that belong to the data."""
        return [name for name in self.table.columns if not is_reserved(name)]


def read_scored(path: Path, *, leave_out: Collection[str] = PER_TOKEN) -> ScoredResponses:
    """Read scored responses. leave_out: columns that are not kept in memory.

    Raises DataError with the line (or row) if a row is not readable, lacks a column, has a value of another type or a
    score that is not finite, or if two rows are the same sample.
    """
    table = _read(path, leave_out)
    present = {name: values for name, values in table.columns.items() if not _is_absent(name, values)}
    table = Table(table.source, present, table.lines)
    for column in COLUMNS:
        if column.name in present:
            _check_column(table, column)
        elif column.required:
            raise DataError(
                f"{table.source} has no column {column.name}; it has {', '.join(present)}. Scored responses have the"
                f" columns {', '.join(c.name for c in COLUMNS if c.required)}."
            )
    for name in present:
        if name.startswith(BY_SOURCE):
            _check_column(table, Column(name, "number", ""))
    return ScoredResponses(table, _grouped(table))


def _read(path: Path, leave_out: Collection[str]) -> Table:
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    if not path.is_dir() and path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: scored responses are in a .jsonl or .parquet file, or in a folder of .parquet parts.")
    if path.is_dir() and not any(path.glob("*.parquet")):
        raise DataError(f"{path} is a folder without .parquet parts.")
    return read_table(str(path), leave_out=leave_out)


def _is_absent(name: str, values: Sequence[Any]) -> bool:
    optional = {column.name for column in COLUMNS if not column.required}
    return name in optional and all(value is None for value in values)


def _check_column(table: Table, column: Column) -> None:
    for row, value in enumerate(table.columns[column.name]):
        where = f"{table.where(row)}: {column.name}"
        if value is None:
            raise DataError(f"{where} is missing or null; every row must have it. Correct or remove the row.")
        if column.kind == "any":
            continue
        types, said = KINDS[column.kind]
        if not isinstance(value, types) or (isinstance(value, bool) and column.kind != "flag"):
            raise DataError(f"{where} is {str(value)[:80]!r}, not {said}. Correct or remove the row.")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where} is {value}. Score the response again, or remove the row.")


def _grouped(table: Table) -> tuple[tuple[int, ...], ...]:
    """The rows of each prompt by sample number, prompts in the order of their numbers."""
    rows_of: dict[int, dict[int, int]] = {}
    columns = table.columns
    for row, (prompt, sample) in enumerate(zip(columns["prompt_index"], columns["sample"], strict=True)):
        rows = rows_of.setdefault(prompt, {})
        if sample in rows:
            raise DataError(
                f"{table.where(row)}: sample {sample} of prompt_index {prompt} is there already"
                f" ({table.where(rows[sample])}). Remove one; if files were joined, number their prompts anew."
            )
        rows[sample] = row
        first = next(iter(rows.values()))
        if columns["prompt"][row] != columns["prompt"][first]:
            raise DataError(
                f"{table.where(row)}: prompt_index {prompt} has another prompt than in {table.where(first)}. If files"
                " were joined, number their prompts anew."
            )
    return tuple(tuple(rows[sample] for sample in sorted(rows)) for _, rows in sorted(rows_of.items()))


@contextmanager
def whole_file(path: Path, option: str) -> Iterator[Path]:
    """A draft to write to, which takes the place of `path` at the end: a reader never sees half a file.

    option: with which the user names the file, for the message. Raises DataError if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}). Give another {option}.") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_rows(path: Path, columns: Mapping[str, Sequence[Any]], option: str) -> None:
    """Write a .jsonl or .parquet file whole. columns: by name, a value for each row. Raises DataError."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with whole_file(path, option) as draft:
            try:
                table = pyarrow.Table.from_pydict({name: list(values) for name, values in columns.items()})
            except (pyarrow.ArrowException, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: a column cannot be written as Parquet ({error}). Give {option} a name in .jsonl."
                ) from error
            pyarrow.parquet.write_table(table, draft)
        return
    if path.suffix != ".jsonl":
        raise DataError(f"{option} {path} must end in .jsonl or .parquet.")
    with whole_file(path, option) as draft, draft.open("w", encoding="utf-8") as file:
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: a row cannot be written as JSON ({error}). Give {option} a name in .parquet."
                ) from error
