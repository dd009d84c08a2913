"""fastppo.report on folders that are being written, have just begun, are large, or damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_up_run import write_run
from report_page import Parsed, runs

from fastppo.folder import RunFolderError
from fastppo.report.__main__ import main, write_report
from fastppo.report.page import page


def test_a_run_that_is_being_written_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20, planned=50)
    for name in ("metrics", "responses", "alarms"):
        path = folder / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + '{"step": 21, "prompt": "長'.encode()[:-1])
    assert "20 of 50 steps" in Parsed(page(runs(folder))).text


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been recorded yet." in Parsed(page(runs(tmp_path))).text


def test_numbers_that_were_not_finite_are_gaps(tmp_path: Path) -> None:
    values = [1, 2, None, 3, None, 4, 5]
    lines = "".join(json.dumps({"step": i + 1, "score": y, "kl": None}) + "\n" for i, y in enumerate(values))
    (tmp_path / "metrics.jsonl").write_text(lines)
    html = page(runs(tmp_path))
    [path] = re.findall(r'class="line run0" d="([^"]+)"', html)
    assert [part.count(",") for part in path.split("M")[1:]] == [2, 1, 2]
    assert "KL to the reference</b>" not in html


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", 200)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = (json.dumps(records[n % len(records)] | {"step": n}) for n in range(10_000))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report([folder], tmp_path / "report.html")
    assert (folder / "metrics.jsonl").stat().st_size > 5e6
    assert (tmp_path / "report.html").stat().st_size < 2e6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"step": 1}\n{"step": 2, "sco\n{"step": 3}\n', "metrics.jsonl, line 2: this is not JSON"),
        ('{"step": 1}\n{"score": 2}\n', "metrics.jsonl, line 2: this has no whole number as its step"),
    ],
)
def test_a_broken_line_is_named(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"none is no folder\. Give the folder of a run"):
        runs(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        runs(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        runs(tmp_path)
