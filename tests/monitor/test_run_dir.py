"""fastppo.monitor.run_dir: a run's folder is made, moved aside and gone on in; its files are read live."""

from __future__ import annotations

import errno
import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastppo.monitor.run_dir import (
    JsonlFile,
    RunFolderError,
    begin_folder,
    check_folder,
    continue_folder,
    file_sizes,
    fresh_folder,
    json_line,
    read_lines,
)


def test_an_earlier_run_is_moved_aside_as_often_as_needed(tmp_path, caplog):
    output = tmp_path / "runs" / "a"
    for number in range(3):
        with caplog.at_level(logging.INFO, "fastppo"):
            assert fresh_folder(output) == output
        (output / "number").write_text(str(number))
    numbers = [(tmp_path / "runs" / name / "number").read_text() for name in ("a.1", "a.2", "a")]
    assert numbers == ["0", "1", "2"]
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["a.1", "a.2"]


def test_an_empty_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    fresh_folder(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_ended_before_its_first_line_leaves_no_folder_behind(tmp_path):
    output = fresh_folder(tmp_path / "run")
    (output / "config.yaml").write_text("steps: 1")
    fresh_folder(output)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    fresh_folder(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_what_is_not_a_run_is_never_moved(tmp_path, monkeypatch):
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


def test_a_last_line_that_was_cut_is_left_out_even_within_a_character(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sco')
    assert read_lines(path) == [{"step": 1}]
    path.write_bytes('{"step": 1}\n{"prompt": "長'.encode()[:-1])
    assert read_lines(path) == [{"step": 1}]


def test_a_line_is_strict_json_in_its_lists_too():
    line = json_line({"step": 1, "score": math.inf, "advantages": [0.5, math.nan], "prompt": "長"})
    assert line == '{"step": 1, "score": null, "advantages": [0.5, null], "prompt": "長"}\n'


@pytest.mark.parametrize("broken", [b'{"step": 2, "sco', b"\xff", b"", b"3", b"[1]"])
def test_another_broken_line_is_an_error_with_its_number(broken, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2: this is .*JSON.*Correct the line, or remove it"):
        read_lines(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be read"):
        read_lines(tmp_path / "metrics.jsonl")


def test_every_file_of_lines_goes_back_to_where_it_was(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "responses.jsonl").write_text('{"step": 1, "prompt": "長い"}\n')
    then = file_sizes(tmp_path)
    for name in ("metrics", "responses", "alarms"):  # the alarms begin later
        with open(tmp_path / f"{name}.jsonl", "a") as lines:
            lines.write('{"step": 2}\n{"step": 3, "cu')
    continue_folder(tmp_path, then)
    assert {path.name: len(read_lines(path)) for path in tmp_path.iterdir()} == {
        "metrics.jsonl": 1,
        "responses.jsonl": 1,
        "alarms.jsonl": 0,
    }


def test_lines_that_were_lost_since_are_told_and_whole_ones_kept(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    continue_folder(tmp_path, {"metrics.jsonl": 1000, "responses.jsonl": 0, "alarms.jsonl": 0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert "lines are missing" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# A symbolic link as output


def test_a_link_leads_to_the_new_run_and_the_earlier_one_is_moved_aside_whole(tmp_path):
    target, link = tmp_path / "disk" / "a", tmp_path / "current"
    target.parent.mkdir()
    link.symlink_to(target)
    for number in range(3):  # at first it leads nowhere
        fresh_folder(link)
        (link / "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
    assert link.is_symlink() and link.resolve() == target
    found = [read_lines(target.with_name(name) / "metrics.jsonl")[0]["step"] for name in ("a.1", "a.2", "a")]
    assert found == [0, 1, 2] and sorted(path.name for path in tmp_path.iterdir()) == ["current", "disk"]


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for take in (check_folder, fresh_folder):
        with pytest.raises(RunFolderError, match="is a symbolic link to itself"):
            take(tmp_path / "loop")


# A disk that takes nothing


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int):
        self._file, self._room = file, room

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken: int = self._file.write(content[: self._room])
        self._room -= taken
        return taken


def open_full(room: int, *name: Any, **how: Any) -> Full:
    return Full(open(*name, **how), room)


def test_lines_wait_for_room_and_the_file_never_has_half_of_one(tmp_path, monkeypatch):
    lines = JsonlFile(tmp_path / "metrics.jsonl")
    lines.add([{"step": 1, "prompt": "長\ud800"}])
    for step, room in ((2, 5), (3, 0)):
        full = partial(open_full, room)
        monkeypatch.setattr("fastppo.monitor.run_dir.open", full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            lines.add([{"step": step}])
        assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    monkeypatch.undo()
    lines.add([{"step": 4}])
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert lines.drop_pending() == 0


def test_settings_that_cannot_be_written_end_a_new_run_and_leave_a_resumed_ones_as_they_were(
    tmp_path, monkeypatch, caplog
):
    begin_folder(tmp_path / "run", None, "seed: 1")

    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        RunFolderError, match=r"nothing can be written there \(No space left on device\). Free some space"
    ):
        begin_folder(tmp_path / "new", None, "seed: 1")
    begin_folder(tmp_path / "run", file_sizes(tmp_path / "run"), "seed: 1")
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1" and "the old file stays" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "metrics.jsonl"]
