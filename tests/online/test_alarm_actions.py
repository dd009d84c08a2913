"""Whole runs that fall ill, and what their alarms do: raise beta, end an epoch, roll back, end the run."""

import json
import re
from pathlib import Path

import pytest
import torch
import whole_runs
from safetensors.torch import load_file
from whole_runs import STOP_AT, assert_same_run

from fastppo.checkpoint.rollback_record import RollbackRecord, RollbackRecordError, read_rollback_record

# From step 5 on distinct-2 is 0.1, until the run has rolled back `cured` times.
ILL = """
from fastppo import train
from fastppo.monitor import health

watched, figures = train.watch, health.figures

def watch(experience, updates, kept, config, tokenizer):
    ill = kept.steps + 1 >= 5 and kept.roll_backs < {cured}
    health.figures = lambda e, **k: figures(e, **k) | ({{"distinct_2": 0.1}} if ill else {{}})
    return watched(experience, updates, kept, config, tokenizer)

train.watch = watch
"""
QUIET = {"eval__prompts": 0, "eval__every": 0}
SETTINGS = {"steps": 8, "optim__dtype": "fp32", "critic__kind": "shared", "checkpoint__keep_last": 4, "eval__every": 2}
# Told to stop as soon as the run has rolled back, when nothing new is there to be saved.
STOP_THERE = """
from fastppo import train
from fastppo.distributed import stop

acted = train.act_on_alarms

def act(*arguments):
    done = acted(*arguments)
    if done == "rolled back":
        stop._watch.asked.set()
    return done

train.act_on_alarms = act
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    judge = "def odd(prompts, responses, **columns):\n    return [sum(map(ord, r)) % 7 / 7 for r in responses]\n"
    (folder / "judge.py").write_text(judge)
    return folder


def settings(folder: Path, output: Path, action: str, **changes) -> list[str]:
    rules = [{"figure": "distinct_2", "level": 0.6, "action": action}]
    judge = json.dumps([{"function": f"{folder}/judge.py:odd"}])
    fixed = SETTINGS | {"health__alarms": json.dumps(rules), "health__judge": judge}
    return whole_runs.settings(folder, output, **fixed | changes)


def alarms(output: Path, level: str = "act") -> list[dict]:
    lines = [json.loads(line) for line in (output / "alarms.jsonl").read_text().splitlines()]
    return [line for line in lines if line["level"] == level]


def steps(output: Path) -> list[dict]:
    return [r for r in whole_runs.records(output) if "score" in r]


def test_a_run_rolls_back_to_before_it_fell_ill_and_goes_on_with_a_higher_beta(folder, forks):
    """On two ranks; and one that is stopped after it has rolled back, and resumed, comes out the same."""
    output, stopped = folder / "rolled", folder / "rolled-and-stopped"
    run = forks.start(settings(folder, output, "roll_back"), 2, ILL.format(cured=1))
    assert forks.wait(run) == [0, 0], run.text()
    assert "the run rolls back to" in run.text() and "step-00000004, with a KL coefficient" in run.text()
    assert [(a["step"], a["action"], a["good"]) for a in alarms(output)] == [(6, "roll_back", 4)]
    records = steps(output)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert records[4]["kl_coef"] > 1.5 * records[3]["kl_coef"] and records[4]["health/distinct_2"] > 0.1
    assert [n for n in whole_runs.checkpoints(output) if n.startswith("aside")] == ["aside-step-00000005.1"]

    argv = settings(folder, stopped, "roll_back", resume="auto")
    run = forks.start(argv, 2, ILL.format(cured=1) + STOP_AT.format(kind="check", n=62))
    assert forks.wait(run) == [0, 0] and "the run rolls back to" in run.text(), run.text()
    run = forks.start(argv, 2, ILL.format(cured=1))
    assert forks.wait(run) == [0, 0] and "the run rolls back to" not in run.text(), run.text()
    assert_same_run(output, stopped)
    assert (output / "alarms.jsonl").read_text() == (stopped / "alarms.jsonl").read_text()

    at_once = folder / "rolled-and-stopped-at-once"
    argv = settings(folder, at_once, "roll_back", resume="auto", checkpoint__keep_last=1)
    run = forks.start(argv, 2, ILL.format(cured=1) + STOP_THERE)
    assert forks.wait(run) == [0, 0] and "the run rolls back to" in run.text(), run.text()
    assert max(whole_runs.checkpoints(at_once)) == "step-00000004"  # kept, though 5 was newer
    run = forks.start(argv, 2, ILL.format(cured=1))
    assert forks.wait(run) == [0, 0] and "the run rolls back to" not in run.text(), run.text()
    assert_same_run(output, at_once)
    assert (output / "alarms.jsonl").read_text() == (at_once / "alarms.jsonl").read_text()


def test_a_run_whose_weights_are_split_rolls_back(folder, forks):
    output = folder / "split"
    fixed = {"zero__stage": 3, "steps": 7, "critic__kind": "separate"} | QUIET
    run = forks.start(settings(folder, output, "roll_back", **fixed), 2, ILL.format(cured=1))
    assert forks.wait(run) == [0, 0], run.text()
    records = steps(output)
    assert [r["step"] for r in records] == list(range(1, 8))
    # step 5 was done twice, with the same random numbers: weights from the checkpoint write the same responses
    first, second = re.findall(r"step 5/7  (score .*?  KL \S+)", run.text())
    assert first == second and all(r["sampler_error"] < 1e-4 for r in records)


def test_a_run_that_cannot_be_cured_ends_after_its_last_roll_back(folder, forks):
    output = folder / "incurable"
    run = forks.start(settings(folder, output, "roll_back", health__roll_backs=1, **QUIET), 1, ILL.format(cured=9))
    assert forks.wait(run) == [3], run.text()
    assert "Roll backs so far: 1. The best checkpoint from before is" in run.text()
    assert [(a["step"], a["action"]) for a in alarms(output)] == [(6, "roll_back")] * 2


def test_a_run_that_an_alarm_ends_leaves_the_best_actor_from_before(folder, forks):
    output = folder / "ended"
    argv = settings(folder, output, "stop", checkpoint__every=2, resume="auto", track__tensorboard="true")
    run = forks.start(argv, 1, ILL.format(cured=1))
    assert forks.wait(run) == [3], run.text()
    judged = {r["step"]: r["eval/judge"] for r in whole_runs.records(output) if "eval/judge" in r and r["step"] > 0}
    best = max((step for step in judged if step <= 4), key=lambda step: (judged[step], step))
    name = f"step-{best:08d}"
    assert f"The best checkpoint from before is {output}/checkpoints/{name}" in run.text()
    assert "Traceback" not in run.text() and "step 6: the run ends here: distinct_2 is 0.1" in run.text()
    saved = torch.load(output / "checkpoints" / name / "actor/mp_rank_00_model_states.pt", weights_only=False)["module"]
    actor = load_file(output / "actor/model.safetensors")
    trained = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    assert trained and all(torch.equal(actor[key], value) for key, value in trained.items())
    assert [r["step"] for r in steps(output)] == [1, 2, 3, 4, 5, 6]
    assert len(json.loads((output / "samples.jsonl").read_text().splitlines()[0])) == 5

    before = whole_runs.records(output), (output / "alarms.jsonl").read_text()
    again = forks.start(argv, 1, ILL.format(cured=1))
    assert forks.wait(again) == [3], again.text()
    assert "an alarm has ended this run, at step 6: distinct_2 is 0.1" in again.text()
    assert "actor.model" not in again.text()  # nothing is loaded for it
    assert (whole_runs.records(output), (output / "alarms.jsonl").read_text()) == before
    forks.run([*argv, "--health.alarms", "[]"], 1, ILL.format(cured=1))
    assert [r["step"] for r in steps(output)] == list(range(1, 9))


def test_what_a_run_that_went_back_knows_is_whole_or_named(tmp_path):
    since = RollbackRecord("step-00000004", 0.2, 1, [], {"metrics.jsonl": 7}, levels={"health.window": 3})
    since.write(tmp_path)
    assert (
        read_rollback_record(tmp_path / "step-00000004") == since
        and read_rollback_record(tmp_path / "step-00000005") is None
    )
    (tmp_path / "since.json").write_text('{"checkpoint": "step-0')
    with pytest.raises(
        RollbackRecordError, match=r"since\.json cannot be read .* the run continues as if neither had happened"
    ):
        read_rollback_record(tmp_path / "step-00000004")


def test_of_checkpoints_that_were_set_aside_a_few_stay(folder, forks):
    output = folder / "aside"
    fixed = {"checkpoint__keep_last": 1, "health__roll_backs": 4} | QUIET
    run = forks.start(settings(folder, output, "roll_back", **fixed), 1, ILL.format(cured=3))
    assert forks.wait(run) == [0], run.text()
    assert run.text().count("it is renamed to aside") == 3
    assert len([n for n in whole_runs.checkpoints(output) if n.startswith("aside")]) == 1


def test_a_run_without_a_checkpoint_from_before_ends_as_it_is(folder, forks):
    output = folder / "nothing-left"
    run = forks.start(settings(folder, output, "stop", checkpoint__every=0, **QUIET), 1, ILL.format(cured=1))
    assert forks.wait(run) == [3], run.text()
    assert "No checkpoint up to step 4 is left, so the actor stays as it is now" in run.text()
    assert (output / "actor/model.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over(folder, forks):
    """The newest from before is damaged while the run goes on."""
    output = folder / "damaged"
    damage = f"""
