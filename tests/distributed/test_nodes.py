"""Runs on more than one node: two of them on this machine, by DeepSpeed's hostfile."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import whole_runs

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = ("localhost", "127.0.0.1")  # a hostfile may not name a host twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("runs"))


def start_nodes(folder, argv):
    """One `deepspeed` command on each node, as the README has it where there is no ssh."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    deepspeed = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile, "--no_ssh"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    for rank in range(len(NODES)):
        master = ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        yield subprocess.Popen(
            [*deepspeed, *master, REPOSITORY / "fastppo/train.py", *argv],
            env=inherited,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def test_two_nodes_make_the_run_that_two_ranks_on_one_node_make(folder, forks):
    changes = {"steps": 2, "zero__stage": 2, "optim__dtype": "bf16"}
    nodes = list(start_nodes(folder, whole_runs.settings(folder, folder / "nodes", **changes)))
    try:
        logs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(logs)
    forks.run(whole_runs.settings(folder, folder / "ranks", **changes), ranks=2)
    assert whole_runs.records(folder / "nodes") == whole_runs.records(folder / "ranks")
    assert whole_runs.same(whole_runs.state(folder / "nodes"), whole_runs.state(folder / "ranks"))
    assert all("imbalance" in record for record in whole_runs.records(folder / "nodes") if "policy_loss" in record)


# Each rank in a folder of its own, as on nodes whose disks are their own
DISKS = """
import os
from fastppo.distributed import world

world.FILE_TIMEOUT = 0.5
disk = os.path.join({folder!r}, "disk-" + os.environ["RANK"])
os.makedirs(disk)
os.chdir(disk)
"""


def test_an_output_that_the_nodes_do_not_share_is_refused(folder, forks):
    argv = whole_runs.settings(folder, Path("out"))
    run = forks.start(argv, 2, DISKS.format(folder=str(folder)))
    assert forks.wait(run) == [1, 1]
    for log in run.logs:
        assert "output = out is not the same folder on every node" in log.read_text()
        assert f"visible to rank 1 on {socket.gethostname()}" in log.read_text() and "Traceback" not in log.read_text()
    assert not list((folder / "disk-0/out").glob(".shared-*"))
