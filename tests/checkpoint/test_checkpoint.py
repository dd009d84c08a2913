"""A run that is cut off and resumed ends where the run ends that never was; what cannot be resumed is refused."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import whole_runs

from fastppo.checkpoint import atomic_dir
from fastppo.distributed import stop

REPOSITORY = Path(__file__).resolve().parents[2]

SHORT = {"sampling__rows": 4, "sampling__stop_tokens": json.dumps(list(string.ascii_letters))}
ROLES = {
    "separate critic, fp32, stage 1": {"optim__dtype": "fp32", "zero__stage": 1},
    "shared critic, fp32, stage 0": {"critic__kind": "shared", "optim__dtype": "fp32", "zero__stage": 0},
    "separate critic, bf16, stage 2": {"optim__dtype": "bf16", "zero__stage": 2},
    "shared critic, bf16, stage 1": {"critic__kind": "shared", "zero__stage": 1, "ppo__microbatch_tokens": 60},
    "LoRA, bf16, stage 1": {"actor__lora__rank": 4, "critic__lora__rank": 2, "zero__stage": 1},
    "separate critic, bf16, stage 3": {"optim__dtype": "bf16", "zero__stage": 3, "zero__offload": "cpu"},
    "no critic, GRPO and GSPO, bf16, stage 1": {
        **{"ppo__estimator": "grpo", "ppo__loss": "gspo", "sampling__samples_per_prompt": 4, "ppo__kl_in": "loss"},
        **{"ppo__kl_kind": "k3", "zero__stage": 1},
    },
    "VAPO, fp32, stage 1": {
        **{"critic__warmup_steps": 1, "ppo__lam": "adaptive", "ppo__lam_critic": 1, "ppo__lam_alpha": 0.5},
        **{"ppo__nll_coef": 0.1, "ppo__nll_above": 0.5, "optim__dtype": "fp32", "zero__stage": 1},
    },
    # A sampler that is not the trainer; responses of many lengths, of which four rows are filled anew.
    "top_p, token weights, fp32, stage 1": {
        **{"sampling__top_p": 0.7, "ppo__importance": "token", "ppo__importance_high": 1.2, "optim__dtype": "fp32"},
        **{"sampling__temperature": 0.2, "sampling__samples_per_prompt": 4, **SHORT},
    },
    "top_k, icepop, bf16, stage 2": {
        **{"sampling__top_k": 20, "ppo__importance": "icepop", "ppo__importance_low": 0.7, "zero__stage": 2},
        **{"sampling__temperature": 0.2, "ppo__batch_size": 16, "ppo__kl_horizon": 200, **SHORT},
    },
}

NEVER_ENDS = """
import time
from fastppo import rank
rank.stop_world = lambda: time.sleep(600)
"""
PLACES = (("check_alone", 3), ("check", 8), ("check", 6), ("check_alone", 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_runs.prepare(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(folder, forks):
    """Outputs of runs that nothing happened to, made when first asked for."""
    made = {}

    def output(ranks: int, roles: str) -> Path:
        if (ranks, roles) not in made:
            made[ranks, roles] = folder / f"straight-{len(made)}"
            forks.run(whole_runs.settings(folder, made[ranks, roles], **ROLES[roles]), ranks)
        return made[ranks, roles]

    return output


@pytest.mark.parametrize(
    ("ranks", "roles"),
    [
        (1, "separate critic, fp32, stage 1"),
        (2, "shared critic, fp32, stage 0"),
        (2, "separate critic, bf16, stage 2"),
        (1, "LoRA, bf16, stage 1"),
        (2, "shared critic, bf16, stage 1"),
        (2, "separate critic, bf16, stage 3"),
        (1, "top_p, token weights, fp32, stage 1"),
        (2, "top_k, icepop, bf16, stage 2"),
        (2, "no critic, GRPO and GSPO, bf16, stage 1"),
        (1, "VAPO, fp32, stage 1"),
    ],
)
def test_a_run_that_stops_anywhere_and_goes_on_equals_the_one_that_did_not(folder, forks, straight, ranks, roles):
    """Stops lie in sampling, evaluation, experience and learning, several of them inside one step."""
    output = folder / f"stopped-{ranks}-{roles.replace(' ', '')}"
    argv = whole_runs.settings(folder, output, resume="auto", **ROLES[roles])
    stops = []
    for kind, n in PLACES:
        forks.run(argv, ranks, whole_runs.STOP_AT.format(kind=kind, n=n))
        stops.append(whole_runs.checkpoints(output)[-1])
    assert stops[0] == "step-00000000" and any("-update-" in name for name in stops), stops
    forks.run(argv, ranks)
    whole_runs.assert_same_run(straight(ranks, roles), output)


@pytest.mark.parametrize(
    ("ranks", "roles"), [(1, "top_p, token weights, fp32, stage 1"), (2, "top_k, icepop, bf16, stage 2")]
)
def test_a_run_that_lost_its_weights_of_tokens_would_end_elsewhere(folder, forks, straight, ranks, roles):
    """And so would show above."""
    output = folder / f"unweighted-{ranks}"
    changes = {name: value for name, value in ROLES[roles].items() if "importance" not in name}
    forks.run(whole_runs.settings(folder, output, **changes, ppo__importance="none"), ranks)
    pairs = zip(whole_runs.records(output), whole_runs.records(straight(ranks, roles)), strict=True)
    for one, other in ((a, b) for a, b in pairs if "policy_loss" in a):
        assert one["policy_loss"] != pytest.approx(other["policy_loss"], rel=1e-2)
        assert other["ended"] > 0.2 and other["sampler_error"] > 0.1


KILL_IN_SAMPLING = """
import os, signal
from fastppo.distributed import stop

