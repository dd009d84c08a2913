"""A ReST run that is cut off in either half of a step and resumed ends where the run ends that never was."""

import json
import os
import random
import signal
import time

import pytest
import rest_runs
import services
import whole_runs

ROLES = {
    "fp32, stage 1": {"optim__dtype": "fp32", "zero__stage": 1},
    "bf16, stage 2": {"optim__dtype": "bf16", "zero__stage": 2},
    "LoRA and an average, bf16, stage 1": {"actor__lora__rank": 4, "actor__average": 0.9, "zero__stage": 1},
    "each prompt's best, fp32, stage 0": {
        **{"optim__dtype": "fp32", "zero__stage": 0},
        **{"improve__keep": "best", "improve__thresholds": "null", "improve__batch_size": 4},
    },
    "bf16, stage 3, offloaded": {"optim__dtype": "bf16", "zero__stage": 3, "zero__offload": "cpu"},
}
NEVER_ENDS = """
import time
from fastppo import rank
rank.stop_world = lambda: time.sleep(600)
"""
PLACES = (("check_alone", 9), ("check_alone", 14), ("check", 14), ("check", 9), ("check", 12), ("check_alone", 17))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("rest"))


def settings(folder, output, roles, **changes):
    mixed = {"mixture__path": folder / "given.jsonl", "mixture__share": 0.25, "mixture__max_tokens": 30}
    (folder / "given.jsonl").write_text("".join(f'{{"prompt": "p{i} ", "response": "r{i}"}}\n' for i in range(6)))
    return rest_runs.settings(folder, output, **mixed, **ROLES[roles], **changes)


@pytest.fixture(scope="module")
def straight(folder, forks):
    """Outputs of runs that nothing happened to, made when first asked for."""
    made = {}

    def output(ranks, roles):
        if (ranks, roles) not in made:
            made[ranks, roles] = folder / f"straight-{len(made)}"
            forks.run(settings(folder, made[ranks, roles], roles), ranks, module=rest_runs.MODULE)
        return made[ranks, roles]

    return output


def assert_same(one, other):
    whole_runs.assert_same_run(one, other)
    assert len(written(one)) == 8 and written(one) == written(other)


def written(output):
    """The content of every part of every Grow."""
    grows = output / "grows"
    return {str(path.relative_to(grows)): path.read_bytes() for path in grows.rglob("*.parquet")}


@pytest.mark.parametrize(
    ("ranks", "roles"),
    [
        (1, "fp32, stage 1"),
        (2, "bf16, stage 2"),
        (1, "LoRA and an average, bf16, stage 1"),
        (2, "each prompt's best, fp32, stage 0"),
        (2, "bf16, stage 3, offloaded"),
    ],
)
def test_a_run_that_stops_anywhere_and_goes_on_equals_the_one_that_did_not(folder, forks, straight, ranks, roles):
    """Stops lie in sampling, in measuring, in an evaluation and in learning."""
    output, stops = folder / f"stopped-{ranks}-{len(roles)}", []
    argv = settings(folder, output, roles, resume="auto", checkpoint__within_step=0, checkpoint__every=0)
    for kind, n in PLACES:
        forks.run(argv, ranks, whole_runs.STOP_AT.format(kind=kind, n=n), module=rest_runs.MODULE)
        if whole_runs.checkpoints(output):
            stops.append(whole_runs.checkpoints(output)[-1])
    argv = settings(folder, output, roles, resume="auto")
    forks.run(argv, ranks, module=rest_runs.MODULE)
    assert any("-grow-" in name for name in stops) and any("-update-" in name for name in stops), stops
    assert_same(straight(ranks, roles), output)


def test_a_run_killed_five_times_at_random_moments_and_resumed_equals_the_one_that_was_not(folder, forks, straight):
    roles, output = "bf16, stage 2", folder / "killed"
    argv, moments = settings(folder, output, roles, resume="auto"), random.Random(3)
    for kill in range(5):
        run = forks.start(argv, 2, NEVER_ENDS, module=rest_runs.MODULE)
        whole_runs.wait_for(lambda kill=kill: progress(output) > 2 * kill, run)
        time.sleep(moments.uniform(0, 0.2))
        for how in (signal.SIGSTOP, signal.SIGKILL):  # stopped, a rank does not see the other go and end by itself
            for pid in run.ranks:
                os.kill(pid, how)
        assert forks.wait(run) == [-9, -9], kill
    forks.run(argv, 2, module=rest_runs.MODULE)
    assert_same(straight(2, roles), output)


def progress(output):
    """How often the run has saved: twice in a Grow, and after every second update; 0 before the first time."""
    names = [name for name in whole_runs.checkpoints(output)] if (output / "checkpoints").is_dir() else []
    newest = max((name for name in names if name.startswith("step-")), default="step-00000000")
    step, _, within = newest.removeprefix("step-").partition("-")
    half, _, done = within.partition("-")
    return 8 * int(step) + (2 * (half == "update") + int(done) // 2 if done else 0)


def test_grows_beyond_the_checkpoint_are_written_again(folder, forks, straight, tmp_path):
    """A run goes back to its first checkpoint: the second Grow that it has written is not taken for its own."""
    output, roles = tmp_path / "back", "fp32, stage 1"
    kept = {"checkpoint__keep_last": 100}
    forks.run(settings(folder, output, roles, **kept), 1, module=rest_runs.MODULE)
    first = output / "checkpoints" / "step-00000000-grow-000002"
    assert first.is_dir()
    forks.run(settings(folder, output, roles, resume=first, **kept), 1, module=rest_runs.MODULE)
    assert_same(straight(1, roles), output)


def test_a_reward_service_that_fails_loses_no_batch(folder, forks, tmp_path):
    """In the first Grow already: what it has is saved, and drawn once only."""
    output, cured = tmp_path / "out", []

    def answer(body):
        return services.lengths(body) if cured or len(asked) <= 6 else (500, b"")

    with services.service(answer) as (url, asked):
        rewards = json.dumps([{"url": url, "retries": 0, "request_size": 4}])
        argv = rest_runs.settings(
            folder, output, rewards=rewards, resume="auto", steps=1, eval__prompts=0, eval__every=0
        )
        run = forks.start(argv, 1, module=rest_runs.MODULE)
        assert forks.wait(run) == [1] and "answered with status 500" in run.text()
        assert whole_runs.checkpoints(output)[-1] == "step-00000000-grow-000003"
        cured.append(True)
        forks.run(argv, 1, module=rest_runs.MODULE)
    assert len(list((output / "grows/step-00000001").iterdir())) == 4
