"""What bench/audit.py finds out about the Triton kernels without a GPU: bytes moved, and machine code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Entries = list[dict[str, Any]]

# Bytes moved over the least, where they may be more than 1.01: partial results beside what is read and written once.
MOST = {"attention": 1.02, "sample": 1.041, "rms_norm": 1.02, "rms_norm backward": 1.02}


def start(kind: str, *architectures: int) -> subprocess.Popen[str]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if kind == "bytes" else {}
    command = [sys.executable, "bench/audit.py", kind, *map(str, architectures)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def architectures(request):
    """All, or where a share of the cases is asked for (`make test SHARE=3`) one: the machine code takes minutes."""
    return [80, 90, 100] if request.config.getoption("share") == 1 else [90]


@pytest.fixture(scope="module")
def audit(architectures):
    """The entries of both tables, made side by side."""
    tables = []
    for run in [start("bytes"), start("code", *architectures)]:
        out, errors = run.communicate()
        if re.search("no (cuobjdump|nvdisasm)", errors):
            pytest.skip(errors.splitlines()[-1])
        assert run.returncode == 0, out + errors
        tables.append(json.loads(out.splitlines()[-1]))
    return tables[0], tables[1]


def test_no_kernel_moves_more_than_it_must(audit):
    assert len(audit[0]) == 25 + 2 * (2 + 6 + 5 + 12 + 12)  # scale, attention, rms_norm, glu, rotary
    for entry in audit[0]:
        assert 1.0 <= entry["ratio"] <= MOST.get(entry["op"].split(",")[0], 1.01), entry


def test_no_kernel_spills(audit, architectures):
    assert {entry["sm"] for entry in audit[1]} == {*architectures}
    for entry in audit[1]:
        assert entry["spills"] == 0, entry
        # Attention waits for tiles that are copied beside the computation: 32 KiB for each four warps.
        # The gradient of RMSNorm has one program a multiprocessor, and the next rows on their way.
        least = {"attend_kernel": 3 / 16, "rms_norm_backward_kernel": 1 / 8}.get(entry["kernel"], 1 / 4)
        assert entry["occupancy"] >= least, entry


def test_rows_are_read_and_written_16_bytes_at_a_time(audit, architectures):
    passes = {"forward": 1, "backward": 1, "sample": 1, "loss in chunk": 3}  # read, write, clear a dropped row
    over_rows = [
        entry for entry in audit[1] if entry["op"].split(",")[0] in passes and entry["kernel"] != "choose_kernel"
    ]
    assert len(over_rows) == len(architectures) * 22
    for entry in over_rows:
        assert len(entry["loops"]) == passes[entry["op"].split(",")[0]], entry
        memory = {access for loop in entry["loops"] for access in loop["memory"]}
        parts = {"STG.E"} if entry["kernel"] == "parts_kernel" else set()  # a peak and a sum for 256 columns
        assert all(access.endswith(".128") for access in memory - parts), entry


def test_a_gradient_is_read_and_written_16_bytes_at_a_time(audit, architectures):
    scaled = [entry for entry in audit[1] if entry["op"] == "scale"]
    assert len(scaled) == len(architectures) * 2
    for entry in scaled:
        (loop,) = entry["loops"]
        assert {access.rpartition(".")[2] for access in loop["memory"]} == {"128"}, entry


def test_rows_of_a_layer_are_read_and_written_16_bytes_at_a_time(audit, architectures):
    over_rows = [entry for entry in audit[1] if entry["kernel"] in ("rms_norm_kernel", "rms_norm_backward_kernel")]
    assert len(over_rows) == len(architectures) * 2 * 2 * 5
    for entry in over_rows:
        (loop,) = entry["loops"]
        assert all(access.endswith(".128") for access in loop["memory"]), entry
        if entry["op"].startswith("rms_norm backward") and entry["dtype"] == "bfloat16, 576 columns":
            loads = [i for i, access in enumerate(loop["memory"]) if access.startswith("LDG")]
            assert max(loads) < loop["memory"].index("STG.E.128"), entry  # the next rows before these are written


def test_gated_activations_and_rotations_are_read_and_written_16_bytes_at_a_time(audit, architectures):
    of_layers = [entry for entry in audit[1] if entry["op"].startswith(("glu", "rotary"))]
    assert len(of_layers) == len(architectures) * (12 + 4 + 2 * 12)
    for entry in of_layers:
        assert entry["accesses"] and all(access.endswith(".128") for access in entry["accesses"]), entry


def test_keys_and_values_are_on_their_way_to_shared_memory_16_bytes_at_a_time_while_others_are_computed(
    audit, architectures
):
    attention = [entry for entry in audit[1] if entry["kernel"] == "attend_kernel"]
    assert len(attention) == len(architectures) * 4 * 6
    for entry in attention:
        (loop,) = entry["loops"]
        assert set(loop["memory"]) == {"LDGSTS.E.BYPASS.128"}, entry
