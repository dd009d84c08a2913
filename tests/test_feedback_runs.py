"""Runs in which a source of reward fails: every rank ends with the reason, and what was done is saved."""

import json
import threading

import pytest
import tiny
import whole_runs
from forks import Forks
from services import lengths, service


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("logs")) as forks:
        yield forks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_service_that_dies_costs_the_run_nothing(tmp_path, forks, ranks):
    """Every rank ends with the reason, and the run resumed with a service elsewhere ends as if none had died."""
    folder, broken = whole_runs.prepare(tmp_path), threading.Event()

    def dying(body):
        dead = broken.is_set() or (len(asked) > 8 and "prompt" in body["prompts"][-1])
        if dead:
            broken.set()
        return (502, b"<html>Bad Gateway</html>") if dead else lengths(body)

    def settings(output, url):
        rewards = json.dumps([{"url": url, "retries": 1, "request_size": 2}])
        changes = {"rewards": rewards, "ppo__score_normalise": "true", "optim__dtype": "fp32", "checkpoint__every": 0}
        return whole_runs.settings(folder, folder / output, **changes)

    with service(lengths) as (url, _):
        forks.run(settings("straight", url), ranks)
        with service(dying) as (other, asked):
            run = forks.start(settings("broken", other), ranks)
            assert forks.wait(run) == [1] * ranks, run.text()
        assert (
            f"rewards.url = {other} answered with status 502: '<html>Bad Gateway</html>'. Tried 2 times." in run.text()
        )
        assert "a source of reward failed at step" in run.text() and "Traceback" not in run.text()
        forks.run([*settings("broken", url), "--resume", "auto"], ranks)
    assert whole_runs.records(folder / "broken") == whole_runs.records(folder / "straight")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b'{"scores": []}', "returned 0 numbers for 2 responses"),
        (b'{"scores": [NaN, NaN]}', "returned nan for response 0"),
        (b"<html>Welcome</html>", "answered with something that is not JSON: '<html>Welcome</html>'"),
    ],
)
def test_what_a_service_says_wrong_ends_all_ranks_with_the_reason(tmp_path, forks, said, words):
    folder = whole_runs.prepare(tmp_path)
    with service(lambda body: (200, said)) as (url, _):
        rewards = json.dumps([{"url": url, "retries": 0}])
        run = forks.start(whole_runs.settings(folder, folder / "out", rewards=rewards), ranks=2)
        assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        assert f"rewards.url = {url} {words}" in log.read_text() and "Traceback" not in log.read_text()


ONE_MEMBER_FAILS = """
import os
from fastppo.feedback import model

calls, checked = 0, model.checked

def nan_at_the_second_step(name, scores, texts):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:  # the first member's second answer
        scores[0] = float("nan")
    return checked(name, scores, texts)

model.checked = nan_at_the_second_step
"""


def test_a_member_of_an_ensemble_that_fails_on_one_rank_ends_both_with_the_reason(tmp_path, forks):
    folder = whole_runs.prepare(tmp_path)
    members = [tiny.saved(tmp_path / str(i), tiny.classifier(seed=i)) for i in range(2)]
    changes = {"rewards": json.dumps([{"ensemble": members}]), "eval__prompts": 0, "eval__every": 0}
    run = forks.start(whole_runs.settings(folder, folder / "out", **changes), 2, ONE_MEMBER_FAILS)
    assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        said = log.read_text()
        assert f"rewards.ensemble = {members[0]} returned nan for response 0" in said and "Traceback" not in said
    assert whole_runs.checkpoints(folder / "out")[-1] == "step-00000001"
