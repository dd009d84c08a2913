"""GAE's CUDA kernel, run thread for thread on the CPU by tests/simt: numbers, bits, traffic, races, bounds.

What numbers and bits are asked for holds on a GPU too, where there is one.
"""

import ctypes
import faulthandler
import itertools
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gae_cases import EACH_LENGTH, GAE_CASES, GaeCase, assert_alone_as_together, assert_right
from hypothesis import given, settings
from hypothesis import strategies as st
from native import ROOT, SIMT, simt_kernel
from torch import Tensor

from fastppo import _C, ops

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16]
POINTERS = ("rewards", "values", "cu_seqlens", "bootstrap", "mask", "advantages", "returns")


class Request(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int64) for name in ("tokens", "sequences")]
        + [(name, ctypes.c_double) for name in ("gamma", "lam")]
        + [(name, ctypes.c_int32) for name in ("bf16", "wide", "backwards", "places", "seed")]
    )


class Traffic(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("read", "written", "launches")]  # bytes; kernels


class Kernels:
    """Takes what `ops.gae` takes, and keeps the bytes that the last call moved."""

    def __init__(self, library: Path) -> None:
        self.run = ctypes.CDLL(str(library)).gae
        self.run.restype = Traffic
        self.traffic = Traffic()

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        cu_seqlens: Tensor,
        *,
        gamma: float,
        lam: float,
        bootstrap: Tensor | None = None,
        mask: Tensor | None = None,
        backwards: bool = False,
        places: int = 1,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        tokens, sequences = len(rewards), len(cu_seqlens) - 1
        out = torch.full((2, tokens), math.nan)
        if sequences == 0:  # nothing is launched then
            return out[0], out[1]
        tensors = (rewards, values, cu_seqlens, bootstrap, mask, out[0], out[1])
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        kinds = (rewards.dtype == torch.bfloat16, cu_seqlens.dtype == torch.int64, backwards, places, seed)
        self.traffic = self.run(ctypes.byref(Request(*pointers, tokens, sequences, gamma, lam, *kinds)))
        return out[0], out[1]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return Kernels(simt_kernel(SIMT / "gae.cpp", tmp_path_factory.mktemp("simt") / "gae.so", "-O2"))


def on_gpu(*packed: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`ops.gae` on the GPU, of the host's tensors."""
    tensors = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    advantages, returns = ops.gae(*(x.cuda() for x in packed), **tensors)
    return advantages.cpu(), returns.cpu()


@pytest.fixture(scope="session", params=["simulated", pytest.param("GPU", marks=pytest.mark.gpu)])
def gae(request):
    if request.param == "simulated":
        return request.getfixturevalue("kernels")
    if not _C.built()["cuda_archs"]:
        pytest.fail("fastppo._C was built without its CUDA sources; `make clean test` builds it again")
    return on_gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", GAE_CASES, ids=str)
def test_every_case_is_as_good_as_the_oracle(gae, case, dtype):
    assert_right(gae, case.build(dtype))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(1000, 1100), st.integers(8150, 12_400)), max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    kept=st.floats(0, 1),
    bf16=st.booleans(),
)
def test_any_lengths_and_masks_are_as_good_as_the_oracle(gae, lengths, gamma, lam, seed, kept, bf16):
    random = torch.Generator().manual_seed(seed)
    arguments = GaeCase(str(seed), tuple(lengths), gamma, lam, bootstrap=True).build(DTYPES[bf16])
    arguments["mask"] = torch.rand(sum(lengths), generator=random) < kept
    assert_right(gae, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["", "some", "ends", "runs"])
def test_a_sequence_does_not_depend_on_its_neighbours_or_its_alignment(gae, mask, dtype):
    case = GaeCase("alone", (*EACH_LENGTH, 40_000, 7, 12_288, 4096), mask=mask, bootstrap=True)
    assert_alone_as_together(gae, case.build(dtype))


@pytest.mark.parametrize(("places", "backwards"), [(1, True), (2, False), (3, True), (7, False)])
def test_blocks_may_run_in_any_order_and_as_many_at_once_as_there_is_room_for(kernels, places, backwards):
    """No bit depends on it, and no block waits for one that has not begun."""
    arguments = GaeCase("order", (*EACH_LENGTH, 40_000), mask="some", bootstrap=True).build(torch.float32)
    expected = torch.stack(kernels(**arguments))
    for seed in range(3):
        found = kernels(**arguments, places=places, backwards=backwards, seed=seed)
        assert torch.equal(torch.stack(found), expected)


