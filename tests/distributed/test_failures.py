"""Four ranks of which one is slow, has a full disk or another clock, is killed or is stopped: what each rank says."""

import json
import os
import re
import signal

import pytest
import whole_runs

REWARD = """
def letters(prompts, responses, **columns):
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""

# What takes 45 and 60 s otherwise.
SOON = """
import os, resource, time
from fastppo import train
from fastppo.checkpoint import save
from fastppo.distributed import heartbeat, stop

heartbeat.SILENCE, heartbeat.SLOW, stop.KILLED = 8.0, 1.5, 2.0
rank, calls = os.environ["RANK"], {"check_alone": 0, "save": 0, "updates": 0}

def count(name):
    calls[name] += 1
    return calls[name]
"""
# Rank 1 cannot write its part of the second checkpoint, rank 2 is a day ahead and is killed in the fourth step, and
# rank 3 takes long to sample.
TROUBLE = (
    SOON
    + """
import signal
heartbeat.SILENCE = 45.0  # nobody is stopped, and a busy machine may keep a rank from its heartbeat for some seconds
check_alone, write, run_updates, wall = stop.check_alone, save.Checkpoints.save, train.run_updates, time.time

def slow():
    if rank == "3" and count("check_alone") == 1:
        time.sleep(4.5)
    check_alone()

def full(self, run):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == "1" and count("save") == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    error = write(self, run)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return error

def killed(*arguments, **options):
    if rank == "2" and count("updates") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_updates(*arguments, **options)

stop.check_alone, save.Checkpoints.save, train.run_updates = slow, full, killed
if rank == "2":
    time.time = lambda: wall() + 86_400
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    (folder / "letters.py").write_text(REWARD)
    return folder


def settings(folder, output, **changes):
    reward = json.dumps([{"function": f"{folder}/letters.py:letters"}])
    argv = whole_runs.settings(folder, output, rewards=reward, optim__dtype="fp32", eval__prompts=0, **changes)
    every = argv.index("--eval.every")
    return argv[:every] + argv[every + 2 :]


def test_slow_full_and_killed_ranks_are_told_apart_and_the_run_goes_on_with_two(folder, forks):
    straight, output = folder / "straight", folder / "trouble"
    forks.run(settings(folder, straight))
    run = forks.start(settings(folder, output, checkpoint__keep_last=9), 4, TROUBLE)
    assert forks.wait(run) == [1, 1, -signal.SIGKILL, 1], run.text()
    said = [log.read_text() for log in run.logs]
    assert re.search(r"waiting \d+ s for rank 3, which is in sampling for \d+ s\n", said[0]), run.text()
    assert "step-00000002 could not be written (" in said[0] and "File too large" in said[0]
    assert f"The run continues. The newest checkpoint: {output}/checkpoints/step-00000001" in said[0]
    for rank in (0, 1, 3):
        assert re.search(
            r"another rank has ended: rank 2 has sent no heartbeat for \d+ s, when it was in [\w ]+ for"
            r" \d+ s: it was killed or stopped .* The run goes on with --resume auto, on as many ranks as before or on"
            r" fewer: 2 divide the batch \(--num_accelerators 2\)",
            said[rank],
        ), run.text()
        assert "Traceback" not in said[rank] and (rank == 0 or "waiting" not in said[rank])
    assert whole_runs.checkpoints(output) == ["step-00000001", "step-00000003"]

    resumed = forks.start(settings(folder, output, resume="auto"), 2)
    assert forks.wait(resumed) == [0, 0], resumed.text()
    assert "step-00000003 was written by 4 rank(s), and this run has 2" in resumed.text()
    pairs = list(zip(whole_runs.records(straight), whole_runs.records(output), strict=True))
    assert [a["step"] for a, _ in pairs] == [1, 2, 3, 4]
    for one, other in pairs:
        names = one.keys() - {"imbalance"} - {name for name, value in one.items() if value is None}
        assert {n: other[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "stopped", "words"),
    [
        (4, 2, r"rank 2 has sent no heartbeat for \d+ s, when it was in .*: it was killed or stopped \(SIGSTOP\)"),
        (2, 0, r"rank 0, which holds the store of the run, has not answered for \d+ s: it was killed or stopped"),
    ],
)
def test_a_rank_that_is_stopped_ends_the_others_with_the_reason(folder, forks, ranks, stopped, words):
    output = folder / f"stopped-{ranks}"
    run = forks.start(settings(folder, output, steps=10_000, checkpoint__every=0), ranks, SOON)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and whole_runs.records(output), run)
    os.kill(run.ranks[stopped], signal.SIGSTOP)
    others = [log for rank, log in enumerate(run.logs) if rank != stopped]
    whole_runs.wait_for(lambda: all("This rank ends too" in log.read_text() for log in others), run)
    os.kill(run.ranks[stopped], signal.SIGKILL)
    codes = forks.wait(run)
    assert codes == [-signal.SIGKILL if rank == stopped else 1 for rank in range(ranks)], run.text()
    for log in others:  # rank 0 may have named the rank as one to wait for, before it was silent for long enough
        assert re.search(words, log.read_text()) and "Traceback" not in log.read_text(), run.text()
        assert "--resume auto" in log.read_text()
