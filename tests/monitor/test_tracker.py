"""fastppo.monitor.tracker: what a run writes and shows, and that it shows it in the right place."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time

import pytest
import torch
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo.config import TrackConfig
from fastppo.monitor.run_dir import ALARMS, METRICS, RESPONSES, continue_folder, file_sizes, fresh_folder, read_lines
from fastppo.monitor.samples import Sample, samples_table, show_samples, write_samples
from fastppo.monitor.tracker import THIRD_PARTY, Phases, Tracker, setup_logging

STEP = {"score": 0.5, "kl": 1.25, "tokens_per_second": 1234.6, "time/step": 2.0}
PHASES = {"time/sampling": 2.14, "time/feedback": 0.3, "time/experience": 0.6, "time/learning": 3.2}
LINES = TrackConfig(tensorboard=False, progress="never")


def be_a_terminal(monkeypatch: pytest.MonkeyPatch, *, stdout: bool = True, columns: int = 80) -> None:
    """For a test's body, since pytest replaces its captured streams after the fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: stdout)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


@pytest.fixture
def restored_loggers():
    loggers = [logging.getLogger(name) for name in ("fastppo", *THIRD_PARTY)]
    state = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, state, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


# Files


def test_metrics_come_back_as_they_were_logged(tmp_path):
    with Tracker(fresh_folder(tmp_path / "run"), LINES, steps=2, rank=0) as tracker:
        tracker.log_evaluation(0, {"score": 0.1})
        tracker.log(1, STEP)
        tracker.log(2, {"score": torch.tensor(0.75)})
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 0, "eval/score": 0.1},
        {"step": 1, **STEP},
        {"step": 2, "score": 0.75},
    ]


def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    with Tracker(tmp_path, LINES, steps=2, rank=0) as tracker:
        tracker.log(1, STEP)
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, **STEP}]


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path):
    with Tracker(tmp_path, LINES, steps=2, rank=0) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_tensorboard_holds_every_metric(tmp_path):
    with Tracker(tmp_path, TrackConfig(progress="never"), steps=2, rank=0) as tracker:
        tracker.log(1, STEP)
        tracker.log(2, STEP | {"score": 0.75})
        tracker.log_evaluation(2, {"score": 0.9})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {*STEP, "eval/score"}
    assert [(e.step, e.value) for e in events.Scalars("score")] == [(1, 0.5), (2, 0.75)]


def test_a_run_that_is_continued_has_no_step_twice(tmp_path):
    config, metrics = TrackConfig(progress="never"), tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, config, steps=4, rank=0) as tracker:
        tracker.log(1, STEP)
        then = file_sizes(tmp_path)
        tracker.log(2, STEP)
        tracker.log(3, STEP)
    continue_folder(tmp_path, then)
    time.sleep(1.0)  # TensorBoard orders files by the second in their names, and a run is resumed later than that
    with Tracker(tmp_path, config, steps=4, rank=0, done=1) as tracker:
        tracker.log(2, STEP | {"score": 0.75})
    assert [r["step"] for r in read_lines(metrics)] == [1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("score")] == [(1, 0.5), (2, 0.75)]


def test_other_ranks_write_and_print_nothing(tmp_path, capfd):
    with (
        Tracker(tmp_path, TrackConfig(progress="never"), steps=1, rank=0) as first,
        Tracker(tmp_path / "none", TrackConfig(progress="always"), steps=1, rank=1) as second,
    ):
        for tracker in (first, second):
            tracker.log_evaluation(0, {"score": 0.0})
            with tracker.profile(1):
                tracker.log(1, STEP)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    assert not (tmp_path / "none").exists()
    assert len(capfd.readouterr().out.splitlines()) == 2


# The display


def test_without_a_terminal_a_step_is_one_plain_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in CI; a bar would fill the log with control characters
    with Tracker(tmp_path, TrackConfig(tensorboard=False), steps=3, rank=0) as tracker:
        tracker.log_evaluation(0, {"score": 0.125, "score_error": 0.05, "kl": 0.0, "other": 7.0})
        for step in (1, 2, 3):
            tracker.log(step, STEP)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0] == "step 0/3  held-out score 0.125  +/- 0.050  KL 0.000"
    assert lines[1] == "step 1/3  score 0.500  KL 1.250  1,235 tokens/s"
    assert lines[2].startswith(lines[1].replace("1/3", "2/3") + "  0:00:0")
    assert lines[2].endswith(" left")
    assert lines[3] == lines[1].replace("1/3", "3/3")
    assert (out.isascii(), "\x1b" in out, "\r" in out, err) == (True, False, False, "")


