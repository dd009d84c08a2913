"""`bench/gpu.py`: its small form runs whole, a part that is cut off leaves what it found, its arithmetic is right."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch
from ceilings import CARDS, Ceilings
from end_to_end import SIZES, llama
from gpu_parts import build, pytest_lines, roofline, trace
from gpu_parts.report import RESULTS, Report, table
from gpu_parts.tests import summarise

BENCH = Path(gpu.__file__).parent
# What each part has to find on the CPU.
FINDINGS = {
    "card": {"versions", "ceilings"},
    "build": {"extension"},
    "tests": {"tests", "slowest tests"},
    "step": {"cold step", "warm step", "profile", "gaps"},
    "decode": {"decode", "decode steps"},
    "passes": {"microbatch", "profile"},
    "ops": {"ceiling", "op"},
    "residency": {"moves", "copies"},
    "memory": {"memory"},
    "quickstart": {"quickstart-sft", "quickstart-reward", "quickstart"},
}


def records(output):
    return [json.loads(line) for line in (output / RESULTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The results of the small form of every part."""
    output = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, BENCH / "gpu.py", "--small", "--output", output, "--seconds", "900"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return records(output)


@pytest.mark.slow
def test_every_part_runs_in_its_small_form(small):
    statuses = {record["part"]: record["status"] for record in small if "status" in record}
    assert statuses == dict.fromkeys(gpu.PARTS, "done")
    found = {part: {r["finding"] for r in small if r["part"] == part and "finding" in r} for part in FINDINGS}
    assert all(FINDINGS[part] <= found[part] for part in FINDINGS), found
    assert not any("error" in record for record in small)


@pytest.mark.slow
def test_every_op_has_a_case_in_bf16_or_fp32(small):
    from fastppo import ops
    from fastppo.ops import layers

    cases = [record for record in small if record.get("finding") == "op"]
    assert {case["op"] for case in cases} == _ops(ops) | _ops(layers)
    assert all(not case["failed"] and case["ms"]["fastppo"] > 0 for case in cases)


def _ops(module):
    """Names of the functions of a door that take a tensor first and return tensors."""
    found = set()
    for name, function in inspect.getmembers(module, inspect.isfunction):
        annotations = list(function.__annotations__.values())
        if not name.startswith("_") and annotations[:1] == ["Tensor"] and re.search("Tensor|Stats", annotations[-1]):
            found.add(name)
    return found


