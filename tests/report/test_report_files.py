"""fastppo.report on folders that are being written, have just begun, are large, or damaged."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from made_up_run import write_run
from report_page import Parsed, charts, runs

from fastppo.monitor.run_dir import RunFolderError
from fastppo.report.__main__ import main, write_report
from fastppo.report.page import page


def test_a_run_that_is_being_written_is_shown_as_far_as_it_is(tmp_path):
    folder = write_run(tmp_path / "run", 20, planned=50)
    for name in ("metrics", "responses", "alarms"):
        path = folder / f"{name}.jsonl"
        path.write_bytes(path.read_bytes() + '{"step": 21, "prompt": "長'.encode()[:-1])
    assert "20 of 50 steps" in Parsed(page(runs(folder))).text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been recorded yet." in Parsed(page(runs(tmp_path))).text


def test_numbers_that_were_not_finite_are_gaps(tmp_path):
    values = [1, 2, None, 3, None, 4, 5]
    lines = "".join(json.dumps({"step": i + 1, "score": y, "kl": None}) + "\n" for i, y in enumerate(values))
    (tmp_path / "metrics.jsonl").write_text(lines)
    html = page(runs(tmp_path))
    [path] = re.findall(r'class="line run0" d="([^"]+)"', html)
    assert [part.count(",") for part in path.split("M")[1:]] == [2, 1, 2]
    assert "KL to the reference</b>" not in html


def test_a_long_run_makes_a_small_file(tmp_path):
    folder = write_run(tmp_path / "long", 200)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = (json.dumps(records[n % len(records)] | {"step": n}) for n in range(10_000))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report([folder], tmp_path / "report.html")
    assert (folder / "metrics.jsonl").stat().st_size > 5e6
    assert (tmp_path / "report.html").stat().st_size < 2e6


HELD = {"of": "heldout", "step": 1, "prompt": "p", "response": "r", "score": 0.5}
TRAINED = {"of": "training", "step": 1, "prompt": "p", "tokens": ["a", "b"], "advantages": [0.1, None], "score": None}
ALARM = {"step": 1, "figure": "entropy", "level": "act", "action": "stop", "message": "m"}
ALARM |= {"value": 1.0, "threshold": 2.0}


def without(record: dict[str, Any], name: str) -> str:
    return json.dumps({key: value for key, value in record.items() if key != name})


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics", '{"step": 2, "sco', "this is not JSON"),
        ("metrics", '{"score": 2}', "this has no whole number as its step. Correct the line, or remove it."),
        ("metrics", '{"step": true}', "this has no whole number as its step"),
        ("metrics", '{"step": -1}', "this has no whole number as its step"),
        ("metrics", f'{{"step": {10**400}}}', "this has no whole number as its step"),
        ("metrics", '{"step": 2, "score": "high"}', "this has no number as its score"),
        ("metrics", '{"step": 2, "score": [1]}', "this has no number as its score"),
        ("alarms", without(ALARM, "message"), "this has no text as its message"),
        ("alarms", json.dumps(ALARM | {"value": "1"}), "this has no number as its value"),
        ("alarms", json.dumps(ALARM | {"action": 1}), "this has no text or null as its action"),
        ("responses", without(HELD, "prompt"), "this has no text as its prompt"),
        ("responses", json.dumps(HELD | {"prompt": None}), "this has no text as its prompt"),
        ("responses", json.dumps(HELD | {"response": None}), "this has no text as its response"),
        ("responses", json.dumps(HELD | {"score": "0.5"}), "this has no number as its score"),
        ("responses", json.dumps(HELD | {"of": []}), "this has no heldout or training as its of"),
        ("responses", without(TRAINED, "advantages"), "this has no list of numbers as its advantages"),
        ("responses", json.dumps(TRAINED | {"tokens": [1, 2]}), "this has no list of texts as its tokens"),
        ("responses", json.dumps(TRAINED | {"tokens": ["a"]}), "this has no advantage for each of its tokens"),
        ("reliability", '{"pairs": 3}', "this has no number as its predicted"),
    ],
)
def test_a_damaged_line_is_named(name, line, words, tmp_path, capsys):
    bins = {"pairs": 0, "predicted": None, "observed": None, "observed_low": 0, "observed_high": 1}
    sound = {"metrics": [{"step": 1}], "alarms": [ALARM], "responses": [HELD, TRAINED], "reliability": [bins]}
    for file, records in sound.items():
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    main([str(tmp_path), "--output", str(tmp_path / "sound.html")])
    with open(tmp_path / f"{name}.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert f"{name}.jsonl, line {len(sound[name]) + 1}: {words}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999", "9" * 400, "1e101"])
def test_numbers_without_bounds_are_gaps_wherever_they_stand(number, tmp_path):
    names = ("score", "kl", "health/judge", "time/step")
    lines = {
        "metrics": [{"step": 1, "x": "X"} | dict.fromkeys(names, 1), {"step": 2} | dict.fromkeys(names, "X")],
        "alarms": [ALARM | {"value": "X", "threshold": "X"}],
        "responses": [HELD | {"score": "X"}, TRAINED | {"advantages": ["X", 1]}],
    }
    for file, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records).replace('"X"', number)
        (tmp_path / f"{file}.jsonl").write_text(text)
    parsed = Parsed(page(runs(tmp_path)))
    assert charts(parsed)["Score"]["lines"][0]["y"] == [1]
    assert "inf" not in parsed.text.lower() and "x" not in [title.lower() for title in charts(parsed)]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"none is not a folder\. Give the folder of a run"):
        runs(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"is not the folder of a run: it has no metrics\.jsonl"):
        runs(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        runs(tmp_path)