def test_a_line_shows_the_judge_where_there_is_one_and_the_seconds_of_the_stages(tmp_path, capfd):
    judged = STEP | PHASES | {"health/judge": 0.25}
    with Tracker(tmp_path, LINES, steps=3, rank=0) as tracker:
        tracker.log_evaluation(0, {"score": 0.125, "score_error": 0.05, "judge": 0.2, "kl": 0.0})
        tracker.log(1, judged)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "step 0/3  held-out score 0.125  +/- 0.050  judge 0.200  KL 0.000"
    told = "score 0.500  judge 0.250  KL 1.250  1,235 tokens/s  sampling 2.1 s  feedback 0.3 s  learning 3.2 s"
    assert lines[1] == f"step 1/3  {told}"


def test_on_a_terminal_a_bar_shows_step_score_kl_speed_and_time_left(tmp_path, capsys, monkeypatch):
    be_a_terminal(monkeypatch)
    with Tracker(tmp_path, TrackConfig(tensorboard=False), steps=1000, rank=0) as tracker:
        tracker.log(997, STEP | PHASES)
        tracker.log(998, STEP | PHASES)
        tracker.log_evaluation(998, {"score": 0.25})
    out = capsys.readouterr().out
    assert "\x1b[" in out
    last = Text.from_ansi(out).plain.splitlines()[-1]
    for part in ("step 998/1000 ", "score 0.500", "KL 1.250", "1,235 tokens/s", "0:00:00 left"):
        assert part in last  # nothing is cut off at 80 columns
    assert out.count("held-out score 0.250") == 1


def test_on_a_wide_terminal_the_bar_shows_the_seconds_of_the_stages_too(tmp_path, capsys, monkeypatch):
    be_a_terminal(monkeypatch, columns=140)
    with Tracker(tmp_path, TrackConfig(tensorboard=False), steps=1000, rank=0) as tracker:
        tracker.log(997, STEP)
        tracker.log(998, STEP | PHASES | {"health/judge": 0.25})
    last = Text.from_ansi(capsys.readouterr().out).plain.splitlines()[-1]
    for part in ("step 998/1000 ", "judge 0.250", "0:00:00 left", "learning 3.2 s"):
        assert part in last


def test_log_lines_appear_above_the_bar(tmp_path, capsys, monkeypatch, restored_loggers):
    be_a_terminal(monkeypatch)
    setup_logging(rank=0)
    with Tracker(tmp_path, TrackConfig(tensorboard=False), steps=3, rank=0) as tracker:
        tracker.log(1, STEP)
        capsys.readouterr()
        logging.getLogger("fastppo").info("a word")
        added = capsys.readouterr().out
    assert added.index("\x1b[2K") < added.index("INFO a word") < added.index("step 1/3")


@pytest.mark.parametrize(("progress", "bar"), [("always", True), ("never", False)])
def test_progress_always_and_never_do_not_ask_the_output(
    progress,
    bar,
    tmp_path,
    capsys,
    monkeypatch,
):
    be_a_terminal(monkeypatch, stdout=not bar)
    with Tracker(tmp_path, TrackConfig(tensorboard=False, progress=progress), steps=3, rank=0) as tracker:
        tracker.log(1, STEP)
    out = capsys.readouterr().out
    assert ("\x1b[" in out) == bar
    assert "score 0.500" in out


# Phases and profiles


def test_stages_add_up_until_they_are_taken(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.0, 10.0, 14.0])
    monkeypatch.setattr("fastppo.monitor.tracker.time.perf_counter", lambda: next(clock))
    phases = Phases({})
    for name in ("sampling", "learning", "sampling"):
        with phases(name):
            pass
    assert phases.take() == {"time/sampling": 5.0, "time/learning": 2.0}
    assert phases.take() == {}


def test_time_left_follows_the_mean_step(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 130.0, 140.0])
    monkeypatch.setattr("fastppo.monitor.tracker.time.perf_counter", lambda: next(clock))
    with Tracker(tmp_path, LINES, steps=102, rank=0) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"score": 0.0})
    assert [line[10:].strip() for line in capsys.readouterr().out.splitlines()] == [
        "score 0.000",
        "score 0.000  0:50:00 left",  # 100 steps of 30 s
        "score 0.000  0:33:00 left",  # 99 steps of 20 s
    ]


def test_a_profile_of_the_chosen_step_names_its_stages_on_every_rank(tmp_path):
    phases = Phases({})
    for rank in (0, 1):
        config = TrackConfig(tensorboard=False, progress="never", profile_steps=(2,))
        with Tracker(tmp_path, config, steps=3, rank=rank) as tracker:
            for step in (1, 2, 3):
                with tracker.profile(step), phases("sampling"):
                    torch.ones(4, 4) @ torch.ones(4, 4)
    traces = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in traces] == ["step-2-rank-0.json", "step-2-rank-1.json"]
    for trace in traces:
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert {"sampling", "aten::mm"} <= names


