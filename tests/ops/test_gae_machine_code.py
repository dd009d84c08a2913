"""What nvcc makes of the CUDA sources: nothing spills, memory is accessed 16 bytes at a time. Needs no GPU."""

import re
import runpy
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from native import ROOT
from torch.utils.cpp_extension import CUDA_HOME, include_paths

pytestmark = pytest.mark.slow

SETUP = runpy.run_path(str(ROOT / "setup.py"))
ARCHS = [f"sm_{arch}" for arch in SETUP["ARCHS"]]
KERNELS = {"gae_warps": 128, "gae_blocks": 256, "gae_summarize": 256, "gae_carry": 128, "gae_chunks": 256}
DTYPES = {"f": "float", "t": "bf16"}  # as C++ mangles float and uint16_t
# Of a multiprocessor; registers are handed out 8 a thread at a time, each block also takes 1 KiB of shared memory.
REGISTERS, WARPS, SHARED_BYTES = 65_536, 64, {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    code: str  # SASS

    def warps_at_once(self, arch: str, threads: int) -> int:
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_memory = SHARED_BYTES[arch] // (self.shared_bytes + 1024)
        return min(by_registers * threads // 32, by_memory * threads // 32, WARPS)

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}[.\s]", self.code))


def tool(name: str) -> str:
    places = [f"{CUDA_HOME}/bin"] * bool(CUDA_HOME) + [str(Path(triton.__file__).parent / "backends/nvidia/bin")]
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=place) for place in places)), None)
    if found is None:
        pytest.skip(f"{name} was not found")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The object file of gae_cuda.cu with the flags of setup.py, and what ptxas says about it."""
    out = tmp_path_factory.mktemp("nvcc") / "gae.o"
    define = "-D{}={}".format(*SETUP["TARGET"])
    paths = [f"-I{path}" for path in include_paths()]
    command = [tool("nvcc"), *SETUP["NVCC"], define, *paths, "-Xptxas=-v", "-c", ROOT / "csrc/gae_cuda.cu", "-o", out]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return out, ran.stdout + ran.stderr


@pytest.fixture(scope="session")
def kernels(compiled):
    """By architecture, kernel and dtype."""
    path, report = compiled
    made = {}
    for arch in ARCHS:
        command = [tool("cuobjdump"), "-sass", "-arch", arch, path]
        folder = str(Path(tool("nvdisasm")).parent)
        listing = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PATH": f"{folder}:/usr/bin:/bin"}
        ).stdout
        code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing, re.DOTALL))
        for name, body in code.items():
            kernel, dtype = re.search(r"(gae_[a-z]+)I([ft])E", name).groups()
            entry = report[report.index(f"'{name}' for '{arch}'") :]
            stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+)", entry).groups()
            used = re.search(r"Used (\d+) registers.*", entry)
            shared = re.search(r"(\d+) bytes smem", used[0])
            sizes = (int(used[1]), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
            made[arch, kernel, DTYPES[dtype]] = Kernel(*sizes, body)
    return made


Kernels = dict[tuple[str, str, str], Kernel]


def test_every_kernel_is_there_for_every_architecture(kernels):
    assert set(kernels) == {(arch, kernel, dtype) for arch in ARCHS for kernel in KERNELS for dtype in DTYPES.values()}


def test_later_architectures_get_ptx(compiled):
    listing = subprocess.run([tool("cuobjdump"), "-lptx", compiled[0]], capture_output=True, text=True, check=True)
    assert re.search(rf"{ARCHS[-1]}\.ptx", listing.stdout)


def test_nothing_spills_or_lives_in_local_memory(kernels):
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0, name
        assert kernel.count("LDL") == kernel.count("STL") == 0, name


def test_registers_and_shared_memory_leave_half_of_the_warps_or_more(kernels):
    for (arch, name, dtype), kernel in kernels.items():
        assert kernel.registers <= 64, (arch, name, dtype)
        assert kernel.warps_at_once(arch, KERNELS[name]) >= WARPS // 2, (arch, name, dtype)


def test_arrays_are_read_and_written_16_bytes_at_a_time(kernels):
    """Rewards, values and mask; advantages and returns. Narrow accesses are there for the ends of a run alone."""
    for (arch, name, dtype), kernel in kernels.items():
        reads = kernel.count(r"LDG\.E[.\w]*\.128")
        writes = kernel.count(r"STG\.E[.\w]*\.128")
        if name == "gae_carry":
            assert reads >= 1, (arch, name, dtype)
            continue
        assert reads >= 3, (arch, name, dtype)
        assert writes >= (1 if name == "gae_summarize" else 2), (arch, name, dtype)
