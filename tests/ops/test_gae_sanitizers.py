"""GAE on the CPU under the address and the undefined-behaviour sanitizer, fed with thousands of bad inputs."""

import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from native import ROOT, gxx
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.slow

SETUP = runpy.run_path(str(ROOT / "setup.py"))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """fastppo._C with the op alone."""
    folder = tmp_path_factory.mktemp("sanitizers")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    define = ("-D{}={}".format(*SETUP["TARGET"]), "-DTORCH_EXTENSION_NAME=_C")
    common = ("-fPIC", "-fvisibility=hidden", *define, *includes, "-c")
    gxx(*common, "-O1", "-g1", *SANITIZERS, ROOT / "csrc/gae.cpp", "-o", folder / "gae.o")
    gxx(*common, "-O0", ROOT / "csrc/module.cpp", "-o", folder / "module.o")  # takes no tensors
    libraries = Path(torch.__file__).parent / "lib"
    link = ("-shared", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10")
    out = folder / "_C.so"
    gxx(*SANITIZERS, folder / "gae.o", folder / "module.o", *link, "-o", out)
    return out


def test_thousands_of_bad_inputs_are_errors_and_good_ones_right(library):
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # libstdc++: so that exceptions are intercepted
    ]
    environment = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, ROOT / "tests/fuzz_gae.py", library, "4000", "1"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    taken, refused = map(int, re.findall(r"\d+", ran.stdout))
    assert taken > 1000 and refused > 2000 and taken + refused == 4000
