"""Files of scored responses: what is read, and what is wrong with those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fastppo.data import DataError, read_scored, write_rows
from fastppo.data.scored_file import COLUMNS, is_reserved, whole_file

Row = dict[str, Any]


def row(prompt: int = 0, sample: int = 0, **others: Any) -> Row:
    made = {"prompt": f"p{prompt}", "prompt_index": prompt, "sample": sample, "response": "r", "score": 0.5}
    return made | {"tokens": [1, 2], "logprobs": [-0.5, -1.0], "ended": True} | others


def without(made: Row, *names: str) -> Row:
    return {name: value for name, value in made.items() if name not in names}


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(made) + "\n" for made in rows))
    return path


ROWS = [row(1, 1, judge=4.0, answer="b"), row(0, 0, judge=1, answer="a"), row(1, 0, judge=3.0, answer="b", score=2)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_are_grouped_by_prompt_in_the_order_of_samples(tmp_path, name):
    scored = read_scored(write(tmp_path / name, ROWS))
    assert scored.prompts == ((1,), (2, 0))
    assert scored.scores == [[0.5], [2.0, 0.5]] and scored.judges == [[1.0], [3.0, 4.0]]
    assert scored.data_columns == ["answer"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_reader_gets_the_tokens_only_if_it_wants_them(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert not {"tokens", "logprobs"} & set(read_scored(path).table.columns)
    whole = read_scored(path, leave_out=()).table
    assert whole.columns["tokens"] == [[1, 2]] * 3 and whole.columns["logprobs"] == [[-0.5, -1.0]] * 3


def test_parts_of_a_folder_follow_each_other_by_name(tmp_path):
    write(tmp_path / "part-1.parquet", ROWS[2:])
    write(tmp_path / "part-0.parquet", ROWS[:2])
    assert read_scored(tmp_path).table.columns == read_scored(write(tmp_path / "a.jsonl", ROWS)).table.columns
    write(tmp_path / "part-2.parquet", [without(row(5), "ended")])
    with pytest.raises(DataError, match=r"part-2.parquet and .*part-0.parquet do not have the same columns.*ended"):
        read_scored(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_judge_that_is_absent_or_null_in_every_row_is_no_judge(tmp_path, name):
    assert read_scored(write(tmp_path / name, [row()])).judges is None
    assert read_scored(write(tmp_path / name, [row(judge=None), row(1, judge=None)])).judges is None


def test_names_that_the_data_cannot_have():
    assert all(is_reserved(column.name) for column in COLUMNS) and is_reserved("score/3")
    assert not is_reserved("answer") and not is_reserved("scores")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([without(row(), "score")], "has no column score; it has prompt, prompt_index, sample"),
        ([{"prompt": "a", "text": "b"}], "has no column prompt_index; it has prompt, text"),
        ([row(), row(1, score=float("nan"))], "line 2: score is nan. Score the response again"),
        ([row(), row(1, score=float("inf"))], "line 2: score is inf"),
        ([row(), row(1, judge=float("nan")), row(2, judge=1)], "line 1: judge is missing or null"),
        ([row(judge=1.0), row(1, judge=float("nan"))], "line 2: judge is nan"),
        ([row(), row(1, **{"score/0": 1.0})], "line 1: score/0 is missing or null"),
        ([row(**{"score/0": float("nan")})], "line 1: score/0 is nan"),
        ([row(), without(row(1), "score")], "line 2: score is missing or null; every row must have it"),
        ([row(), without(row(1), "prompt")], "line 2: prompt is missing or null"),
        ([row(), row(1, score="0.5")], "line 2: score is '0.5', not a number"),
        ([row(), row(1, score=True)], "line 2: score is 'True', not a number"),
        ([row(), row(1.5)], "line 2: prompt_index is '1.5', not a whole number"),
        ([row(), row(1, response=["r"])], "line 2: response is .* not text"),
        ([row(), row(1, ended="yes")], "line 2: ended is 'yes', not true or false"),
        ([row(), row(1), row()], r"line 3: sample 0 of prompt_index 0 is there already \(.*line 1\)"),
        ([row(), row(0, 1) | {"prompt": "other"}], "line 2: prompt_index 0 has another prompt than in .*line 1"),
        ([], "is empty: it has no rows"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        read_scored(write(tmp_path / "a.jsonl", rows))


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [row()])
    path.write_text(path.read_text() + "\n" + path.read_text()[:40])
    with pytest.raises(DataError, match=r"a.jsonl, line 3: this is not JSON"):
        read_scored(path)


def test_rows_of_parquet_are_named_too(tmp_path):
    with pytest.raises(DataError, match=r"row 2: score is nan"):
        read_scored(write(tmp_path / "a.parquet", [row(), row(1, score=float("nan"))]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", "no such file"),
        ("a.csv", "in a .jsonl or .parquet file, or in a folder"),
        ("", "without .parquet"),
    ],
)
def test_a_path_that_holds_no_scored_responses(tmp_path, name, said):
    (tmp_path / "a.csv").write_text("prompt\n1\n")
    with pytest.raises(DataError, match=said):
        read_scored(tmp_path / name)


# Writing


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_what_is_written_is_read_again(tmp_path, name):
    columns = {name: [made[name] for made in ROWS] for name in ROWS[0]}
    write_rows(tmp_path / name, columns, "--output")
    assert read_scored(tmp_path / name, leave_out=()).table.columns == columns


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("a.jsonl", [b"bytes"], "cannot be written as JSON .* a name in .parquet"),
        ("a.jsonl", [float("nan")], "cannot be written as JSON"),
        ("a.parquet", [1, "one"], "cannot be written as Parquet .* a name in .jsonl"),
        ("a.txt", ["a"], "must end in .jsonl or .parquet"),
        ("none/a.jsonl", ["a"], "cannot be written .* Give another --output"),
        ("none/a.parquet", ["a"], "cannot be written .* Give another --output"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, name, values, said):
    with pytest.raises(DataError, match=said):
        write_rows(tmp_path / name, {"x": values}, "--output")
    assert not list(tmp_path.iterdir())


def write_half(path: Path) -> None:
    with whole_file(path, "--output") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt


def test_a_file_that_is_not_finished_does_not_take_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_page_of_columns_has_each_of_them():
    page = (Path(__file__).parents[2] / "docs" / "best-of-n.md").read_text(encoding="utf-8")
    named = {
        name for line in page.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")[1::2]
    }
    assert named == {*(column.name for column in COLUMNS), "score/0", "score/1"}
    optional = {
        name for line in page.splitlines() if "; optional" in line for name in line.split("|")[1].split("`")[1::2]
    }
    assert optional == {column.name for column in COLUMNS if not column.required} | {"score/0", "score/1"}
