"""Whole runs that go on with other ranks, ZeRO stages and offload than those that they began with."""

import json

import pytest
import rest_runs
import stage_runs
import whole_runs

REWARD = """
def letters(prompts, responses, **columns):
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""
STOP_WITHIN = """
from fastppo import train
from fastppo.distributed import stop

run_updates, steps = train.run_updates, iter(range(99))

def stopping(*arguments, **options):
    step = next(steps)
    for update in run_updates(*arguments, **options):
        yield update
        if step == 1:
            stop._watch.asked.set()

train.run_updates = stopping
"""
CARRIED = "the state is carried over bit for bit, and from there the result is the same within rounding"


def assert_close(one, other, **tolerance):
    """Metrics of two runs; how even the ranks' work was depends on the ranks."""
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        known = {name for name, value in a.items() if value is not None and name != "imbalance"}
        assert known == {name for name, value in b.items() if value is not None and name != "imbalance"}
        assert {n: b[n] for n in known} == pytest.approx({n: a[n] for n in known}, **tolerance)


def test_a_ppo_run_that_stops_within_a_step_goes_on_with_other_ranks_stage_and_offload(tmp_path, forks):
    """With responses in flight, an average and a critic that begins before the actor."""
    folder = whole_runs.prepare(tmp_path)
    (folder / "letters.py").write_text(REWARD)
    fixed = {
        **{"steps": 3, "optim__dtype": "fp32", "actor__average": 0.5, "critic__warmup_steps": 1},
        **{"rollout__partial_tokens": 4, "ppo__importance": "none"},
        "rewards": json.dumps([{"function": f"{folder}/letters.py:letters"}]),
    }
    straight, moved = folder / "straight", folder / "moved"
    forks.run(whole_runs.settings(folder, straight, **fixed))
    split = fixed | {"zero__stage": 3, "zero__offload": "cpu"}
    forks.run(whole_runs.settings(folder, moved, **split), 2, STOP_WITHIN)
    stopped = whole_runs.checkpoints(moved)[-1]
    assert stopped == "step-00000001-update-0001"
    run = forks.start(whole_runs.settings(folder, moved, **fixed, zero__stage=0, resume="auto"))
    assert forks.wait(run) == [0], run.text()
    for words in (
        f"{stopped} was written by 2 rank(s), and this run has 1: {CARRIED}",
        f"zero.stage was 3 and is 0: {CARRIED}",
        f"zero.offload was cpu and is none: {CARRIED}",
        "the random generators that a reward function may use: those of rank 1 are dropped",
    ):
        assert words in run.text()
    assert_close(whole_runs.records(straight), whole_runs.records(moved), rel=1e-3, abs=1e-4)
    assert any(record.get("in_flight") for record in whole_runs.records(moved))


@pytest.mark.parametrize(
    ("kind", "module", "ranks", "changed"),
    [
        ("dpo", "fastppo.train_dpo", (1, 2), {"zero__stage": 2}),
        ("answers", "fastppo.train_sft", (2, 1), {"zero__stage": 3, "zero__offload": "cpu"}),
        ("pairs", "fastppo.train_reward", (1, 2), {"zero__stage": 3}),
    ],
)
def test_a_run_on_examples_goes_on_with_other_ranks_at_another_stage(tmp_path, forks, kind, module, ranks, changed):
    folder = stage_runs.prepare(tmp_path)
    fixed = {"checkpoint__every": 4, "checkpoint__keep_last": 9, "epochs": 1, "optim__schedule": "constant"}
    argv = stage_runs.settings(folder, kind, **fixed)
    forks.run(argv, ranks[0], module=module)
    before = stage_runs.records(folder / "out")
    chosen = folder / "out/checkpoints/step-00000004"
    argv = stage_runs.settings(folder, kind, **fixed, **changed, resume=chosen)
    run = forks.start(argv, ranks[1], module=module)
    assert forks.wait(run) == [0] * ranks[1], run.text()
    assert f"step-00000004 was written by {ranks[0]} rank(s), and this run has {ranks[1]}: {CARRIED}" in run.text()
    told = "begin anew, seeded from (seed 1, step-00000004, rank)" if ranks[1] > 1 else "are dropped"
    assert f"those of rank 1 {told}" in run.text()
    assert_close(before, stage_runs.records(folder / "out"), rel=1e-3, abs=1e-4)


def test_a_rest_run_goes_on_with_more_ranks_within_a_step(tmp_path, forks):
    folder = whole_runs.prepare(tmp_path)
    (folder / "letters.py").write_text(REWARD)
    fixed = {
        **{"optim__dtype": "fp32", "checkpoint__keep_last": 99},
        "rewards": json.dumps([{"function": f"{folder}/letters.py:letters"}]),
    }
    straight = folder / "straight"
    forks.run(rest_runs.settings(folder, straight, **fixed), module=rest_runs.MODULE)
    chosen = next(name for name in whole_runs.checkpoints(straight) if "-update-" in name)
    split = fixed | {"zero__stage": 2, "resume": straight / "checkpoints" / chosen, "checkpoint__every": 0}
    before = whole_runs.records(straight)
    run = forks.start(rest_runs.settings(folder, straight, **split), 2, module=rest_runs.MODULE)
    assert forks.wait(run) == [0, 0], run.text()
    assert f"{chosen} was written by 1 rank(s), and this run has 2: {CARRIED}" in run.text()
    assert_close(before, whole_runs.records(straight), rel=1e-3, abs=1e-4)


def test_a_run_one_step_ahead_goes_on_with_ranks_that_share_sequences(tmp_path, forks):
    folder = whole_runs.prepare(tmp_path)
    (folder / "letters.py").write_text(REWARD)
    fixed = {
        **{"steps": 3, "optim__dtype": "fp32", "ppo__steps_ahead": 1, "checkpoint__keep_last": 9},
        "rewards": json.dumps([{"function": f"{folder}/letters.py:letters"}]),
    }
    output = folder / "run"
    forks.run(whole_runs.settings(folder, output, **fixed))
    before, chosen = whole_runs.records(output), output / "checkpoints/step-00000001"
    shared = fixed | {"parallel__sequence": 2, "resume": chosen}
    run = forks.start(whole_runs.settings(folder, output, **shared), 2)
    assert forks.wait(run) == [0, 0], run.text()
    assert f"parallel.sequence was 1 and is 2: {CARRIED}" in run.text()
    assert_close(before, whole_runs.records(output), rel=1e-3, abs=1e-4)
