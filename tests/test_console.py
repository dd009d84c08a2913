"""The script `fastppo`: its commands, what it passes to DeepSpeed's launcher, and the signals that reach the ranks."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import fastppo.__main__ as console
from fastppo import __version__, config

PACKAGE = Path(console.__file__).parent
TRAINING = list(config.COMMANDS)


def test_every_module_that_is_a_program_is_a_command():
    modules = {
        ".".join(["fastppo", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in PACKAGE.rglob("*.py")
        if "\ndef main(" in path.read_text() and path != PACKAGE / "__main__.py"
    }
    assert {command.module for command in console.programs().values()} == modules


def test_help_has_a_line_for_each_command_and_imports_no_torch():
    code = "import fastppo.__main__ as m, sys; m.main(['--help']); sys.exit('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name, command in console.programs().items():
        assert f"\n  {name} " in said and f"  {command.line}\n" in said


def test_version(capsys):
    console.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian", "--config", "quickstart"], "unknown command trian; did you mean train?"),
        (["serve_reward"], "did you mean serve-reward?"),
        (
            ["xyz"],
            "unknown command xyz; there are train, sft, reward, dpo, rest, generate, best-of-n, plan, report, ",
        ),
        (["--num_gpus", "2", "train"], "the command comes before --num_gpus, as in `fastppo train --num_gpus ...`"),
        ([], "usage: fastppo COMMAND"),
    ],
)
def test_a_command_that_is_not_there_ends_with_the_nearest_and_status_2(capsys, argv, said):
    with pytest.raises(SystemExit) as left:
        console.main(argv)
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_the_others_are_given_their_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        console.main(["report", str(tmp_path / "nothing")])
    assert left.value.code == 2 and str(tmp_path / "nothing") in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        console.main(["plan", "--gpus", "2", "--actor.lrr", "1"])
    assert left.value.code == 2 and "unknown setting actor.lrr; did you mean actor.lr?" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINING)
def test_help_of_a_command_that_trains_says_where_launcher_flags_stand_and_has_all_settings(capsys, name):
    with pytest.raises(SystemExit) as left:
        console.main([name, "--num_gpus", "2", "--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and f"fastppo {name} --num_gpus 4 --config" in said
    assert ("--dtype" if name == "generate" else "--optim.dtype") in said


# What is passed to DeepSpeed's launcher


@pytest.fixture(scope="module")
def flags():
    return console.launcher_flags()


def test_the_launchers_flags_are_those_of_its_own_parser(flags):
    assert {"--num_gpus", "--num_accelerators", "--num_nodes", "--hostfile", "-H", "--master_port"} <= set(flags)
    assert flags["--num_gpus"] and flags["-i"] and not flags["--no_ssh"] and not flags["--module"]


@pytest.mark.parametrize("command", config.COMMANDS.values(), ids=TRAINING)
def test_no_setting_has_the_name_of_a_launcher_flag(flags, command):
    assert not {f"--{name}" for name in command.settings} & set(flags)


@pytest.mark.parametrize(
    ("args", "first"),
    [
        ([], 0),
        (["--config", "quickstart"], 0),
        (["--num_gpus", "2", "--config", "quickstart"], 2),
        (["--num_gpus=2", "--no_ssh", "--node_rank", "0", "--steps", "3"], 4),
        (["-H", "hosts", "--steps=3"], 2),
        (["--num_gpu", "2"], 0),  # the command says that there is no such setting
    ],
)
def test_flags_of_the_launcher_end_at_the_first_setting(flags, args, first):
    assert console.split("train", args, flags) == (args[:first], args[first:])


@pytest.mark.parametrize("late", [["--num_gpus", "2"], ["--num_gpus=2"]])
def test_a_launcher_flag_behind_a_setting_is_refused_with_its_place(flags, capsys, late):
    with pytest.raises(SystemExit) as left:
        console.split("sft", ["--config", "quickstart-sft", *late], flags)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert late[0] in said and "`fastppo sft --num_gpus ... --config ...`" in said


def test_what_the_launcher_refuses_is_one_message(tmp_path):
    (tmp_path / "hosts").write_text("nonsense\n")
    argv = [sys.executable, "-m", "fastppo", "train", "--hostfile", str(tmp_path / "hosts"), "--config", "quickstart"]
    ended = subprocess.run(argv, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "fastppo: DeepSpeed's launcher cannot start the ranks: Hostfile contains" in ended.stderr


# Two ranks under the launcher, which do not train but note what they are told

RANK = """
import os, signal, sys, time
from pathlib import Path

here = Path(os.environ["NOTES"]) / os.environ["RANK"]

def told(number, _):
    time.sleep(0.5)  # it takes a while to save
    here.with_suffix(".saved").write_text(signal.Signals(number).name)
    sys.exit(0)

signal.signal(signal.SIGTERM, told)
here.with_suffix(".args").write_text(" ".join(sys.argv[1:]))
if sys.argv[-1] != "wait":
    sys.exit(int(sys.argv[-1]))
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    """Starts `fastppo train ARGS`, whose ranks run the lines above."""
    (tmp_path / "noting.py").write_text(RANK)
    code = """
    from dataclasses import replace
    import fastppo.__main__ as console
    from fastppo.config import COMMANDS
    COMMANDS["train"] = replace(COMMANDS["train"], module="noting")
    console.main()
    """
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    path = f"{tmp_path}:{PACKAGE.parent}"
    env = {k: v for k, v in os.environ.items() if k not in ranks} | {"PYTHONPATH": path, "NOTES": str(tmp_path)}
    started = []

    def start(*args):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        argv = ["train", "--num_accelerators", "2", "--master_port", port, *args]
        command = [sys.executable, "-c", textwrap.dedent(code), *argv]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def noted(folder, suffix):
    return [path.read_text() for path in sorted(folder.glob(f"*.{suffix}"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_ranks_which_end_by_themselves_before_it_ends(tmp_path, start, number):
    process = start("--steps", "wait")
    end = time.monotonic() + 60
    while len(noted(tmp_path, "args")) < 2:
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert noted(tmp_path, "saved") == ["SIGTERM", "SIGTERM"] and process.returncode == 0, said
    assert noted(tmp_path, "args") == ["--local_rank=0 --steps wait", "--local_rank=1 --steps wait"]


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_that_of_the_ranks(tmp_path, start, status):
    process = start("--steps", str(status))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == status, said
    assert "--steps" in noted(tmp_path, "args")[0]


def test_a_signal_before_there_are_ranks_ends_it_as_usual(start):
    process = start("--steps", "wait")
    time.sleep(1.0)  # the launcher's own import has begun, and takes longer
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