@pytest.mark.slow
def test_a_first_update_begins_at_ratio_1(small):
    (warm,) = (record for record in small if record.get("finding") == "warm step")
    assert warm["ratio_mean"] == pytest.approx(1.0, abs=1e-6) and warm["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert [row["phase"] for row in warm["phases"]] == ["sampling", "feedback", "experience", "learning", "step"]
    (gaps,) = (record for record in small if record.get("finding") == "gaps")
    assert len(gaps["gaps"]) == 10 and all(gap["ms"] > 0 for gap in gaps["gaps"])


# Parts that end otherwise than they should

HANGING = """
import subprocess, time

def run(report):
    report.add("before", "before", child=subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    time.sleep(600)
"""
OTHERS = {
    "fails": "def run(report):\n    raise ValueError('out of luck')",
    "crashes": "import os\n\ndef run(report):\n    report.add('before', 'before')\n    os.abort()",
    "lacks": "from gpu_parts.report import SkipPart\n\ndef run(report):\n    raise SkipPart('no such card')",
    "works": "def run(report):\n    report.add('figure', 'a figure', value=1)",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts of our own, in place of those that measure."""
    folder = tmp_path / "bench/gpu_parts"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "report.py"):
        shutil.copy(BENCH / "gpu_parts" / name, folder / name)
    for name, code in (OTHERS | {"hangs": HANGING}).items():
        (folder / f"{name}.py").write_text(code)
    limits = {name: gpu.Part(60, "...") for name in OTHERS}
    monkeypatch.setattr(gpu, "BENCH", tmp_path / "bench")
    monkeypatch.setattr(
        gpu, "PARTS", {"hangs": gpu.Part(3, "..."), **limits, "wants": gpu.Part(9, "...", ("no_such",))}
    )
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    return tmp_path


def test_a_part_that_is_cut_off_fails_or_crashes_leaves_what_it_found_and_the_next_goes_on(parts, capsys):
    output = parts / "out"
    assert gpu.main(["--output", str(output)]) == 1
    found = records(output)
    statuses = {record["part"]: record["status"] for record in found if "status" in record}
    expected = {"hangs": "cut off", "fails": "failed", "crashes": "failed", "lacks": "skipped", "works": "done"}
    assert statuses == expected | {"wants": "skipped"}
    assert [record["part"] for record in found if record.get("finding") == "before"] == ["hangs", "crashes"]
    printed = capsys.readouterr().out
    for line in (
        "ValueError: out of luck",
        "lacks: skipped, no such card",
        "wants: skipped after 0.0 s, without no_such",
    ):
        assert line in printed
    assert json.loads(printed.splitlines()[-1])["parts"] == expected | {"wants": "skipped"}
    assert json.loads((output / "results.json").read_text()) == found


def test_what_a_cut_off_part_started_is_ended_too(parts):
    assert gpu.main(["--output", str(parts), "--parts", "hangs"]) == 1
    child = next(record["child"] for record in records(parts) if "child" in record)
    deadline = time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, f"process {child} is still there"
        time.sleep(0.05)


def _runs(process):
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_part_begins_when_no_time_is_left(parts, capsys):
    assert gpu.main(["--output", str(parts), "--parts", "works,lacks", "--seconds", "1"]) == 0
    assert capsys.readouterr().out.count("no time is left") == 2


def test_a_part_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "step,stpe"])
    assert "there is no part stpe; there are card, build, tests, step" in capsys.readouterr().err


def test_in_gpu_form_the_limits_of_the_most_valuable_parts_fit_into_the_whole():
    names = list(gpu.PARTS)
    assert names == list(FINDINGS)
    assert sum(gpu.PARTS[name].seconds for name in names[:5]) <= gpu.SECONDS


# The extension


def test_the_extension_is_built_where_it_is_absent_or_old(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "fastppo").mkdir()
    (tmp_path / "csrc/gae.cpp").touch()
    assert build.stale(tmp_path) == "it is not there"
    suffix = build.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"fastppo/_C{suffix}").touch()
    os.utime(tmp_path / "csrc/gae.cpp", (0, 0))
    assert build.stale(tmp_path) is None
    os.utime(tmp_path / f"fastppo/_C{suffix}", (0, 0))
    os.utime(tmp_path / "csrc/gae.cpp", (9, 9))
    assert build.stale(tmp_path) == "gae.cpp changed since"
    os.utime(tmp_path / f"fastppo/_C{suffix}", (9, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/nvcc")
    for archs, why in ([], "it was built without the CUDA kernels"), ([90], None):
        monkeypatch.setattr(build, "built", lambda archs=archs: {"cuda_archs": archs})
        assert build.stale(tmp_path) == why


# The tests of a GPU


def test_a_failed_test_is_named_with_its_error(tmp_path):
    lines = tmp_path / "lines.jsonl"
    code = (
        "import pytest\n\ndef test_a():\n    assert 1 == 2, 'unequal'\n\n@pytest.mark.skip\ndef test_b():\n    pass\n"
    )
    (tmp_path / "test_it.py").write_text(code + "\ndef test_c():\n    pass\n")
    environment = os.environ | {"PYTHONPATH": str(BENCH), pytest_lines.LINES: str(lines)}
    plugins = ["-p", "gpu_parts.pytest_lines", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", tmp_path, tmp_path / "test_it.py"]
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    summarise(
        report := report_in(tmp_path), [json.loads(line) for line in lines.read_text().splitlines()], cut_off=True
    )
    counted, failed, _ = records(report.output)
    assert (counted["passed"], counted["failed"], counted["skipped"], counted["cut_off"]) == (1, 1, 1, True)
    assert failed["test"] == "test_it.py::test_a" and "unequal" in failed["error"]


def report_in(folder):
    return Report("part", folder, folder, True, time.time() + 60)


# Traces


def event(kind, name, start, length, **arguments):
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "args": arguments}


@pytest.fixture
def traced(tmp_path):
    """Two phases on a GPU: 100 us with two kernels and a copy beside and after them, then 50 us with nothing on it."""
    events = [
        event("user_annotation", "sampling", 0, 100),
        event("user_annotation", "learning", 100, 50),
        event("user_annotation", "Optimizer.step", 0, 150),
        event("kernel", "first", 10, 20),
        event("kernel", "second", 40, 20),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 30, bytes=3_000_000),
        event("gpu_user_annotation", "sampling", 10, 70),
        event("cpu_op", "aten::item", 30, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 31, 9),
        event("cuda_runtime", "cudaLaunchKernel", 31, 1),
        {"ph": "i", "name": "a mark", "ts": 5},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return trace.read_trace(path, ("sampling", "learning"))


def test_gaps_are_the_times_with_nothing_on_the_gpu_and_say_what_the_host_did(traced):
    gaps = trace.longest_gaps(traced, 4)
    assert [(gap.phase, gap.start, gap.end) for gap in gaps] == [
        ("learning", 100, 150),
        ("sampling", 80, 100),
        ("sampling", 0, 10),
        ("sampling", 30, 40),
    ]
    assert (gaps[3].after, gaps[3].before, gaps[3].host) == ("first", "second", "cudaStreamSynchronize")
    assert (gaps[0].after, gaps[0].before) == ("(begin)", "(end)")
    assert len(trace.longest_gaps(traced, 2)) == 2


def test_calls_that_wait_for_the_gpu_are_found_in_their_phase(traced):
    sampling, learning = traced.phases
    assert [span.name for span in trace.host_waits(traced, sampling)] == ["cudaStreamSynchronize"]
    assert trace.host_waits(traced, learning) == []


def test_a_copy_is_exposed_where_no_kernel_runs_beside_it(traced):
    (copy,) = trace.copies(traced)
    assert copy["phase"] == "sampling" and copy["direction"] == "HtoD" and copy["copies"] == 1
    assert copy["gb"] == pytest.approx(0.003) and copy["s"] == pytest.approx(30e-6)
    assert copy["exposed_s"] == pytest.approx(20e-6)


def test_overlapping_spans_count_once(traced):
    assert trace.busy_seconds(traced.busy) == pytest.approx(60e-6)
    names = [row["name"] for row in trace.by_name(traced.busy, 2)]
    assert names == ["Memcpy HtoD (Pinned -> Device)", "first"]


# The least time of a step


@pytest.mark.parametrize("name", SIZES)
def test_counted_weights_and_products_are_those_of_the_model(name):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    size, length = SIZES[name], 8
    with torch.device("meta"):
        model = LlamaForCausalLM(llama(size))
        tokens = torch.zeros(2, length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model.base_model(tokens)
        with FlopCounterMode(display=False) as of_head:
            model.lm_head(torch.zeros(5, size.hidden, dtype=model.dtype))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert roofline.layer_weights(size) + 2 * roofline.head_weights(size) == matrices
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    # Batched products are those of attention, of whose square causality needs half.
    assert roofline.forward(size, 2, length).flops == counted["aten.mm"] + counted["aten.bmm"] / 2
    assert roofline.head(size, 5).flops == of_head.get_total_flops()


def test_the_least_time_of_a_step_is_that_of_its_products_and_bytes():
    most = Ceilings("H100", 3.35e12, 989e12, "datasheet")
    least = roofline.least_seconds(SIZES["1b"], most)
    # By hand: 128 x (128 + 256) tokens, 973M weights in layers, a head of 263M over the responses; 2.7G trained weights
    # of 30 bytes in the update.
    assert least["feedback"] == pytest.approx(2 * 973e6 * 49_152 / 989e12, rel=0.02)
    assert least["learning"] == pytest.approx(
        6 * (2 * 973e6 * 49_152 + 263e6 * 32_768) / 989e12 + 2.7e9 * 30 / 3.35e12, rel=0.02
    )
    assert least["sampling"] == pytest.approx(256 * 2 * 1.236e9 / 3.35e12 + 0.032 + 0.08, rel=0.1)


def test_each_card_has_the_figures_of_its_own_name():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA H200": "H200",
        "NVIDIA GH200 480GB": "GH200",
        "NVIDIA A100-SXM4-40GB": "A100",
        "NVIDIA A100-SXM4-80GB": "A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
        "NVIDIA B200": "B200",
    }
    assert set(names.values()) == set(CARDS)
    assert {name: next(card for card in CARDS if card in name) for name in names} == names


def test_a_table_has_its_columns_below_each_other():
    rows = [{"name": "a", "ms": 1234.5, "count": 1200}, {"name": "bcd", "ms": 0.001234, "count": 3, "more": "x"}]
    assert table(rows).splitlines() == [
        "name       ms  count  more",
        "a       1,234  1,200",
        "bcd   0.00123      3     x",
    ]