def test_a_carry_passes_checkpoints(kernels):
    """A sequence of more windows than those that a block reads to find what follows its own."""
    arguments = GaeCase("checkpoints", (3, 300_000, 5), 1.0, 1.0, bootstrap=True).build(torch.bfloat16)
    assert_right(kernels, arguments)
    expected = torch.stack(kernels(**arguments))
    assert torch.equal(torch.stack(kernels(**arguments, places=5)), expected)


@pytest.mark.parametrize("length", [5, 1000, 2032, 2033, 50_000])
def test_one_kernel_is_launched(kernels, length):
    kernels(**GaeCase("launches", (length,) * 5).build(torch.float32))
    assert kernels.traffic.launches == 1


@pytest.mark.gpu
def test_on_a_gpu_too_one_kernel_is_launched():
    packed = (torch.zeros(50_000).cuda(), torch.zeros(50_000).cuda(), torch.arange(0, 50_001, 1000).cuda())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.gae(*packed, gamma=1.0, lam=0.95)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len([name for name in names if "memset" not in name.lower()]) == 1, names


def test_arrays_may_start_anywhere(kernels):
    """A view's memory need not be aligned to the 16 bytes of a wide access."""
    arguments = GaeCase("views", (5, 1500, 9000), mask="some").build(torch.bfloat16)
    expected = torch.stack(kernels(**arguments))
    for rewards, values, mask in ((1, 0, 0), (0, 3, 5), (7, 2, 1)):
        shifts = {"rewards": rewards, "values": values, "mask": mask}
        views = {name: torch.cat([arguments[name][:by], arguments[name]])[by:] for name, by in shifts.items()}
        assert torch.equal(torch.stack(kernels(**(arguments | views))), expected)


def test_nan_reaches_earlier_tokens_of_its_own_sequence_alone(kernels):
    lengths = (5, 40, 7000, 20_000, 33)
    arguments = GaeCase("nan", lengths).build(torch.float32)
    clean = torch.stack(kernels(**arguments))
    for sequence in range(len(lengths)):
        begin, end = sum(lengths[:sequence]), sum(lengths[: sequence + 1])
        at = begin + (end - begin) * 2 // 3
        rewards = arguments["rewards"].clone()
        rewards[at] = math.nan
        out = torch.stack(kernels(**(arguments | {"rewards": rewards})))
        own = torch.zeros(len(rewards), dtype=torch.bool)
        own[begin : at + 1] = True
        assert out[:, own].isnan().all() and torch.equal(out[:, ~own], clean[:, ~own])


@pytest.mark.parametrize(
    "lengths",
    [(1000,) * 50, (1001,) * 50, (8191,) * 3, (1500, 3001, 8192), (8193,), (131_072,), (40_001, 20_003)],
    ids=lambda lengths: f"{len(lengths)} of {lengths[0]}",
)
def test_bytes_moved_per_token_are_near_the_least_possible(kernels, lengths):
    """8 read and 8 written, and what blocks tell each other of a long sequence."""
    arguments = GaeCase("traffic", lengths, bootstrap=True).build(torch.float32)
    kernels(**arguments)
    tokens, traffic = sum(lengths), kernels.traffic
    assert (traffic.read + traffic.written) / tokens <= 17
    assert traffic.written / tokens < 8.02  # each output once


# What goes wrong on purpose


BARRIER = "__syncthreads();"
WRITTEN_AT_ONCE = re.compile(r"atomicExch\(&(call\.messages\[slot\]\.\w+), (.*)\);")  # what other blocks wait for
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("gae_*.cuh")}