count = iter(range(1, 1_000_000))
stop.check_alone = lambda: os.kill(os.getpid(), signal.SIGKILL) if next(count) == {n} else None
"""


def test_a_run_that_resumes_with_other_rows_ends_the_same(folder, forks, straight):
    """Stopped and killed in sampling, where rows have been filled anew, and stopped in learning; in fp32 no draw is
    rounded away."""
    roles, output = "top_p, token weights, fp32, stage 1", folder / "other-rows"
    places = (("check_alone", 14), 10, ("check", 6), 10, ("check_alone", 12))  # the numbers: in the nth pass, killed
    newest = []
    for rows, place in zip((4, 64, 8, 5, 16), places, strict=True):
        changes = ROLES[roles] | {"sampling__rows": rows, "resume": "auto"}
        argv = whole_runs.settings(folder, output, **changes)
        if isinstance(place, int):
            assert forks.wait(forks.start(argv, 1, KILL_IN_SAMPLING.format(n=place))) == [-signal.SIGKILL]
        else:
            forks.run(argv, 1, whole_runs.STOP_AT.format(kind=place[0], n=place[1]))
        newest.append(whole_runs.checkpoints(output)[-1])
    assert newest[0] == "step-00000000" and len(set(newest)) >= 3, newest
    run = forks.start(whole_runs.settings(folder, output, resume="auto", **ROLES[roles]), 1)
    assert forks.wait(run) == [0], run.text()
    assert "sampling.rows" in run.text()  # it changes the last bits at most, says the log
    whole_runs.assert_same_run(straight(1, roles), output)


def test_a_run_killed_at_random_moments_and_resumed_equals_the_one_that_was_not(folder, forks, straight):
    roles, output = "separate critic, bf16, stage 2", folder / "killed"
    argv = whole_runs.settings(folder, output, resume="auto", **ROLES[roles])
    moments, metrics = random.Random(7), output / "metrics.jsonl"
    for kill in range(3):
        run = forks.start(argv, 2, NEVER_ENDS)
        whole_runs.wait_for(lambda kill=kill: metrics.exists() and metrics.read_bytes().count(b"\n") > 2 * kill, run)
        time.sleep(moments.uniform(0, 0.5))
        for how in (signal.SIGSTOP, signal.SIGKILL):  # stopped, a rank does not see the other go and end by itself
            for pid in run.ranks:
                os.kill(pid, how)
        codes = forks.wait(run)
        assert codes == [-9, -9], (kill, codes)
    forks.run(argv, 2)
    whole_runs.assert_same_run(straight(2, roles), output)


def test_sigterm_to_one_rank_saves_and_ends_all_with_status_0(folder, forks, straight):
    """DeepSpeed's `launch` signals one process and waits for it before it signals the next."""
    roles, output = "shared critic, fp32, stage 0", folder / "terminated"
    argv = whole_runs.settings(folder, output, resume="auto", checkpoint__every=0, **ROLES[roles])
    run = forks.start(argv, 2)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1, run)
    os.kill(run.ranks[1], signal.SIGTERM)
    assert forks.wait(run) == [0, 0], run.text()
    assert len(whole_runs.checkpoints(output)) == 1
    forks.run([*argv, "--checkpoint.every", "1"], 2)
    whole_runs.assert_same_run(straight(2, roles), output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_in_the_folder_of_one_that_runs_is_refused_and_changes_nothing(folder, forks, ranks):
    output = folder / f"one-at-a-time-{ranks}"
    argv = whole_runs.settings(folder, output, checkpoint__every=1, steps=1000)
    run = forks.start(argv, ranks)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 2, run)
    for more in ([], ["--resume", "auto"]):
        second = forks.start([*argv, *more], ranks)
        assert forks.wait(second) == [1] * ranks
        text = second.text()
        assert f"is in use by another run (process {run.ranks[0]} on {socket.gethostname()}" in text
        assert "Traceback" not in text
    os.kill(run.ranks[0], signal.SIGTERM)
    assert forks.wait(run) == [0] * ranks, run.text()
    steps = [record["step"] for record in whole_runs.records(output) if "policy_loss" in record]
    assert steps == list(range(1, len(steps) + 1)) and not output.with_name(f"{output.name}.1").exists()
    assert not (output / "run.lock").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_ends_all_ranks_with_status_0(folder, forks, straight, ranks):
    """The terminal sends SIGINT to all processes, and DeepSpeed's `launch` then SIGTERM to one after the other."""
    roles, output = "shared critic, fp32, stage 0", folder / f"interrupted-{ranks}"
    argv = whole_runs.settings(folder, output, resume="auto", checkpoint__every=0, **ROLES[roles])
    run = forks.start(argv, ranks)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1, run)
    for pid in run.ranks:
        os.kill(pid, signal.SIGINT)
    os.kill(run.ranks[0], signal.SIGTERM)
    assert forks.wait(run) == [0] * ranks, run.text()
    assert "the run saves a checkpoint and ends. Ctrl-C again" in run.text() and "Traceback" not in run.text()
    assert len(whole_runs.checkpoints(output)) == 1
    forks.run([*argv, "--checkpoint.every", "1"], ranks)
    whole_runs.assert_same_run(straight(ranks, roles), output)


