"""A JSONL file of responses, of which a run that ends at any moment leaves whole batches."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from fastppo.data import DataError, PromptSet
from fastppo.distributed import World
from fastppo.generation.rows import own_columns, prompt_values
from fastppo.generation.store import agreed


def check_json(data: PromptSet) -> None:
    """Raises DataError for the first value of the data that a JSON file cannot hold."""
    for name, values in {"prompt": prompt_values(data), **own_columns(data)}.items():
        for value in values:
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"the column {name} of the data holds {str(value)[:80]!r} ({type(value).__name__}), which cannot be"
                    f" written as JSON ({error}). Set format to parquet, or correct the data."
                ) from error


class Lines:
    """`Store` in one file, a line for each response."""

    def __init__(self, path: Path, samples: int, world: World):
        """samples: responses to a prompt."""
        self.place, self._samples, self._world = path, samples, world
        self._ends: list[int] = [0]  # bytes up to each batch that is there, from the start of the first

    def whole(self, counts: Sequence[int]) -> int:
        answer: int | DataError = 0
        if self._world.rank == 0:
            try:
                answer = self._whole(counts)
            except OSError as error:
                answer = DataError(f"{self.place} cannot be read ({error.strerror}).")
        return agreed(answer, self._world)

    def _whole(self, counts: Sequence[int]) -> int:
        self._ends = [0]
        if not self.place.exists():
            return 0
        first = size = 0
        with self.place.open("rb") as file:
            for count in counts:
                lines = list(islice(file, count))
                if len(lines) < count or not self._are_rows(lines, first):
                    break  # torn, or not on the disk when the machine went down
                size += sum(map(len, lines))
                self._ends.append(size)
                first += count
        return len(self._ends) - 1

    def _are_rows(self, lines: Sequence[bytes], first: int) -> bool:
        """Whether the lines are whole, and the first and the last the rows that belong there. first: number of the
        first row."""
        if not all(line.endswith(b"}\n") for line in lines):
            return False
        for offset in {0, len(lines) - 1}:
            try:
                row = json.loads(lines[offset])
                place = int(row["prompt_index"]) * self._samples + int(row["sample"])
            except (ValueError, KeyError, TypeError):
                return False
            if place != first + offset:
                return False
        return True

    def keep(self, batches: int) -> None:
        problem = None
        if self._world.rank == 0:
            del self._ends[batches + 1 :]
            try:
                if self.place.exists():
                    self._truncate()
            except OSError as error:
                problem = DataError(f"{self.place} cannot be shortened to its whole batches ({error.strerror}).")
        agreed(problem, self._world)

    def _truncate(self) -> None:
        with self.place.open("ab") as file:
            file.truncate(self._ends[-1])
            os.fsync(file.fileno())

    def write(self, number: int, columns: Mapping[str, Sequence[Any]] | None) -> None:
        problem = None
        if self._world.rank == 0:
            assert columns is not None and number == len(self._ends) - 1
            try:
                self._write(columns)
            except DataError as error:
                problem = error
        agreed(problem, self._world)

    def _write(self, columns: Mapping[str, Sequence[Any]]) -> None:
        names = list(columns)
        rows = (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))
        try:
            text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        except (TypeError, ValueError) as error:  # the data has been checked: it is a conversation
            raise DataError(
                f"{self.place}: what rollout.environment said cannot be written as JSON ({error}). Let it answer with"
                " messages of texts and finite numbers."
            ) from error
        content = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            with self.place.open("ab", buffering=0) as file:
                remaining = content
                while remaining:
                    remaining = remaining[file.write(remaining) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._truncate()
            raise DataError(
                f"{self.place} cannot be written ({error.strerror or error}). All batches before this one are in it:"
                " make room, and continue with --resume auto."
            ) from error
        self._ends.append(self._ends[-1] + len(content))
