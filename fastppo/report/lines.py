"""Reading a run's JSONL files. The fields of every line are checked, so that an error names the damaged line.

A number may be null, which stands for one that was not finite. Infinity, and numbers larger than `LARGEST`, are read as
null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fastppo.monitor import RunFolderError, read_lines

Record = dict[str, Any]
LARGEST = 1e100  # sums of numbers up to this one are finite, as charts and means need


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number of at most `LARGEST`, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_kind(value: Any) -> bool:
    return value in ("heldout", "training")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number_or_null, value))


def _are_bools(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, bool) for x in value)


def _are_said(value: Any) -> bool:
    messages = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return messages and all(_is_text(message.get(name)) for message in value for name in ("role", "text"))


Fields = Mapping[str, tuple[Callable[[Any], bool], str]]  # field name -> test of a value, and what it must be, in words

TEXT, NUMBER = (_is_text, "text"), (_is_number_or_null, "number")
STEP: Fields = {"step": (_is_step, "whole number")}
ALARM: Fields = {
    **STEP,
    **dict.fromkeys(("figure", "level", "message"), TEXT),
    **dict.fromkeys(("value", "threshold"), NUMBER),
    "action": (_is_text_or_null, "text or null"),
}
RESPONSE: Fields = {**STEP, "of": (_is_kind, "heldout or training"), "prompt": TEXT, "score": NUMBER}
RESPONSE_KINDS: Mapping[str, Fields] = {
    "heldout": {"response": TEXT},
    "training": {"tokens": (_are_texts, "list of texts"), "advantages": (_are_numbers, "list of numbers")},
}
OF_TURNS: Fields = {  # what records of conversations with an environment have more
    "written": (_are_bools, "list of true and false"),
    "said": (_are_said, "list of messages, each a role and a text,"),
    "turn_rewards": (_are_numbers, "list of numbers"),
}
BIN: Fields = dict.fromkeys(("pairs", "predicted", "observed", "observed_low", "observed_high"), NUMBER)


def read_metrics(path: Path) -> list[Record]:
    """The records of metrics.jsonl, sorted by step; every field but the step is a number or None.

    Raises RunFolderError, like the other functions here.
    """
    records = _read(path, STEP)
    for number, record in enumerate(records, start=1):
        _check(path, number, record, dict.fromkeys(record.keys() - STEP.keys(), NUMBER))
    return _by_step(records)


def read_alarms(path: Path) -> list[Record]:
    return _by_step(_read(path, ALARM))


def read_responses(path: Path) -> tuple[list[Record], list[Record]]:
    """The held-out and the training responses, each sorted by step."""
    records = _read(path, RESPONSE)
    for number, record in enumerate(records, start=1):
        fields = dict(RESPONSE_KINDS["heldout" if "response" in record else record["of"]])
        if "written" in record and "advantages" not in record:  # of a method that has none
            del fields["advantages"]
        _check(path, number, record, fields | {name: field for name, field in OF_TURNS.items() if name in record})
        for name, one in (("advantages", "advantage for each"), ("written", "true or false for each")):
            if name in {*fields, *record} and len(record.get("tokens", ())) != len(record.get(name, ())):
                raise _damaged(path, number, f"{one} of its tokens")
    heldout, training = ([record for record in records if record["of"] == kind] for kind in RESPONSE_KINDS)
    return _by_step(heldout), _by_step(training)


def read_reliability(path: Path) -> list[Record]:
    return _read(path, BIN)


def _read(path: Path, fields: Fields) -> list[Record]:
    """Read a JSONL file and check its fields; an empty list if the file does not exist."""
    records = [{name: _finite(value) for name, value in r.items()} for r in (read_lines(path) if path.exists() else [])]
    for number, record in enumerate(records, start=1):
        _check(path, number, record, fields)
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, int | float) and not abs(value) <= LARGEST else value


def _check(path: Path, number: int, record: Record, fields: Fields) -> None:
    for name, (is_right, what) in fields.items():
        if name not in record or not is_right(record[name]):
            raise _damaged(path, number, f"{what} as its {name}")


def _damaged(path: Path, number: int, lacks: str) -> RunFolderError:
    """The error for a line that lacks a valid field."""
    return RunFolderError(f"{path}, line {number}: this has no {lacks}. Correct the line, or remove it.")


def _by_step(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: int(record["step"]))