SAVES_FOR_EVER = """
import time
from fastppo.checkpoint import atomic_dir
from fastppo.distributed import stop
atomic_dir.begin = lambda folder: time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once(folder, forks):
    output = folder / "interrupted-twice"
    run = forks.start(whole_runs.settings(folder, output, checkpoint__every=0, steps=1000), 1, SAVES_FOR_EVER)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1, run)
    os.kill(run.ranks[0], signal.SIGINT)
    whole_runs.wait_for(lambda: "; saving" in run.text(), run)
    time.sleep(2 * stop.SAME_CTRL_C)
    os.kill(run.ranks[0], signal.SIGINT)
    assert forks.wait(run, seconds=20) == [128 + signal.SIGINT], run.text()
    assert "interrupted again, so nothing more is saved" in run.text() and "Traceback" not in run.text()


SLOW_EXPORT = """
import time
from fastppo.checkpoint import export
real = export.write_model
def write_model(*args, **kwargs):
    print("exporting", flush=True)
    time.sleep(2)
    real(*args, **kwargs)
export.write_model = write_model
"""


def test_a_run_that_is_told_to_stop_while_it_writes_its_model_writes_it_to_the_end(folder, forks):
    output = folder / "told-late"
    run = forks.start(whole_runs.settings(folder, output, steps=1, eval__prompts=0, eval__every=0), 2, SLOW_EXPORT)
    whole_runs.wait_for(lambda: all(log.exists() for log in run.logs) and "exporting" in run.text(), run)
    for pid in run.ranks:
        os.kill(pid, signal.SIGINT)
    assert forks.wait(run) == [0, 0], run.text()
    assert (output / "actor/model.safetensors").is_file() and "Traceback" not in run.text()


def test_a_model_that_nothing_takes_ends_all_ranks_with_where_the_run_can_go_on(folder, forks):
    output, before = (
        folder / "nowhere",
        "from fastppo.checkpoint import export\nexport.write_model = lambda *a, **k: 1 / 0\n",
    )
    before += "export._free_name = lambda *a: None"
    changes = {"steps": 1, "eval__prompts": 0, "eval__every": 0, "checkpoint__every": 0}
    run = forks.start(whole_runs.settings(folder, output, **changes), 2, before)
    assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        words = "could not be written (ZeroDivisionError: division by zero); no other place could be written either."
        assert words in log.read_text() and "--resume auto" in log.read_text() and "Traceback" not in log.read_text()
    assert whole_runs.checkpoints(output) == ["step-00000001"]


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(folder, forks):
    before = "import time\nfrom fastppo.online import run\n"
    before += "run.check_models = lambda *_: (print('here', flush=True), time.sleep(600))"
    run = forks.start(whole_runs.settings(folder, folder / "early"), 1, before)
    whole_runs.wait_for(lambda: run.logs[0].exists() and "here" in run.text(), run)
    os.kill(run.ranks[0], signal.SIGINT)
    assert forks.wait(run, seconds=20) == [128 + signal.SIGINT], run.text()
    assert "interrupted before there was anything to save" in run.text() and "Traceback" not in run.text()


def test_ctrl_c_under_deepspeeds_launcher_leaves_a_whole_checkpoint(folder, forks):
    output = folder / "launched"
    argv = whole_runs.settings(folder, output, checkpoint__every=0, steps=1000)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    deepspeed = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", "2", "--master_port", port]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    launched = subprocess.Popen(
        [*deepspeed, REPOSITORY / "fastppo/train.py", *argv],
        env={k: v for k, v in os.environ.items() if k not in names},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group, as a terminal's foreground is one
    )
    end = time.monotonic() + 120
    while not ((output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1):
        assert time.monotonic() < end and launched.poll() is None, launched.communicate()[0]
        time.sleep(0.05)
    os.killpg(launched.pid, signal.SIGINT)
    said = launched.communicate(timeout=60)[0]  # until the last of them has closed it
    (name,) = whole_runs.checkpoints(output)
    assert (
        "the run saves a checkpoint and ends" in said and atomic_dir.problem(output / "checkpoints" / name) is None
    ), said


def test_ranks_whose_launcher_has_vanished_save_and_end(folder, forks):
    output = folder / "orphaned"
    run = forks.start(whole_runs.settings(folder, output, checkpoint__every=0, steps=1000), 2)
    whole_runs.wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1, run)
    os.kill(run.launcher, signal.SIGKILL)
    assert forks.wait(run) == [0, 0], run.text()
    assert len(whole_runs.checkpoints(output)) == 1


# Checkpoints of one finished run, changed in each test


@pytest.fixture
def finished(straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight(1, "separate critic, fp32, stage 1"), output)
    return output


def resumed(forks, folder, output, ranks=1, code=1, **changes) -> str:
    """What the resumed run says."""
    changes = {"resume": "auto"} | ROLES["separate critic, fp32, stage 1"] | changes
    run = forks.start(whole_runs.settings(folder, output, **changes), ranks)
    assert forks.wait(run) == [code] * ranks, run.text()
    assert "Traceback" not in run.text()
    return run.text()


def test_a_finished_run_that_is_resumed_leaves_the_same_again(forks, folder, finished):
    before = whole_runs.records(finished), (finished / "samples.jsonl").read_text()
    shutil.rmtree(finished / "actor")
    resumed(forks, folder, finished, code=0)
    assert (whole_runs.records(finished), (finished / "samples.jsonl").read_text()) == before
    assert (finished / "actor/model.safetensors").is_file()


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("actor/mp_rank_00_model_states.pt", cut, "bytes instead of"),
        ("critic/zero_pp_rank_0_mp_rank_00_optim_states.pt", flip, "is damaged"),
        ("manifest.json", cut, "manifest.json is damaged"),
        ("rank-00000.pt", Path.unlink, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(
    forks, folder, straight, finished, file, damage, words
):
    damage(finished / "checkpoints/step-00000004" / file)
    said = resumed(forks, folder, finished, code=0)
    assert words in said and "continuing from" in said and "step-00000003" in said
    whole_runs.assert_same_run(straight(1, "separate critic, fp32, stage 1"), finished)
    assert "aside-step-00000004.1" in whole_runs.checkpoints(finished)


def test_what_cannot_be_resumed_is_refused_and_left_as_it_was(forks, folder, finished):
    before = whole_runs.records(finished), whole_runs.checkpoints(finished)
    chosen = finished / "checkpoints/step-00000003"
    for changes, words in [
        ({"ppo__lam": 0.9}, "ppo.lam is 0.9, but"),
        ({"steps": 6}, "steps is 6"),
        ({"seed": 2}, "--seed 1"),
        ({"resume": finished / "checkpoints/step-7"}, f"this folder does not exist. Give auto, or one of {chosen}"),
        ({"resume": folder}, "which is not a checkpoint of output"),
    ]:
        assert words in resumed(forks, folder, finished, **changes)
    for path in (finished / "checkpoints").glob("step-*"):
        cut(path / "manifest.json")
    said = resumed(forks, folder, finished)
    assert "no checkpoint is complete" in said and "--resume null" in said
    assert (whole_runs.records(finished), whole_runs.checkpoints(finished)) == before


def test_other_prompts_are_refused(forks, folder, finished, tmp_path):
    other = tmp_path / "prompts.jsonl"
    other.write_text((folder / "prompts.jsonl").read_text().replace("prompt 7", "another"))
    about = finished / "checkpoints/step-00000004/about.json"
    about.write_text(about.read_text().replace(str(folder / "prompts.jsonl"), str(other)))
    manifest = about.with_name("manifest.json")
    files = json.loads(manifest.read_text())
    for file in files["files"]:
        if file["name"] == "about.json":
            file |= {"bytes": about.stat().st_size, "sha256": hashlib.sha256(about.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(files))
    assert "was made with other data" in resumed(forks, folder, finished, data__path=other)


def test_settings_that_change_nothing_may_change(forks, folder, straight, finished):
    changes = {"track__tensorboard": "true", "checkpoint__keep_last": 1, "eval__show": 0, "health__window": 5}
    chosen = finished / "checkpoints/step-00000003"
    resumed(forks, folder, finished, code=0, resume=chosen, **changes)
    whole_runs.assert_same_run(straight(1, "separate critic, fp32, stage 1"), finished)
    assert [name for name in whole_runs.checkpoints(finished) if name.startswith("step")] == ["step-00000004"]


def test_auto_begins_where_there_is_nothing_to_resume_and_says_so(forks, folder, tmp_path):
    output = tmp_path / "new"
    said = resumed(forks, folder, output, code=0, steps=1, checkpoint__every=0)
    assert "has no checkpoint: the run starts at step 0" in said
    assert not (output / "checkpoints").exists()


def test_the_newest_and_the_best_stay(forks, folder, tmp_path):
    output = tmp_path / "kept"
    changes = {"steps": 5, "eval__every": 1, "checkpoint__keep_last": 1, "checkpoint__keep_best": 1}
    forks.run(whole_runs.settings(folder, output, **ROLES["separate critic, fp32, stage 1"], **changes))
    scores = {r["step"]: r["eval/score"] for r in whole_runs.records(output) if "eval/score" in r and r["step"]}
    best = max(scores, key=lambda step: (scores[step], step))
    assert whole_runs.checkpoints(output) == sorted({f"step-{best:08d}", "step-00000005"})


# A disk that does not take what is written. As root no folder is read-only, so writes fail where they are made.

FAILING = """
import errno, os
from fastppo.checkpoint import atomic_dir
from fastppo.distributed import stop

