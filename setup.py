"""Builds the extension fastppo._C from csrc/; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

csrc = Path("csrc")
warnings = ["-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own intrinsics
extension = CppExtension(
    name="fastppo._C",
    sources=sorted(map(str, csrc.glob("*.cpp"))),
    depends=sorted(map(str, [*csrc.glob("*.h"), *csrc.glob("*.inc")])),
    # The oldest torch whose stable ABI has parallel_for; the build then serves it and every later one.
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    # Products and sums may fuse: the kernels are judged against fp64. No -march: levels are picked at run time.
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *warnings],
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
