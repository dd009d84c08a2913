"""Settings of every test: no network, few threads, property tests that repeat."""

import gc
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

# Before torch is imported. Workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from forks import Forks
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU then. It is read when triton is first imported; nothing else here runs any.
    os.environ["TRITON_INTERPRET"] = "1"
# Tests import benches, too. At the end: some have the names of modules here.
sys.path.append(str(Path(__file__).parent.parent / "bench"))
# Every test means the CPU but those of the kernels, which name the GPU, and of test_on_gpu.py, which unsets this.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

settings.register_profile("fastppo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastppo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, default=1, metavar="N", help="run about every N-th case of each test")


def share_of(names: Sequence[str], every: int) -> list[str]:
    """Of each test its first case, and of its others about one in `every`: the same ones on each machine.

    Names are pytest's, with a case in brackets. They are chosen by their checksum: every N-th one of a table could have
    the same value of a setting.
    """
    firsts = {*{name.partition("[")[0]: name for name in reversed(names)}.values()}
    return [name for name in names if name in firsts or zlib.crc32(name.encode()) % every == 0]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("share") > 1:
        config.pluginmanager.register(ShareOfCases(config.getoption("share")))


class ShareOfCases:
    def __init__(self, every: int):
        self._every = every

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = set(share_of([item.nodeid for item in items], self._every))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped without one, and what forks whole runs is slow: no test has to say so itself."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "forks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


_modules = 0  # that were loaded when garbage was last looked for


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """DeepSpeed collects garbage whenever it makes an engine. What libraries made as they were loaded is looked through
    once, and not each time: this was a third of the time of tests with engines."""
    global _modules
    yield
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts runs in processes of their own. One for all tests: it takes seconds to import everything."""
    with Forks(tmp_path_factory.mktemp("logs")) as forks:
        yield forks


@pytest.fixture
def triton_on_cpu():
    """CPU tensors take the Triton kernels, under the interpreter, through the same door as everything else."""
    from interpreted import replace_the_language_once_a_launch

    from fastppo.ops import registration
    from fastppo.ops.layers import registration as layers

    replace_the_language_once_a_launch()
    with torch.library._scoped_library("fastppo", "IMPL") as overriding:
        for op in registration.TRITON:
            for name in registration.overloads(op):
                overriding.impl(name, registration.launcher(op), "CPU", allow_override=True)
        for op in layers.OPS:
            overriding.impl(op, layers.launcher(op), "CPU", allow_override=True)
        yield


COMPILED = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's tests run Triton compiled")


@pytest.fixture(params=["C++", pytest.param("Triton", marks=COMPILED)])
def backend(request):
    """What runs the ops on CPU tensors: their own kernels, or Triton's under the interpreter."""
    if request.param == "Triton":
        request.getfixturevalue("triton_on_cpu")
    return str(request.param)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def level(request):
    """Each SIMD level of the C++ kernels that the build and this machine have, in use during the test."""
    from fastppo import _C

    before = _C.built()["simd_used"]
    try:
        _C.set_simd(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield request.param
    _C.set_simd(before)
