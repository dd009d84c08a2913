"""The benches are run by hand: here is only seen that what they import is still there."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_bench_imports_is_there(path, monkeypatch):
    if path.stem == "trl_ppo":
        pytest.importorskip("trl", reason="TRL, which it measures, has an environment of its own")
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])  # some import others
    spec = spec_from_file_location(f"bench_{path.stem}", path)
    spec.loader.exec_module(module_from_spec(spec))