class Full:
    def __init__(self, raw, left): self._raw, self._left = raw, left
    def write(self, content):
        self._left -= memoryview(content).nbytes
        if self._left < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._raw.write(content)
    def __getattr__(self, name): return getattr(self._raw, name)

hashed, begin, saves = atomic_dir._Hashed, atomic_dir.begin, []
def full(raw):
    on = len(saves) == {save} and "{file}" in raw.name and os.environ["RANK"] == "{rank}"
    return hashed(Full(raw, {left}) if on else raw)
def beginning(folder):
    saves.append(folder)
    if "{file}" == "folder" and len(saves) == {save}: raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return begin(folder)
atomic_dir._Hashed, atomic_dir.begin = full, beginning
"""


@pytest.mark.parametrize(
    ("file", "left", "words"),
    [
        ("optim_states", 1000, "No space left on device"),
        ("manifest", 10, "No space left on device"),
        ("folder", 0, "Read-only file system"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(forks, folder, straight, tmp_path, file, left, words):
    roles, output = "separate critic, bf16, stage 2", tmp_path / "full"
    argv = whole_runs.settings(folder, output, **ROLES[roles])
    run = forks.start(argv, 2, FAILING.format(save=3, file=file, rank=0, left=left))
    assert forks.wait(run) == [0, 0], run.text()
    assert words in run.text() and f"The run continues. The newest checkpoint: {output}" in run.text()
    whole_runs.assert_same_run(straight(2, roles), output)
    assert whole_runs.checkpoints(output) == ["step-00000002", "step-00000004"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_where_so_asked(forks, folder, tmp_path):
    output = tmp_path / "full"
    argv = whole_runs.settings(folder, output, checkpoint__on_error="stop", **ROLES["separate critic, bf16, stage 2"])
    run = forks.start(argv, 2, FAILING.format(save=2, file="rank-", rank=0, left=0))
    assert forks.wait(run) == [1, 1], run.text()
    assert "checkpoint.on_error is stop" in run.text()
    assert whole_runs.checkpoints(output) == ["step-00000001"]
