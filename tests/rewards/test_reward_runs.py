"""Runs in which a source of reward fails: every rank ends with the reason, and what was done is saved."""

import json
import os
import signal
import textwrap
import threading
import time

import pytest
import tiny
import whole_runs
from services import lengths, service


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
from fastppo.rewards import model

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


# Functions that change the process they run in, and coroutine functions

LETTERS = """
    return [sum("a" <= c <= "z" for c in response) / 8 for response in responses]
"""
HOSTILE = (
    """import os, signal, torch
torch.set_grad_enabled(False)
os.chdir("/")
def letters(responses):
    torch.inference_mode().__enter__()
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
"""
    + LETTERS
)
ASYNC = "import asyncio\nasync def letters(responses):\n    await asyncio.sleep(0.01)\n" + LETTERS


def judged(path):
    """Settings with one function as reward and as judge."""
    source = json.dumps([{"function": f"{path}:letters"}])
    return {"rewards": source, "health__judge": source, "optim__dtype": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    for name, text in (("plain", "def letters(responses):" + LETTERS), ("hostile", HOSTILE), ("coroutine", ASYNC)):
        (folder / f"{name}.py").write_text(text)
    return folder


def test_functions_that_change_the_process_and_coroutine_functions_make_the_run_of_a_plain_one(folder, forks):
    for name in ("plain", "hostile", "coroutine"):
        forks.run(whole_runs.settings(folder, folder / name, **judged(folder / f"{name}.py")), 2)
    assert whole_runs.records(folder / "hostile") == whole_runs.records(folder / "plain")
    assert whole_runs.records(folder / "coroutine") == whole_runs.records(folder / "plain")
    norms = [r["actor_grad_norm"] for r in whole_runs.records(folder / "hostile") if "actor_grad_norm" in r]
    assert norms and all(norm > 0 for norm in norms)


@pytest.mark.parametrize("name", ["hostile", "coroutine"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_whatever_a_function_does_with_them(folder, forks, name, number):
    output = folder / f"{name}-{number}"
    changes = judged(folder / f"{name}.py") | {"steps": 1000, "checkpoint__every": 0}
    run = forks.start(whole_runs.settings(folder, output, **changes), 1)
    while not ((output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 2):
        time.sleep(0.02)
    os.kill(run.ranks[0], number)
    assert forks.wait(run) == [0], run.text()
    assert len(whole_runs.checkpoints(output)) == 1


@pytest.mark.parametrize("where", ["rewards", "health.judge"])
def test_a_coroutine_function_that_fails_on_one_rank_ends_both_with_the_reason_and_what_was_done_is_saved(
    folder, forks, where
):
    text = """
        import asyncio, os
        calls = 0
        async def letters(responses):
            global calls
            calls += 1
            await asyncio.sleep(0.01)
            if calls > 1 and os.environ["RANK"] == "1":
                raise SystemExit("no key")
            return [len(response) for response in responses]
        """
    (folder / "fails.py").write_text(textwrap.dedent(text))
    fails, plain = (json.dumps([{"function": f"{folder}/{name}.py:letters"}]) for name in ("fails", "plain"))
    changes = {"rewards": plain, where.replace(".", "__"): fails, "eval__prompts": 0, "eval__every": 0}
    output = folder / f"fails-{where}"
    run = forks.start(whole_runs.settings(folder, output, **changes), 2)
    assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        said = log.read_text()
        assert f"{where}.function = {folder}/fails.py:letters raised SystemExit: no key (fails.py:9)" in said
        assert "Traceback" not in said
    assert whole_runs.checkpoints(output)[-1] == "step-00000001"


# Reference answers

REFERENCES = ["5", "#### 1,000", r"\boxed{\frac{1}{2}}"]


def with_references(folder, references=REFERENCES):
    rows = [{"prompt": f"prompt {i}", "answer": references[i % len(references)]} for i in range(40)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"math": "answer", "time_limit": 0.2}
    rewards = json.dumps([source, {"function": f"{folder}/reward.py:letters"}])
    judge = json.dumps([source])
    return {"data__path": folder / "answers.jsonl", "rewards": rewards, "health__judge": judge, "optim__dtype": "fp32"}


# Responses of an actor that has learned nothing, each with an answer: right for some prompts, or one without end.
ANSWERING = r"""
from fastppo.rewards import scoring

texts = scoring.response_texts
said = ["so it is \\boxed{5.0}", "the answer is $1000.", "#### 1/2", "#### 2/4"] * 2 + ["\\boxed{9^{9^{9^9}}}"]

def answering(packed, tokenizer):
    return [f"{text} {said[sum(map(ord, text)) % len(said)]}" for text in texts(packed, tokenizer)]

scoring.response_texts = answering
"""


def test_reference_answers_are_a_reward_that_resumes_bit_for_bit(folder, forks):
    changes = with_references(folder) | {"steps": 3, "eval__every": 0}
    whole, parts = (whole_runs.settings(folder, folder / name, **changes) for name in ("whole", "parts"))
    forks.run(whole, 2, ANSWERING)
    forks.run(parts, 2, ANSWERING + whole_runs.STOP_AT.format(kind="check", n=9))
    assert 0 < len(whole_runs.records(folder / "parts")) < len(whole_runs.records(folder / "whole"))
    forks.run([*parts, "--resume", "auto"], 2, ANSWERING)
    whole_runs.assert_same_run(folder / "whole", folder / "parts")
    right = [record["score/0"] for record in whole_runs.records(folder / "whole") if "score/0" in record]
    assert len(right) == 3 and all(0 < share < 1 for share in right)


@pytest.mark.parametrize("references", [["5", "???"], [None]])
def test_a_reference_that_cannot_be_read_ends_all_ranks_before_a_model_is_loaded(folder, forks, references):
    output = folder / "unread"
    run = forks.start(whole_runs.settings(folder, output, **with_references(folder, references)), 2)
    assert forks.wait(run) == [1, 1], run.text()
    for log in run.logs:
        said = log.read_text()
        assert "rewards.math = answer: these reference answers cannot be read as mathematics: " in said
        assert "Traceback" not in said
    assert not (output / "metrics.jsonl").exists()
