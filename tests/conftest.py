"""Settings of every test: no network, few threads, property tests that repeat."""

import os
from collections.abc import Iterator

# Before torch is imported. Workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("fastppo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastppo")


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level of the C++ kernels that the build and this machine have, in use during the test."""
    import torch  # noqa: F401  (before the extension)

    from fastppo import _C

    before = _C.built()["simd_used"]
    try:
        _C.set_simd(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield request.param
    _C.set_simd(before)
