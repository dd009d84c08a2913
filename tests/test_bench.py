"""The benches are run by hand: here is seen that what they import is there, and what one counts without a machine."""

import json
import re
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


def loaded(name):
    spec = spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    bench = sys.modules[spec.name] = module_from_spec(spec)  # a dataclass looks for its module there
    spec.loader.exec_module(bench)
    return bench


@pytest.mark.slow
def test_what_benches_import_is_there():
    """In a process of its own, as some set the environment."""
    run = subprocess.run([sys.executable, "-c", LOAD_ALL, str(BENCH)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_layer_of_llama_launches_few_kernels():
    """At most 16 and 30 are the aim; each copy and each sum of gradients that a change adds would be one more."""
    bench = loaded("layer_kernels")
    own = [counted.total for counted in bench.kernels_of_a_layer(fused=False)]
    fused = [counted.total for counted in bench.kernels_of_a_layer(fused=True)]
    assert own == [38, 73] and fused[0] <= 13 and fused[1] <= 27


def test_numbers_of_held_out_prompts_are_in_no_other_prompt(tmp_path):
    bench = loaded("arithmetic")
    data = bench.write_data(tmp_path)
    shown, trained, heldout = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (data.demonstrations, data.training, data.heldout)
    )
    assert [len(rows) for rows in (shown, trained, heldout)] == [192, 4096, 256]
    assert not numbers(heldout) & numbers(shown + trained)
    for row in shown + trained + heldout:
        four = numbers([row])
        assert len(four) == 4 and int(row["answer"]) == max(four) and int(row["response"]) in four
    assert 0.2 < sum(row["response"] == row["answer"] for row in shown) / len(shown) < 0.3  # nothing is given away


def numbers(rows):
    return {int(x) for row in rows for x in re.findall("[0-9]+", row["prompt"])}


def test_an_answer_is_right_or_has_only_the_format():
    bench = loaded("arithmetic")
    responses = ["67", "45", " 67", "6789", "", "max"]
    assert bench.right(responses, ["67"] * 6) == [True, False, False, False, False, False]
    assert bench.number(responses) == [True, True, False, False, False, False]


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
