"""What only tells of a run must not end it, and what it was for is saved, somewhere, whatever fails."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import whole_runs
from test_wandb_run import StandIn, installed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fastppo import train, train_dpo, train_reward, train_sft
from fastppo.checkpoint import atomic_dir, export
from fastppo.checkpoint.export import ExportError
from fastppo.config import TrackConfig
from fastppo.config.command_line import DPO, PPO, REWARD, SFT, parse
from fastppo.distributed.world import start_world
from fastppo.monitor.run_dir import ALARMS, METRICS, RESPONSES, JsonlFile, file_sizes, read_lines
from fastppo.monitor.tracker import Tracker

pytestmark = pytest.mark.slow

ALARM = {"step": 2, "figure": "judge", "message": "it falls"}
FAILURES = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    UnicodeEncodeError("ascii", "長", 0, 1, "ordinal not in range"),
    BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    RuntimeError("the service is gone"),
    ValueError("I/O operation on closed file."),
]
EVERYTHING = TrackConfig(progress="always", profile_steps=(1, 2), wandb="films")

# Each way out of a tracker: what is put in the place of what.
OUTLETS = {
    "metrics.jsonl": "fastppo.monitor.run_dir.JsonlFile.add",
    "a writer of TensorBoard": "torch.utils.tensorboard.SummaryWriter.__init__",
    "a scalar of TensorBoard": "torch.utils.tensorboard.SummaryWriter.add_scalar",
    "an alarm of TensorBoard": "torch.utils.tensorboard.SummaryWriter.add_text",
    "TensorBoard's disk": "torch.utils.tensorboard.SummaryWriter.flush",
    "TensorBoard's end": "torch.utils.tensorboard.SummaryWriter.close",
    "TensorBoard's own thread": "tensorboard.summary.writer.record_writer.RecordWriter.write",
    "W&B's log": "test_wandb_run.StandIn.log",
    "W&B's alert": "test_wandb_run.StandIn.alert",
    "W&B's end": "test_wandb_run.StandIn.finish",
    "W&B's axis": "test_wandb_run.StandIn.define_metric",
    "the start of a bar": "rich.progress.Progress.start",
    "a bar": "rich.progress.Progress.update",
    "the end of a bar": "rich.progress.Progress.stop",
    "the terminal": "rich.console.Console._write_buffer",
    "the start of a profile": "torch.profiler.profile.start",
    "the end of a profile": "torch.profiler.profile.stop",
    "a profile": "torch.profiler.profile.export_chrome_trace",
}


def failing(error: Exception) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def a_run(folder: Path, config: TrackConfig = EVERYTHING, done: int = 0) -> None:
    with Tracker(folder, config, steps=3, rank=0, done=done) as tracker:
        then = file_sizes(folder)
        for step in (1, 2):
            with tracker.profile(step):
                tracker.log(step, {"score": 0.5})
            tracker.log_evaluation(step, {"score": 0.5})
            tracker.log_responses(step, [{"of": "heldout"}])
            tracker.log_alarms([ALARM])
        tracker.roll_back(0, then)
        tracker.log(1, {"score": 0.5})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    installed(monkeypatch, StandIn())
    (tmp_path / "config.yaml").write_text("seed: 1")
    return tmp_path


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("outlet", OUTLETS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_no_output_that_fails_ends_a_run_and_each_is_one_line(folder, monkeypatch, caplog, outlet, error):
    stderr = sys.stderr
    monkeypatch.setattr(OUTLETS[outlet], failing(error))
    a_run(folder)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said and all(line.endswith(". The run continues without it.") for line in said)
    assert len(said) == len({line.partition(":")[0] for line in said}) <= 3  # three files, if all files fail
    if outlet != "metrics.jsonl":
        assert len(read_lines(folder / METRICS)) == 1
    monkeypatch.undo()
    assert sys.stderr is stderr


@pytest.mark.parametrize("name", [METRICS, ALARMS, RESPONSES])
def test_an_output_that_works_again_is_told_and_lines_that_found_no_room_are_counted(
    tmp_path, monkeypatch, caplog, name
):
    config = TrackConfig(tensorboard=False, progress="never")
    real, full = JsonlFile.add, {"now": True}

    def add(self: JsonlFile, records: Any = ()) -> None:
        if not (full["now"] and self._path.name == name):
            return real(self, records)
        self._pending += b"{}\n" * len(list(records))
        raise FAILURES[0]

    monkeypatch.setattr(JsonlFile, "add", add)
    caplog.set_level(logging.INFO, "fastppo")
    with Tracker(tmp_path, config, steps=9, rank=0) as tracker:
        for step in range(1, 5):
            full["now"] = step != 2
            tracker.log(step, {"score": 0.5})
            tracker.log_responses(step, [{"of": "heldout"}])
            tracker.log_alarms([ALARM])
    said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert [line.partition(": ")[2] for line in said] == [
        "No space left on device. The run continues without it.",
        "works again",
        "No space left on device. The run continues without it.",
        "2 lines could not be written and are lost",
    ]


def test_a_service_that_refuses_a_run_that_goes_on_does_not_end_it(folder, monkeypatch, caplog):
    installed(monkeypatch, StandIn(refuses="is down"))
    a_run(folder, TrackConfig(tensorboard=False, wandb="films"), done=1)
    assert "did not accept the run (is down)" in caplog.text


PRINTS = """
import sys
from pathlib import Path
from fastppo.config import TrackConfig
from fastppo.monitor.samples import Sample, show_samples
from fastppo.monitor.output_guard import guard_output
from fastppo.monitor.tracker import Tracker, setup_logging
setup_logging(0)
for progress in ("always", "never"):
    config = TrackConfig(tensorboard=False, progress=progress)
    with Tracker(Path(sys.argv[1]), config, steps=9, rank=0) as tracker:
        for step in range(1, 5):
            tracker.log(step, {"score": 0.5})
        with tracker.guard("stdout"):
            show_samples([Sample("長い \\u2026", "\\ud800", 0.5, "é", 1.0)])
