"""How a run's processes meet."""

import os
import socket
import subprocess
import sys

import pytest

from fastppo import train, train_dpo, train_reward, train_sft
from fastppo.config.launch import LaunchError, check_launch
from fastppo.distributed import rendezvous


def test_a_port_that_is_in_use_is_named_with_the_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", "from fastppo.distributed.world import start_world; start_world(1)"],
            env=os.environ | first | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"port {port} of this machine" in done.stderr and f"--master_port {port + 1}" in done.stderr


# A rank that nobody else belongs to

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, r"RANK is 0; LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set\)\. .*`unset RANK"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4 in the environment, and RANK is not set"),
        ({**WHOLE, "MASTER_PORT": ""}, r"MASTER_PORT is not set.*deepspeed"),
        ({**WHOLE, "RANK": "two"}, r"RANK is 'two' in the environment, and no whole number"),
        ({**WHOLE, "RANK": "2"}, r"RANK is 2, .*counted from 0, below WORLD_SIZE"),
        ({**WHOLE, "MASTER_PORT": "70000"}, r"a port is at most 65535"),
        (SRUN, r"one of 4 that srun started .*4 separate runs.*srun --ntasks=1 deepspeed .*RANK=\$SLURM_PROCID"),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, r"SLURM_STEP_NUM_TASKS is 4"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, r"one of 2 that mpirun started"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"one of 2 that mpirun started .*env -u PMI_RANK -u PMI_SIZE"),
    ],
)
def test_ranks_that_cannot_meet_are_named_before_anything_waits(environment, words):
    with pytest.raises(LaunchError, match=words):
        check_launch(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        WHOLE,
        {**SRUN, **WHOLE},
        {"SLURM_NTASKS": "8"},  # a shell of salloc
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_rank_that_was_launched_and_a_process_alone_go_on(environment):
    check_launch(environment)


@pytest.mark.parametrize("command", [train, train_sft, train_reward, train_dpo])
@pytest.mark.parametrize("number", ["0", "1"])
def test_every_command_refuses_to_be_n_separate_runs_and_one_process_says_so(command, number, monkeypatch, capsys):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in (SRUN | {"SLURM_PROCID": number}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert ("4 separate runs" in capsys.readouterr().err) == (number == "0")


MEET = """
import sys, time
from fastppo.distributed import rendezvous
rendezvous.FIRST_LOG, rendezvous.ON_ONE_MACHINE, rendezvous.STORE_TIMEOUT = 0.5, 2.0, 2.0
from fastppo.distributed.world import start_world
start = time.monotonic()
try:
    print(start_world(1).ranks)
finally:
    print(time.monotonic() - start)
"""


def meeting(rank: int, port: int, address: str = "127.0.0.1", code: str = MEET) -> "subprocess.Popen[str]":
    named = WHOLE | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": address}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | named | {"LOCAL_SIZE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "address", "words"),
    [
        (0, "127.0.0.1", "this is RANK 0 of WORLD_SIZE 2: rank 1 has not connected to 127.0.0.1:"),
        (1, "127.0.0.1", "this is RANK 1 of WORLD_SIZE 2: rank 0 has not answered at 127.0.0.1:"),
        (0, "no-such-host.invalid", "this machine does not answer at no-such-host.invalid:"),
    ],
)
def test_who_is_waited_for_is_said_soon_and_not_for_half_an_hour(rank, address, words):
    run = meeting(rank, free_port(), address)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and "Traceback" not in said
    waiting, *_, end = (line for line in said.splitlines() if words in line)
    assert "s now and at most 2 s." in waiting and end.startswith("fastppo") and "within 2 s." in end
    assert "`unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`" in end


@pytest.mark.parametrize(
    ("host", "local", "one"),
    [
        ("127.0.0.1", "1", True),
        ("localhost", "1", True),
        ("10.0.0.1", "2", True),
        ("10.0.0.1", "1", False),
        (socket.gethostname(), "1", False),  # which /etc/hosts may have as 127.0.1.1
    ],
)
def test_nodes_that_may_be_minutes_apart_are_told_from_ranks_of_one_command(host, local, one, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", local)
    assert rendezvous._on_one_machine(host, 2) == one


@pytest.mark.slow
def test_something_else_that_listens_is_no_rank_0():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        run = meeting(1, other.getsockname()[1])
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and "but it is not rank 0 of a run" in said and "Traceback" not in said


@pytest.mark.slow
def test_ranks_that_start_one_after_the_other_meet():
    port = free_port()
    late = MEET.replace("start = ", "time.sleep(1.0)\nstart = ")
    runs = [meeting(0, port, code=late), meeting(1, port)]
    said = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [out.split()[0] for out, _ in said] == ["2", "2"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_rank_ends_with_its_status_and_without_cleanup_where_a_library_asks_for_that(status):
    code = """
import atexit, sys
from fastppo.distributed import leave, leave_without_cleanup

atexit.register(print, "cleaned up")
if {at_once}:
    leave_without_cleanup()
print("at the end", end="")
leave({status})
print("after it")
"""
    for at_once, said in ((True, "at the end"), (False, "at the end" + "after it\n" * (status == 0) + "cleaned up\n")):
        run = subprocess.run(
            [sys.executable, "-c", code.format(at_once=at_once, status=status)], capture_output=True, text=True
        )
        assert (run.returncode, run.stdout) == (status, said), run.stderr
