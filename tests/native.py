"""C++ that tests build for themselves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "tests/simt"


def gxx(*arguments: object) -> None:
    """g++, or a skip where there is none: the extension came in a wheel."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    made = subprocess.run([compiler, "-std=c++20", *map(str, arguments)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def simt_kernel(source: Path, out: Path, *options: object, kernels: Path = ROOT / "csrc") -> Path:
    """Compiles a program of tests/simt with simt.h in place of CUDA, and the fibers without the options."""
    define = ["-DSIMT_RACES"] * ("-fsanitize=thread" in options)
    fibers, program = out.with_suffix(".simt.o"), out.with_suffix(".o")
    gxx("-O2", "-fPIC", *define, "-c", SIMT / "simt.cpp", "-o", fibers)
    words = ["-include", SIMT / "simt.h", "-Wno-unknown-pragmas"]
    gxx("-fPIC", *words, *options, "-I", kernels, "-c", source, "-o", program)
    link = [option for option in options if str(option).startswith("-fsanitize")] + ["-shared"] * (out.suffix == ".so")
    gxx(*link, fibers, program, "-o", out)
    return out