# Samples


HOSTILE = "[/b] [red]\nx\x1b[2J\u202e [link=a]" + "長い" * 400


def test_the_table_shows_hostile_text_as_it_is_and_fits(capsys, monkeypatch):
    be_a_terminal(monkeypatch)
    show_samples([Sample(HOSTILE, "", -0.25, HOSTILE, math.nan), Sample("a film", "is bad", -1.0, "is good", 1.0)])
    out = capsys.readouterr().out
    lines = [Text.from_ansi(line) for line in out.splitlines()]
    text = "\n".join(line.plain for line in lines)
    for part in ("[/b] [red] x", "[link=a]", "[2J", "…", "prompt", "is bad", "is good", "-0.25", "nan", "1.00"):
        assert part in text
    for part in ("\x1b[2J", "\u202e"):
        assert part not in out
    assert len(lines) < 30
    assert max(line.cell_len for line in lines) <= 80


def test_an_empty_table_can_be_shown():
    console = Console(file=io.StringIO(), width=80)
    console.print(samples_table([]))
    assert "prompt" in console.file.getvalue()  # type: ignore[attr-defined]


def test_samples_on_disk_are_whole(tmp_path):
    rows = [Sample(HOSTILE, "\ud800", 0.5, "line\u2028separator", math.nan), Sample("p", "b", 1.0, "a", 2.0)]
    write_samples(tmp_path / "samples.jsonl", rows)
    with open(tmp_path / "samples.jsonl", encoding="utf-8") as lines:
        first, second = (json.loads(line) for line in lines)
    assert second == rows[1]._asdict()
    assert first == rows[0]._asdict() | {"score_after": None}


# Logging


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, ["INFO a word", "WARNING a warning", "WARNING theirs", "ERROR broken"]),
        (1, ["WARNING rank 1: a warning", "ERROR rank 1: broken"]),
    ],
)
def test_log_lines_of_each_rank(rank, expected, capsys, restored_loggers):
    setup_logging(rank)
    setup_logging(rank)  # a second call does not double the lines
    log, transformers = logging.getLogger("fastppo"), logging.getLogger("transformers.models")
    log.debug("a detail")
    log.info("a word")
    log.warning("a warning")
    logging.getLogger("DeepSpeed").info("a configuration")
    transformers.warning("theirs")
    transformers.warning("Token indices sequence length is longer than the specified maximum")
    logging.getLogger("httpx").info("HTTP Request: GET")
    transformers.error("broken")
    out, err = capsys.readouterr()
    assert [line.partition(" ")[2] for line in err.splitlines()] == expected
    assert out == ""


# Alarms, and runs that go back


def test_alarms_are_lines_of_strict_json_that_rank_0_writes(tmp_path, caplog):
    alarm = {"step": 3, "figure": "judge", "value": float("nan"), "threshold": 0.5, "message": "it\nfalls"}
    with Tracker(fresh_folder(tmp_path / "run"), TrackConfig(progress="never"), steps=9, rank=0) as tracker:
        tracker.log_alarms([alarm])
        tracker.log_alarms([alarm | {"step": 4}])
    assert "step 3: it\nfalls" in caplog.text
    lines = (tmp_path / "run" / ALARMS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4] and json.loads(lines[0])["value"] is None
    with Tracker(tmp_path / "run", TrackConfig(), steps=9, rank=1) as tracker:
        tracker.log_alarms([alarm])
        tracker.roll_back(0, {METRICS: 0, ALARMS: 0})
    assert (tmp_path / "run" / ALARMS).read_text().splitlines() == lines


def test_a_run_that_goes_back_has_no_step_twice(tmp_path):
    with Tracker(fresh_folder(tmp_path / "run"), TrackConfig(progress="never"), steps=9, rank=0) as tracker:
        tracker.log(1, {"score": 0.1})
        tracker.log_responses(1, [{"of": "heldout"}])
        then = file_sizes(tmp_path / "run")
        tracker.log(2, {"score": 0.2})
        tracker.log(3, {"score": 0.3})
        tracker.log_responses(3, [{"of": "heldout"}])
        tracker.log_alarms([{"step": 3, "figure": "judge", "message": "it falls"}])
        tracker.roll_back(1, then)
        tracker.log(2, {"score": 0.4})
    assert [(r["step"], r["score"]) for r in read_lines(tmp_path / "run" / METRICS)] == [(1, 0.1), (2, 0.4)]
    assert [r["step"] for r in read_lines(tmp_path / "run" / RESPONSES)] == [1]
    assert [r["step"] for r in read_lines(tmp_path / "run" / ALARMS)] == [3]  # why it goes back is not forgotten
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("score")] == [(1, 0.1), (2, 0.4)]
