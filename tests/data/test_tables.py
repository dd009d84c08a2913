"""Every form of data is read, and a broken one is named with its line."""

from typing import Any

import datasets
import pytest

from fastppo.data.tables import DataError, Table, read_table

COLUMNS = {"text": ["one, two", "three\nfour"], "label": ["0", "1"]}


def test_csv_with_commas_and_line_ends_in_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"one, two",0\n\n"three\nfour",1\n', encoding="utf-8")
    table = read_table(str(tmp_path / "a.csv"))
    assert table.columns == COLUMNS
    assert table.where(1).endswith("a.csv, line 5")


def test_csv_with_a_very_long_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read_table(str(tmp_path / "a.csv")).columns["text"][0]) == 200_000


def test_jsonl_with_a_blank_line_and_keys_that_come_and_go(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "é"}\n\n{"text": "b", "n": 3}\n', encoding="utf-8")
    table = read_table(str(tmp_path / "a.jsonl"))
    assert table.columns == {"text": ["é", "b"], "n": [None, 3]}
    assert table.where(1).endswith("a.jsonl, line 3")


def test_jsonl_with_both_halves_of_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude42"}')
    assert read_table(str(tmp_path / "a.jsonl")).columns == {"text": ["\U0001f642"]}


def test_a_folder_of_parts_is_one_table_in_the_order_of_their_names(tmp_path):
    for name, texts in (("part-00001", ["c"]), ("part-00000", ["a", "b"])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{name}.parquet")
    assert read_table(str(tmp_path)).columns == {"text": ["a", "b", "c"]}
    datasets.Dataset.from_dict({"other": ["d"]}).to_parquet(tmp_path / "part-00002.parquet")
    with pytest.raises(DataError, match=r"part-00002.* do not have the same columns: only one has other, text"):
        read_table(str(tmp_path))


def test_parquet_with_chat_messages(tmp_path):
    rows = {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], "n": [1, 2]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    assert read_table(str(tmp_path / "a.parquet")).columns == rows


def test_a_saved_dataset_and_the_splits_of_a_saved_dict(tmp_path):
    dataset = datasets.Dataset.from_dict(COLUMNS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": dataset, "other": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert read_table(str(tmp_path / "one")).columns == COLUMNS
    assert read_table(str(tmp_path / "two"), split="test").columns == COLUMNS
    assert len(read_table(str(tmp_path / "two"), split="other")) == 1
    with pytest.raises(DataError, match=r"two has no split train. It has test, other"):
        read_table(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"one is one dataset without splits; it has no split test"):
        read_table(str(tmp_path / "one"), split="test")


def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch):
    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        assert (path, name, split) == ("owner/data", "small", "test")
        return datasets.Dataset.from_dict(COLUMNS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_table("owner/data", "small", "test")
    assert (table.columns, table.where(0)) == (COLUMNS, "owner/data (test), row 1")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as error:
        read_table("owner/data")
    assert str(error.value) == (
        "owner/data is not a local file or directory, and it cannot be loaded from the hub with name None and split"
        " train: ConnectionError: no route"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: this is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "a.jsonl, line 3: this is not JSON"),
        ("a.jsonl", b'"text"\n', "a.jsonl, line 1: each line must be an object"),
        ("a.jsonl", b'{"t": "a"}\n{"t": "b\\ud83d."}\n', r"a.jsonl, line 2, t: .* '\\ud83d' at 1, in 'b\\ud83d\.'"),
        ("a.jsonl", b'{"t": "a\xed\xa0\xbd"}\n', "a.jsonl, line 1, t: the text contains half a character"),
        (
            "a.jsonl",
            b'{"t": [{"role": "user", "content": "\\uDE42"}]}\n',
            "a.jsonl, line 1, t, content: the text contains",
        ),
        ("a.jsonl", b'{"\\ud83d": "a"}\n', "a.jsonl, line 1, a name: the text contains half a character"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.csv", b"text,label\na,1\nb\n", r"a.csv, line 3: 1 fields, but the header has 2 \(text, label\)"),
        ("a.csv", b"text,label\na,1,2\n", "a.csv, line 2: 3 fields"),
        ("a.csv", b'text,label\n"a"b,1\n', "a.csv, line 2: this is not CSV"),
        ("a.csv", b'text,label\n"a,1\nb,2\n', "a.csv, line 3: this is not CSV"),
        ("a.csv", b"text,text\na,b\n", "a.csv, line 1: two columns have the same name"),
        ("a.csv", b"text\n\xff\n", "a.csv, after line 0: this is not UTF-8"),
        ("a.csv", b"text,label\n", "a.csv is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.parquet", b"text", "a.parquet cannot be read as Parquet: ArrowInvalid"),
        ("a.txt", b"text", r"a.txt: a data file must end in .jsonl, .csv, .parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_table(str(tmp_path / name))


def test_a_missing_file_a_strange_directory_and_a_missing_package_are_named(tmp_path):
    with pytest.raises(DataError, match=r"b.jsonl: there is no such file"):
        read_table(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"not one that datasets' save_to_disk wrote"):
        read_table(str(tmp_path))
    with pytest.raises(DataError, match=r"pip install --no-deps no-such-data"):
        read_table("package:no_such_data/a.csv")


@pytest.mark.parametrize(("name", "split"), [("small", "train"), (None, "test")])
def test_a_file_has_no_splits(tmp_path, name, split):
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(DataError, match="is one file"):
        read_table(str(tmp_path / "a.csv"), name, split)


def test_a_missing_column_is_told_which_there_are():
    with pytest.raises(DataError, match=r"a.csv has no column prompt. It has text, label; name one with data.column"):
        Table("a.csv", {"text": ["a"], "label": ["b"]}).column("prompt")