from fastppo.online import alarm_actions
find = alarm_actions.checkpoint_before
def before(*arguments, **settings):
    path = "{output}/checkpoints/step-00000004/progress.pt"
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    open(path, "wb").write(content)
    return find(*arguments, **settings)
alarm_actions.checkpoint_before = before
"""
    run = forks.start(settings(folder, output, "roll_back", steps=7, **QUIET), 1, ILL.format(cured=1) + damage)
    assert forks.wait(run) == [0], run.text()
    assert "step-00000004 cannot be used" in run.text() and "step-00000003, with a KL coefficient" in run.text()
    assert [r["step"] for r in steps(output)] == list(range(1, 8))


def test_beta_is_raised_by_the_factor_of_the_settings(folder, forks):
    output = folder / "raised"
    fixed = {"ppo__kl_target": "null", "checkpoint__every": 0, "steps": 7} | QUIET
    argv = settings(folder, output, "raise_kl", health__raise_kl=3.0, **fixed)
    forks.run(argv, 1, ILL.format(cured=1))
    coefficients = [r["kl_coef"] for r in steps(output)]
    assert coefficients == pytest.approx([0.05] * 6 + [0.15])
    assert [(a["step"], a["action"]) for a in alarms(output)] == [(6, "raise_kl")]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_update_too_far_ends_the_epoch_on_all_ranks(stage, folder, forks):
    output = folder / f"short-{stage}"
    rules = json.dumps([{"figure": "approx_kl", "level": 1e-5, "action": "stop_epoch"}])
    fixed = {"health__alarms": rules, "steps": 2, "checkpoint__every": 0, "zero__stage": stage} | QUIET
    argv = settings(folder, output, "stop", **fixed)
    forks.run(argv, 2)
    assert [(a["step"], a["action"]) for a in alarms(output)] == [(1, "stop_epoch"), (2, "stop_epoch")]
    for record, alarm in zip(steps(output), alarms(output), strict=True):
        assert alarm["value"] > 1e-5 and alarm["value"] > record["epoch1/approx_kl"]
    assert not any("epoch2/approx_kl" in r for r in steps(output))
