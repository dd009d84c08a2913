"""A folder of whole Parquet parts, `part-00000.parquet` and so on, each of which is there whole or not at all.

All parts have the same types, which depend on the whole data and not on the rows of a part. A column of the data whose
values have no common type in Parquet (text and numbers, say) is written as text, the JSON of each value.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastppo.checkpoint import atomic_dir
from fastppo.data import BY_SOURCE, DataError, PromptSet
from fastppo.distributed import World
from fastppo.generation.messages import conversation_type, in_columns
from fastppo.generation.rows import own_columns, prompt_values
from fastppo.generation.store import agreed

log = logging.getLogger("fastppo")

DRAFT = ".unfinished-"  # before the name of a part that is being written
AS_JSON = {b"fastppo": b"json"}  # of a field: each value is the JSON of a value of the data
AS_MESSAGES = {b"fastppo": b"messages"}  # of a field: each value is a conversation in the keys of its type


def part_schema(data: PromptSet, *, sources: int, judge: bool, environment: bool = False) -> Any:
    """The `pyarrow.Schema` of the parts: the columns of `scored_rows`, in their order.

    data: all prompts; sources: of reward, beside the environment if there is one. The log names the columns that are
    written as JSON. Raises DataError if some prompts are text and others chats, or if a value can be written neither as
    it is nor as JSON.
    """
    import pyarrow

    prompt = _common_type(prompt_values(data))
    if prompt is None:
        raise DataError(
            "the prompts cannot be one column of Parquet: are some text and others chat messages, or do chats differ in"
            " the form of their messages? Set data.chat to always, or write JSONL if the command can."
        )
    fields = [
        pyarrow.field("prompt", prompt),
        pyarrow.field("prompt_index", pyarrow.int64()),
        pyarrow.field("sample", pyarrow.int64()),
        pyarrow.field("response", pyarrow.string()),
        pyarrow.field("tokens", pyarrow.list_(pyarrow.int32())),
        pyarrow.field("logprobs", pyarrow.list_(pyarrow.float32())),
    ]
    if environment:
        sources += 1
        fields.append(pyarrow.field("conversation", conversation_type(data), metadata=AS_MESSAGES))
        fields.append(pyarrow.field("turn_rewards", pyarrow.list_(pyarrow.float32())))
    scores = ["score"] * (sources > 0) + [f"{BY_SOURCE}{i}" for i in range(sources if sources > 1 else 0)]
    fields += [pyarrow.field(name, pyarrow.float32()) for name in scores + ["judge"] * judge]
    fields.append(pyarrow.field("ended", pyarrow.bool_()))
    for name, values in own_columns(data).items():
        fields.append(_field_of(name, values))
    return pyarrow.schema(fields)


def _field_of(name: str, values: Sequence[Any]) -> Any:
    """A column of the data, as it is or as JSON."""
    import pyarrow

    kind = _common_type(values)
    if kind is not None:
        return pyarrow.field(name, kind)
    for value in values:
        _json_text(name, value)
    kinds = sorted({type(value).__name__ for value in values if value is not None})
    log.warning("the column %s (%s) has no one type in Parquet: it is written as the JSON of each value", name, kinds)
    return pyarrow.field(name, pyarrow.string(), metadata=AS_JSON)


def _common_type(values: Sequence[Any]) -> Any:
    """The Parquet type that holds all of them, None if there is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        kind = pyarrow.array(values).type
        schema = pyarrow.schema([pyarrow.field("column", kind)])
        pyarrow.parquet.write_table(schema.empty_table(), pyarrow.BufferOutputStream())  # not all types can be
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return kind


def _json_text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the column {name} of the data holds {str(value)[:80]!r} ({type(value).__name__}), which can be written"
            f" neither as Parquet nor as JSON ({error}). Remove or convert the column."
        ) from error


class Parts:
    """`Store` in a folder, a part for each batch. All ranks call the methods; rank 0 reads and writes, and all learn of
    what fails."""

    def __init__(self, folder: Path, schema: Any, world: World):
        """schema: from `part_schema`, on rank 0."""
        self.place, self._schema, self._world = folder, schema, world

    def whole(self, counts: Sequence[int]) -> int:
        found = self.rows()
        for number, (there, expected) in enumerate(zip(found, counts, strict=False)):
            if there != expected:
                raise DataError(
                    f"{self.path(number)} has {there} rows, and this run writes {expected} there. Delete it: it will be"
                    " made again."
                )
        return min(len(found), len(counts))

    def keep(self, batches: int) -> None:
        self.remove_from(batches)

    def path(self, number: int) -> Path:
        return self.place / f"part-{number:05d}.parquet"

    def rows(self) -> list[int]:
        """The number of rows of each part that is there, up to the first that is not.

        Raises DataError for a part that is damaged or has other columns.
        """
        answer: list[int] | DataError = []
        if self._world.rank == 0:
            try:
                answer = self._rows()
            except DataError as error:
                answer = error
        return agreed(answer, self._world)

    def _rows(self) -> list[int]:
        import pyarrow
        import pyarrow.parquet

        counts: list[int] = []
        while (path := self.path(len(counts))).exists():
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    schema, rows = file.schema_arrow, file.metadata.num_rows
            except (OSError, pyarrow.ArrowException) as error:
                said = str(error).splitlines()[0]
                raise DataError(f"{path} cannot be read ({said}). Delete it: it will be made again.") from error
            if not schema.equals(self._schema, check_metadata=False):
                raise DataError(
                    f"{path} has other columns than this run writes: {', '.join(schema.names)} and not"
                    f" {', '.join(self._schema.names)}, or other types. Give another output."
                )
            counts.append(rows)
        return counts

    def remove_from(self, number: int) -> None:
        """Delete drafts, and the parts from this number on. Raises DataError."""
        problem = None
        if self._world.rank == 0:
            kept = {self.path(k).name for k in range(number)}
            try:
                drafts, parts = (sorted(self.place.glob(pattern)) for pattern in (f"{DRAFT}*", "part-*.parquet"))
                for path in [*drafts, *(part for part in reversed(parts) if part.name not in kept)]:
                    path.unlink()
            except OSError as error:
                problem = DataError(f"{error.filename} cannot be deleted ({error.strerror}).")
        agreed(problem, self._world)

    def write(self, number: int, columns: Mapping[str, Sequence[Any]] | None) -> None:
        """Write a part; where this returns, the part is on the disk. columns: as `scored_rows` gives them; they are
        wanted on rank 0 only.

        Raises DataError if it cannot be written; all earlier parts are as they were.
        """
        problem = None
        if self._world.rank == 0:
            assert columns is not None
            try:
                self._write(self.path(number), columns)
            except DataError as error:
                problem = error
        agreed(problem, self._world)

    def _write(self, path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
        import pyarrow
        import pyarrow.parquet

        arrays = []
        for field in self._schema:
            values = columns[field.name]
            if field.metadata == AS_JSON:
                values = [_json_text(field.name, value) for value in values]
            if field.metadata == AS_MESSAGES:
                values = [in_columns(value, field.type) for value in values]
            try:
                arrays.append(pyarrow.array(values, field.type))
            except (pyarrow.ArrowException, OverflowError, TypeError, ValueError) as error:
                raise DataError(f"{path}: the column {field.name} cannot be written ({error}).") from error
        content = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema), content)
        draft = path.with_name(DRAFT + path.name)
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
            atomic_dir.sync(self.place)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise DataError(
                f"{path} cannot be written ({error.strerror or error}). All parts before it are whole: make room, and"
                " continue with --resume auto."
            ) from error
