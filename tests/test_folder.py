"""fastppo.folder: a run's folder is made, moved aside and gone on in, and its files are read while they are written."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from fastppo.folder import RunFolderError, as_line, check_folder, continue_folder, fresh_folder, read_lines, sizes


def test_an_earlier_run_is_moved_aside_as_often_as_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "runs" / "a"
    for number in range(3):
        with caplog.at_level(logging.INFO, "fastppo"):
            assert fresh_folder(output) == output
        (output / "number").write_text(str(number))
    numbers = [(tmp_path / "runs" / name / "number").read_text() for name in ("a.1", "a.2", "a")]
    assert numbers == ["0", "1", "2"]
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["a.1", "a.2"]


def test_an_empty_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    fresh_folder(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_ended_before_its_first_line_leaves_no_folder_behind(tmp_path: Path) -> None:
    output = fresh_folder(tmp_path / "run")
    (output / "config.yaml").write_text("steps: 1")
    fresh_folder(output)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    fresh_folder(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_what_is_not_a_run_is_never_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / "file").touch()
    (fresh_folder(tmp_path / "here") / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path / "here")
    for output in (tmp_path / "thesis", tmp_path / "file", tmp_path / "file" / "run", Path()):
        with pytest.raises(RunFolderError, match=r"^output = .* Give another --output\.$"):
            fresh_folder(output)
    for output in (tmp_path / "thesis", tmp_path / "file", Path()):
        with pytest.raises(RunFolderError, match=r"^output = "):
            check_folder(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here", "thesis"]


# Files of lines


def test_a_last_line_that_was_cut_is_left_out_even_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sco')
    assert read_lines(path) == [{"step": 1}]
    path.write_bytes('{"step": 1}\n{"prompt": "長'.encode()[:-1])
    assert read_lines(path) == [{"step": 1}]


def test_a_line_is_strict_json_in_its_lists_too() -> None:
    line = as_line({"step": 1, "score": math.inf, "advantages": [0.5, math.nan], "prompt": "長"})
    assert line == '{"step": 1, "score": null, "advantages": [0.5, null], "prompt": "長"}\n'


@pytest.mark.parametrize("broken", [b'{"step": 2, "sco', b"\xff", b"", b"3", b"[1]"])
def test_another_broken_line_is_an_error_with_its_number(broken: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2: this is .*JSON.*Mend the line, or remove it"):
        read_lines(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be read"):
        read_lines(tmp_path / "metrics.jsonl")


def test_every_file_of_lines_goes_back_to_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "responses.jsonl").write_text('{"step": 1, "prompt": "長い"}\n')
    then = sizes(tmp_path)
    for name in ("metrics", "responses", "alarms"):  # the alarms begin later
        with open(tmp_path / f"{name}.jsonl", "a") as lines:
            lines.write('{"step": 2}\n{"step": 3, "cu')
    continue_folder(tmp_path, then)
    assert {path.name: len(read_lines(path)) for path in tmp_path.iterdir()} == {
        "metrics.jsonl": 1,
        "responses.jsonl": 1,
        "alarms.jsonl": 0,
    }


def test_lines_that_were_lost_since_are_told_and_whole_ones_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    continue_folder(tmp_path, {"metrics.jsonl": 1000, "responses.jsonl": 0, "alarms.jsonl": 0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert "lines are missing" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