(Path(sys.argv[1]) / "done").touch()
"""


TERMINALS = {
    "ascii": "",
    "closed pipe": "| true",
    "full disk": ">/dev/full",
    "no streams": ">&- 2>&-",
}


@pytest.mark.parametrize("where", TERMINALS)
def test_a_terminal_that_cannot_show_it_costs_nothing(tmp_path, where):
    command = f'"$0" -c "$1" "$2" {TERMINALS[where]}; exit ${{PIPESTATUS[0]}}'
    found = subprocess.run(
        ["bash", "-c", command, sys.executable, PRINTS, str(tmp_path)],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, "Traceback" in found.stderr) == (0, False), found.stderr
    assert (tmp_path / "done").exists() and len(read_lines(tmp_path / METRICS)) == 8
    if where == "ascii":
        assert r"\u9577" in found.stdout and r"\xe9" in found.stdout and "ERROR" not in found.stderr
    if where == "full disk":
        assert found.stderr.count("ERROR stdout: No space left on device. The run continues without it.") == 1


# Every command

COMMANDS = {
    "ppo": (train, PPO, "actor"),
    "pairs": (train_reward, REWARD, "reward_model"),
    "answers": (train_sft, SFT, "model"),
    "dpo": (train_dpo, DPO, "model"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return whole_runs.prepare(stage_runs.prepare(tmp_path_factory.mktemp("tell")))


def start(data: Path, command: str, output: Path, **changes: Any) -> None:
    module, parser, _ = COMMANDS[command]
    changes = {"steps": 2, "eval__every": 1, "checkpoint__every": 0} | changes
    if command == "ppo":
        argv = whole_runs.settings(data, output, **changes)
    else:
        argv = stage_runs.settings(data, command, output=output, **changes)
    module.train(parse(argv, parser), start_world(1))


def assert_loads(folder: Path) -> None:
    kind = AutoModelForSequenceClassification if folder.name.endswith("reward_model") else AutoModelForCausalLM
    kind.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_of_which_nothing_can_be_told_leaves_its_model(data, tmp_path, monkeypatch, caplog, command):
    for outlet in ("metrics.jsonl", "a scalar of TensorBoard", "a profile"):
        monkeypatch.setattr(OUTLETS[outlet], failing(FAILURES[0]))
    monkeypatch.setattr("fastppo.online.run.write_samples", failing(FAILURES[0]))
    monkeypatch.setattr("fastppo.train_reward.write_reliability", failing(FAILURES[0]))
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    changes = {"track__tensorboard": "true", "track__profile_steps": "[1]"}
    start(data, command, tmp_path / "run", **changes)
    assert_loads(tmp_path / "run" / COMMANDS[command][2])
    for output in ("metrics.jsonl", "TensorBoard", "stdout", "the profile of step 1"):
        assert f"{output}: No space left on device. The run continues without it." in caplog.text


def test_samples_are_shown_when_the_actor_is_saved(data, tmp_path, monkeypatch):
    actor = tmp_path / "run/actor/model.safetensors"
    monkeypatch.setattr(
        "fastppo.online.run.show_samples", lambda rows: (tmp_path / "seen").write_text(str(actor.is_file()))
    )
    start(data, "ppo", tmp_path / "run")
    assert (tmp_path / "seen").read_text() == "True"


def refusing(output: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Exports below `output` fail, when they have written something."""

    def failing_there(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(role: Any, tokenizer: Any, folder: Path, *args: Any, **kwargs: Any) -> Any:
            if output in folder.parents:
                (atomic_dir.begin(folder) / "part").touch()
                raise error
            return real(role, tokenizer, folder, *args, **kwargs)

        return write

    for name in ("write_model", "write_critic"):
        monkeypatch.setattr(export, name, failing_there(getattr(export, name)))


@pytest.mark.parametrize(
    ("command", "error"),
    [*((command, FAILURES[0]) for command in COMMANDS), ("answers", FAILURES[3])],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_model_that_cannot_be_written_is_saved_elsewhere(data, tmp_path, monkeypatch, command, error):
    output, name = tmp_path / "run", COMMANDS[command][2]
    refusing(output, monkeypatch, error)
    changes = {"actor__average": 0.9} if command == "ppo" else {}
    with pytest.raises(
        ExportError, match=rf"{output / name} could not be written .*the model is in .*resume auto.*step-00000002"
    ):
        start(data, command, output, **changes)
    places = sorted(path.name for path in tmp_path.iterdir())
    others = ["run-actor-average", "run-critic"] if command == "ppo" else []
    assert places[0] == "run" and places[2:] == others  # one copy, though the best may be left more than once
    assert places[1].startswith(f"run-{name}")
    assert_loads(tmp_path / places[1])
    if command == "ppo":
        AutoModelForTokenClassification.from_pretrained(tmp_path / "run-critic")
    assert not [path for path in output.iterdir() if path.name.startswith(atomic_dir.UNFINISHED)]
    assert atomic_dir.problem(output / "checkpoints/step-00000002") is None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_no_place_takes_can_be_written_by_the_run_that_is_resumed(data, tmp_path, monkeypatch, command):
    output, name = tmp_path / "run", COMMANDS[command][2]
    with monkeypatch.context() as patched:
        patched.setattr(export, "_free_name", lambda *_: None)  # no disk has room
        refusing(output, patched, FAILURES[0])
        with pytest.raises(
            ExportError, match=r"No space left on device\); no other place could be written either\. .*step-00000002"
        ):
            start(data, command, output)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (output / name).exists()
    start(data, command, output, resume="auto")
    assert_loads(output / name)
    assert (output / "critic/model.safetensors").exists() == (command == "ppo")


def test_a_model_that_stands_there_stays_until_the_new_one_is_whole(data, tmp_path, monkeypatch):
    start(data, "answers", tmp_path / "run", eval__examples=0)
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    monkeypatch.setattr(atomic_dir, "sync", failing(FAILURES[0]))  # a disk may say that late
    with pytest.raises(OSError, match="No space"):
        atomic_dir.replace(atomic_dir.begin(tmp_path / "run/model"), tmp_path / "run/model")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before
