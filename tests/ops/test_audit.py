"""What bench/audit.py finds out about the Triton kernels without a GPU: bytes moved, and machine code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Entries = list[dict[str, Any]]


@pytest.fixture(scope="module")
def audit() -> tuple[Entries, Entries]:
    """The entries of both tables."""
    run = subprocess.run([sys.executable, "bench/audit.py"], cwd=ROOT, capture_output=True, text=True)
    if "no cuobjdump" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stdout + run.stderr
    bytes_moved, code = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    return bytes_moved, code


def test_no_kernel_moves_more_than_it_must(audit: tuple[Entries, Entries]) -> None:
    assert len(audit[0]) == 17
    for entry in audit[0]:
        assert 1.0 <= entry["ratio"] <= 1.01, entry


def test_no_kernel_spills(audit: tuple[Entries, Entries]) -> None:
    assert {entry["sm"] for entry in audit[1]} == {80, 90, 100}
    for entry in audit[1]:
        assert entry["spills"] == 0, entry
        assert entry["occupancy"] >= 0.25, entry


def test_rows_are_read_and_written_16_bytes_at_a_time(audit: tuple[Entries, Entries]) -> None:
    passes = {"forward": 1, "backward": 1, "sample": 1, "loss in chunk": 3}  # read, write, clear a dropped row
    over_rows = [entry for entry in audit[1] if entry["op"].split(",")[0] in passes]
    assert len(over_rows) == 3 * 20
    for entry in over_rows:
        assert len(entry["loops"]) == passes[entry["op"].split(",")[0]], entry
        assert all(access.endswith(".128") for loop in entry["loops"] for access in loop["memory"]), entry
