"""Builds the extension fastppo._C from csrc/; everything else is in pyproject.toml.

The CUDA sources take part where torch is a CUDA build and nvcc is found. Otherwise one line says that they do not, and
why: `make cuda` compiles and checks them wherever nvcc is, and installing stays quick where nothing could run them.
"""

import shutil
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

CSRC = Path("csrc")
ARCHS = (80, 90, 100)
# The oldest torch whose stable ABI has parallel_for; the build then serves it and every later one.
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")
# Products and sums may fuse: the kernels are judged against fp64. No -march: levels are picked at run time.
WARNINGS = ["-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own intrinsics
GXX = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *WARNINGS]
NVCC = [
    "-O3",
    "-std=c++20",
    "--extended-lambda",
    "-DUSE_CUDA",  # for the stable ABI's stream
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS),
    f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}",  # PTX, for later ones
]


def cuda_is_left_out_because() -> str:
    """Empty if the CUDA sources can be linked."""
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    if not nvcc:
        return "nvcc was not found"
    return "" if torch.version.cuda else "this torch is built for the CPU (`make cuda` still compiles and checks them)"


def extension() -> CppExtension:
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    headers = sorted(str(path) for kind in ("h", "inc", "cuh") for path in CSRC.glob(f"*.{kind}"))
    common = {"name": "fastppo._C", "depends": headers}
    if reason := cuda_is_left_out_because():
        print(f"fastppo: GAE's CUDA kernels are left out: {reason}")
        return CppExtension(sources=sources, define_macros=[TARGET], extra_compile_args=GXX, **common)
    return CUDAExtension(
        sources=sources + sorted(map(str, CSRC.glob("*.cu"))),
        define_macros=[TARGET],
        # g++ alone: nvcc would take the list apart.
        extra_compile_args={"cxx": [*GXX, "-DFASTPPO_CUDA_ARCHS=" + ",".join(map(str, ARCHS))], "nvcc": NVCC},
        **common,
    )


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
