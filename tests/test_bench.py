"""The benches are run by hand: here is seen that what they import is there, and what one counts without a machine."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
# trl_ppo measures TRL, which has an environment of its own.
LOAD_ALL = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

sys.path.append(sys.argv[1])  # some import others
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    if path.stem != "trl_ppo":
        spec = spec_from_file_location(f"bench_{path.stem}", path)
        spec.loader.exec_module(module_from_spec(spec))
"""


@pytest.mark.slow
def test_what_benches_import_is_there():
    """In a process of its own, as some set the environment."""
    run = subprocess.run([sys.executable, "-c", LOAD_ALL, str(BENCH)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_layer_of_llama_launches_few_kernels():
    """At most 16 and 30 are the aim; each copy and each sum of gradients that a change adds would be one more."""
    spec = spec_from_file_location("bench_layer_kernels", BENCH / "layer_kernels.py")
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    own = [counted.total for counted in bench.kernels_of_a_layer(fused=False)]
    fused = [counted.total for counted in bench.kernels_of_a_layer(fused=True)]
    assert own == [38, 73] and fused[0] <= 13 and fused[1] <= 27


@pytest.mark.slow
def test_a_step_is_modelled_from_its_kernels():
    """In a process of its own, as it changes what attention is computed with."""
    run = subprocess.run([sys.executable, BENCH / "modelled_step.py", "tiny"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    step = json.loads(run.stdout.splitlines()[-1])["tiny"]
    assert set(step["fused"]) == set(step["moves"]) == {"sampling", "feedback", "experience", "learning"}
    for phase, fused in step["fused"].items():
        before = step["before"][phase]
        assert 0 < fused["roofline"] < fused["modelled"] < before["modelled"], phase
        assert 0 < fused["kernels"] < before["kernels"], phase
    for name, modelled in step["step"].items():
        phases = sum(phase["modelled"] for phase in step[name].values())
        moves = step["moves_before" if name == "before" else "moves"]
        assert modelled == pytest.approx(phases + sum(moves.values()))
