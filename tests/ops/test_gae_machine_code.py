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
THREADS = 256
DTYPES = {"f": "float", "t": "bf16"}  # as C++ mangles float and uint16_t
MASKS = {"0": "no mask", "1": "mask"}
# Of a multiprocessor; registers are handed out 8 a thread at a time, each block also takes 1 KiB of shared memory.
REGISTERS, WARPS, SHARED_BYTES = 65_536, 64, {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    code: str  # SASS

    def warps_at_once(self, arch: str) -> int:
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        by_memory = SHARED_BYTES[arch] // (self.shared_bytes + 1024)
        return min(by_registers * THREADS // 32, by_memory * THREADS // 32, WARPS)

    def loads_on_their_way(self) -> int:
        """16-byte loads before the first instruction that needs what one of them loads."""
        loaded: set[int] = set()
        loads = 0
        for operation, operands in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);", self.code):
            registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
            stores = operation.startswith(("ST", "RED", "ATOM"))
            if loaded & set(registers if stores else registers[1:]):
                return loads
            if re.match(r"LDG\.E[.\w]*\.128", operation):
                loaded |= set(range(registers[0], registers[0] + 4))
                loads += 1
        return loads

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
    """The kernel by architecture, dtype and whether there is a mask."""
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
            dtype, mask = re.search(r"gae_windowsI([ft])Lb([01])E", name).groups()
            entry = report[report.index(f"'{name}' for '{arch}'") :]
            stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+)", entry).groups()
            used = re.search(r"Used (\d+) registers.*", entry)
            shared = re.search(r"(\d+) bytes smem", used[0])
            sizes = (int(used[1]), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
            made[arch, DTYPES[dtype], MASKS[mask]] = Kernel(*sizes, body)
    return made


def test_the_kernel_is_there_for_every_architecture(kernels):
    assert set(kernels) == {
        (arch, dtype, mask) for arch in ARCHS for dtype in DTYPES.values() for mask in MASKS.values()
    }


def test_later_architectures_get_ptx(compiled):
    listing = subprocess.run([tool("cuobjdump"), "-lptx", compiled[0]], capture_output=True, text=True, check=True)
    assert re.search(rf"{ARCHS[-1]}\.ptx", listing.stdout)


def test_nothing_spills_or_lives_in_local_memory(kernels):
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0, name
        assert kernel.count("LDL") == kernel.count("STL") == 0, name


def test_registers_and_shared_memory_leave_half_of_the_warps_or_more(kernels):
    for name, kernel in kernels.items():
        assert kernel.registers <= 64, name
        assert kernel.warps_at_once(name[0]) >= WARPS // 2, name


def test_arrays_are_read_and_written_16_bytes_at_a_time(kernels):
    """Rewards, values and mask; advantages and returns. Narrow accesses are there for the ends of a run alone."""
    for (arch, dtype, mask), kernel in kernels.items():
        reads = (8 if dtype == "float" else 4) + (mask == "mask")
        assert kernel.count(r"LDG\.E[.\w]*\.128") == reads, (arch, dtype, mask)
        assert kernel.count(r"STG\.E[.\w]*\.128") == 8, (arch, dtype, mask)


def test_all_reads_of_a_thread_are_on_their_way_before_it_needs_the_first(kernels):
    for (arch, dtype, mask), kernel in kernels.items():
        assert kernel.loads_on_their_way() == (8 if dtype == "float" else 4) + (mask == "mask"), (arch, dtype, mask)
