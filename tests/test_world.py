"""How a run's processes meet."""

import os
import socket
import subprocess
import sys


def test_a_port_that_is_in_use_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", "from fastppo.world import start_world; start_world(1)"],
            env=os.environ | first | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"port {port} of this machine" in done.stderr and f"--master_port {port + 1}" in done.stderr
