"""Tables from a file, a `datasets` directory or the hub, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastppo.data.paths import locate
from fastppo.errors import FastPPOError

SURROGATE = re.compile("[\ud800-\udfff]")  # one of the two code units with which UTF-16 encodes one character


class DataError(FastPPOError):
    """Data that cannot be used. The message names the file, the row or line, and what to do."""


@dataclass(frozen=True)
class Table:
    """The columns of a data source."""

    source: str  # for messages
    columns: dict[str, list[Any]]  # every column has one value for each row
    lines: tuple[int, ...] = ()  # the line at which each row ends, in a text file

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        return f"{self.source}, line {self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"

    def column(self, name: str, setting: str = "data.column") -> list[Any]:
        """The column of this name; setting: with which the user names it, for the message."""
        if name not in self.columns:
            raise DataError(
                f"{self.source} has no column {name}. It has {', '.join(self.columns)}; name one with {setting}."
            )
        return self.columns[name]


def read_table(path: str, name: str | None = None, split: str = "train", *, leave_out: Collection[str] = ()) -> Table:
    """Read a .jsonl, .csv or .parquet file, a folder of .parquet parts, a directory of `datasets.save_to_disk`, or a
    dataset from the hub.

    path: may be `package:NAME/FILE`. name, split: of a dataset on the hub; a saved DatasetDict has splits too.
    leave_out: columns of .jsonl or .parquet files that are not kept, for a reader that needs few of many. The rows of
    parts follow each other in the order of the parts' names. Raises `DataError`.
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": partial(_read_jsonl, leave_out=leave_out),
        ".csv": _read_csv,
        ".parquet": partial(_read_parquet, leave_out=leave_out),
    }
    try:
        local = locate(path)
    except FileNotFoundError as error:
        raise DataError(str(error)) from error
    if local.is_dir() and any(local.glob("*.parquet")):
        table = _read_parts(local, leave_out)
    elif local.is_dir():
        table = _read_directory(local, split)
    elif local.suffix in readers or local.is_file():
        if local.suffix not in readers:
            raise DataError(f"{local}: a data file must end in {', '.join(readers)}.")
        if not local.is_file():
            raise DataError(f"{local}: there is no such file.")
        if name is not None or split != "train":
            raise DataError(f"{local} is one file: it has neither a configuration {name!r} nor a split {split!r}.")
        table = readers[local.suffix](local)
    else:
        table = _read_hub(path, name, split)
    if len(table) == 0:
        raise DataError(f"{table.source} is empty: it has no rows.")
    return table


def _read_jsonl(path: Path, leave_out: Collection[str]) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(f"{path}, line {number}: this is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f'{path}, line {number}: each line must be an object, as in {{"prompt": "..."}}.')
            if b"\\u" in line or b"\xed" in line:  # only such lines can contain a lone surrogate
                _check_no_surrogate(row, f"{path}, line {number}")
            rows.append({key: value for key, value in row.items() if key not in leave_out} if leave_out else row)
            lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, tuple(lines))


def _read_parts(folder: Path, leave_out: Collection[str]) -> Table:
    parts = [_read_parquet(path, leave_out=leave_out) for path in sorted(folder.glob("*.parquet"))]
    for part in parts[1:]:
        if different := sorted(set(part.columns) ^ set(parts[0].columns)):
            raise DataError(
                f"{part.source} and {parts[0].source} do not have the same columns: only one has"
                f" {', '.join(different)}. Were two runs written to one folder?"
            )
    return Table(str(folder), {name: [v for part in parts for v in part.columns[name]] for name in parts[0].columns})


def _check_no_surrogate(value: Any, where: str) -> None:
    """Raises DataError for text with a lone surrogate, which tokenizers and UTF-8 files cannot represent."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_no_surrogate(name, f"{where}, a name")
            _check_no_surrogate(item, f"{where}, {name}")
    elif isinstance(value, list):
        for item in value:
            _check_no_surrogate(item, where)
    elif isinstance(value, str) and (half := SURROGATE.search(value)):
        around = ascii(value[max(half.start() - 20, 0) : half.end() + 20])
        raise DataError(
            f"{where}: the text contains half a character, the lone surrogate {half[0]!a} at {half.start()}, in"
            f" {around}. An emoji may have been cut in two there: correct or remove the row."
        )


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 kB
    rows: list[list[str]] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line 1: two columns have the same name ({', '.join(header)}).")
            for row in reader:
                if len(row) not in (0, len(header)):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)}"
                        f" ({', '.join(header)})."
                    )
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: this is not CSV ({error}).") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {reader.line_num}: this is not UTF-8 ({error.reason}).") from error
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)}, tuple(lines))


def _read_parquet(path: Path, leave_out: Collection[str]) -> Table:
    import pyarrow.parquet

    with _as_data_error(f"{path} cannot be read as Parquet"):
        kept = [name for name in pyarrow.parquet.read_schema(path).names if name not in leave_out]
        return Table(str(path), pyarrow.parquet.read_table(path, columns=kept if leave_out else None).to_pydict())


def _read_directory(path: Path, split: str) -> Table:
    import datasets

    if not any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        raise DataError(f"{path} is a directory, but not one that datasets' save_to_disk wrote. Name a file in it.")
    with _as_data_error(f"{path} cannot be read as a saved dataset"):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path} has no split {split}. It has {', '.join(map(str, loaded))}.")
        return Table(f"{path} ({split})", loaded[split].to_dict())
    if split not in ("train", str(loaded.split)):
        raise DataError(f"{path} is one dataset without splits; it has no split {split}.")
    return Table(str(path), loaded.to_dict())


def _read_hub(path: str, name: str | None, split: str) -> Table:
    import datasets

    with _as_data_error(
        f"{path} is not a local file or directory, and it cannot be loaded from the hub with name {name} and split"
        f" {split}"
    ):
        loaded = datasets.load_dataset(path, name, split=split)
    return Table(f"{path} ({split})", loaded.to_dict())


@contextmanager
def _as_data_error(problem: str) -> Iterator[None]:
    """Within this context, turn any exception of another library into a DataError of one line."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(f"{problem}: {type(error).__name__}: {first_line}") from error