@pytest.fixture(scope="session")
def races(tmp_path_factory):
    """The kernel under ThreadSanitizer, each barrier numbered and left out on demand, and atomic writes from -1 on.

    Every other window is a checkpoint, so that a short sequence has some.
    """
    folder = tmp_path_factory.mktemp("races")
    barriers, writes = itertools.count(1), itertools.count(1)
    for name, source in SOURCES.items():
        numbered = re.sub(re.escape(BARRIER), lambda _: f"if (left_out != {next(barriers)}) {BARRIER}", source)
        numbered = WRITTEN_AT_ONCE.sub(
            lambda m: f"if (left_out != -{next(writes)}) {m[0]} else {m[1]} = {m[2]};", numbered
        )
        numbered = numbered.replace("kCheckpoint = kWarp * kOfLane", "kCheckpoint = 2")
        (folder / name).write_text("extern int left_out;\n" + numbered, encoding="utf-8")
    options = ("-O1", "-g", "-fsanitize=thread", "-I", SIMT)
    return simt_kernel(SIMT / "gae_races.cpp", folder / "races", *options, kernels=folder)


def reported_races(races: Path, left_out: int) -> int:
    """As many as there are, or of a kernel that lacks something the first."""
    first = {"TSAN_OPTIONS": "halt_on_error=1"} if left_out else {}
    ran = subprocess.run([races, str(left_out)], capture_output=True, text=True, env=os.environ | first)
    found = ran.stderr.count("WARNING: ThreadSanitizer: data race")
    assert (ran.returncode == 0) == (found == 0), ran.stderr
    return found


def test_no_thread_reads_what_another_may_still_write(races):
    assert reported_races(races, left_out=0) == 0


@pytest.mark.parametrize("left_out", range(1, 8))
def test_a_missing_barrier_is_found(races, left_out):
    assert reported_races(races, left_out) > 0


@pytest.mark.parametrize("write", range(1, 4))
def test_a_write_for_other_blocks_that_is_not_atomic_is_found(races, write):
    assert reported_races(races, -write) > 0


def test_every_barrier_and_atomic_write_has_been_left_out_once():
    assert sum(source.count(BARRIER) for source in SOURCES.values()) == 7
    assert sum(len(WRITTEN_AT_ONCE.findall(source)) for source in SOURCES.values()) == 3


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 3, 2, 4], "cu_seqlens must never fall"),
        ([1, 4], "cu_seqlens must start at 0"),
        ([0, 3], "cu_seqlens must end at the length of rewards"),
        ([0, 5], "cu_seqlens must run from 0 to the length of rewards"),
        ([0, -1, 4], "cu_seqlens must"),
        ([0, 2**40, 4], "cu_seqlens must"),
    ],
)
def test_a_wrong_cu_seqlens_stops_the_kernel_before_it_reads(kernels, starts, message):
    """An assertion on the device: there the host learns of it at its next call."""
    dead, errors = in_a_fork(lambda: kernels(torch.zeros(4), torch.zeros(4), torch.tensor(starts), gamma=1.0, lam=1.0))
    assert dead and message in errors


@pytest.mark.gpu
def test_on_a_gpu_the_host_is_told_of_a_wrong_cu_seqlens():
    """In a process of its own, since no other kernel can run after it."""
    call = "ops.gae(torch.zeros(4).cuda(), torch.zeros(4).cuda(), torch.tensor([0, 3]).cuda(), gamma=1.0, lam=1.0)"
    code = f"import torch; from fastppo import ops; {call}; torch.cuda.synchronize()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0 and "cu_seqlens must end at the length of rewards" in found.stderr


def in_a_fork(call: Callable[[], object]) -> tuple[bool, str]:
    """Whether a call killed its process, and what it wrote to stderr."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(write, 2)
        faulthandler.disable()
        call()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        errors = pipe.read()
    return os.waitpid(child, 0)[1] != 0, errors


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    return simt_kernel(SIMT / "mistakes.cpp", tmp_path_factory.mktemp("mistakes") / "mistakes")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("bounds", "accesses memory out of bounds"),
        ("alignment", "accesses memory that is not aligned"),
        ("shuffle", "waits for threads that do not come"),
        ("barrier", "waits for threads that do not come"),
        ("block", "waits for a block that does not come"),
        ("none", ""),
    ],
)
def test_the_simulation_stops_at_a_planted_mistake(mistakes, mistake, message):
    ran = subprocess.run([mistakes, mistake], capture_output=True, text=True)
    assert (ran.returncode == 0) == (mistake == "none") and message in ran.stderr
