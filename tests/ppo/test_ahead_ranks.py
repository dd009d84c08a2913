"""Runs with `ppo.steps_ahead` 1 in processes of their own: on two ranks, with a roll-back, and with an error on one."""

from __future__ import annotations

import json
import shutil

import pytest
import whole_runs
from ahead_runs import settings

pytestmark = pytest.mark.slow

# From step 3 on distinct-2 is 0.1, until the run has rolled back.
ILL = """
from fastppo import train
from fastppo.monitor import health

watched, figures = train.watch, health.figures

def watch(experience, updates, kept, config, tokenizer):
    ill = kept.steps + 1 >= 4 and kept.roll_backs < 1
    health.figures = lambda e, **k: figures(e, **k) | ({"distinct_2": 0.1} if ill else {})
    return watched(experience, updates, kept, config, tokenizer)

train.watch = watch
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("ahead"))


def test_a_run_on_two_ranks_that_is_stopped_anywhere_resumes_bit_for_bit(folder, forks):
    ranks, straight, stopped = 2, folder / "straight", folder / "stopped"
    forks.run(settings(folder, straight), ranks)
    argv, newest = settings(folder, stopped, resume="auto"), []
    for place in (whole_runs.STOP_IN_LEARNING.format(n=3), whole_runs.STOP_AT.format(kind="check_alone", n=9)):
        forks.run(argv, ranks, place)
        newest.append(whole_runs.checkpoints(stopped)[-1])
    assert newest[0] == "step-00000001-update-0001" and newest[1] < "step-00000004", newest
    forks.run(argv, ranks)
    whole_runs.assert_same_run(straight, stopped)


def test_a_roll_back_drops_what_was_ahead_and_goes_on_from_what_the_checkpoint_has(folder, forks):
    """It comes out as one that resumes from that checkpoint, with the same random numbers of functions."""
    output, again = folder / "rolled", folder / "rolled-again"
    rules = json.dumps([{"figure": "distinct_2", "level": 0.6, "action": "roll_back"}])
    fixed = {"health__alarms": rules, "checkpoint__keep_last": 9, "eval__prompts": 0, "eval__every": 0, "steps": 7}
    run = forks.start(settings(folder, output, **fixed), 1, ILL)
    assert forks.wait(run) == [0], run.text()
    assert "the run rolls back to" in run.text() and "Traceback" not in run.text()
    shutil.copytree(output, again)
    for path in (again / "checkpoints").glob("step-*"):
        if path.name > "step-00000003":
            shutil.rmtree(path)
    forks.run(settings(folder, again, **fixed, resume="auto"), 1)
    assert whole_runs.records(output) == whole_runs.records(again)
    assert whole_runs.same(whole_runs.state(output), whole_runs.state(again))


def test_an_error_on_one_rank_ends_both_with_the_reason(folder, forks):
    source = folder / "one_rank.py"
    source.write_text(
        "import os\n\n\ndef scores(prompts, responses):\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('not here')\n    return [0.0] * len(responses)\n"
    )
    argv = settings(folder, folder / "one", rewards=json.dumps([{"function": f"{source}:scores"}]), eval__prompts=0)
    run = forks.start([*argv, "--eval.every", "0"], 2)
    assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        assert "one_rank.py:scores raised ValueError: not here (one_rank.py:6)" in log.read_text()
        assert "Traceback" not in log.read_text()
