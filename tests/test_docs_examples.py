"""What users copy from docs/examples: each does what it says, and the batch script passes its signals on."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import tiny
import whole_runs

from fastppo.config import RewardConfig, parse
from fastppo.data import pack
from fastppo.monitor import read_lines
from fastppo.rewards import Responses, RewardError
from fastppo.rewards.functions.function import function_source
from fastppo.rewards.remote import remote_source

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "docs" / "examples"


def example(name):
    """A file of the examples as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def responses(*texts, **columns):
    count = len(texts)
    return Responses(["2 + 3 ="] * count, list(texts), [True] * count, columns, pack([[1]] * count, [1] * count))


# The reward function


def test_the_function_pays_for_the_form_for_what_is_right_and_for_brevity():
    texts = [" <answer>5</answer>", " <answer> 6 </answer>", " <answer>5", " 5", " <answer>5</answer>" + "!" * 100]
    scores = function_source(f"{EXAMPLES / 'reward.py'}:sums")(responses(*texts, answer=[5] * 5))
    assert scores == pytest.approx([1.5, 0.5, 0.1, 0.0, 1.5 - 0.005 * (len(texts[-1]) - 40)])


# The service


@contextmanager
def served():
    """The example under uvicorn, on a port that is free."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    module = example("service")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(module.app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        finally:
            server.should_exit = True
            thread.join()


def test_the_service_answers_what_a_run_asks():
    with served() as url:
        source = remote_source(RewardConfig(url=url, request_size=2))
        assert source(responses(" a tree A tree", " a tree", "", label=["x", "y", None])) == [0.5, 1.0, 0.0]


def test_the_service_says_what_is_wrong_with_a_request():
    with served() as url:
        answer = requests.post(url, json={"prompts": ["a"], "responses": [], "ended": []}, timeout=10)
        assert answer.status_code == 400 and "different lengths" in answer.json()["detail"]
        with pytest.raises(RewardError, match="status 404"):
            remote_source(RewardConfig(url=url + "s"))(responses("a"))


# The calculator

HOW_TO = "error: write calc(A*B), with whole numbers of at most 6 digits and one of + - * /\n"


def turn(text):
    """A conversation whose newest turn is the text."""
    return [{"role": "user", "content": "Question: 347*582\n"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "ended", "observation"),
    [
        ("calc(347*582)\n", True, "201954\n"),
        ("calc(7-12)\n", True, "-5\n"),
        ("calc(7/8)\n", True, "0.875\n"),
        ("calc(7/0)\n", True, "error: division by zero\n"),
        ("calc(347*)\n", True, HOW_TO),
        ("calc(__import__('os'))\n", True, HOW_TO),
        ("calc(347*582", False, None),
        ("Answer: 201954\n", True, None),
        ("", True, None),
    ],
)
def test_the_calculator_answers_calls_and_ends_with_all_else(text, ended, observation):
    assert example("calculator").calculator(turn(text), ended) == observation


def test_the_scrambled_calculator_answers_with_wrong_numbers_of_the_same_length():
    scrambled = example("calculator").scrambled
    answers = [scrambled(turn("calc(347*582)\n"), True, 0, seed) for seed in range(50)]
    assert answers == [scrambled(turn("calc(347*582)\n"), True, 0, seed) for seed in range(50)]
    assert len(set(answers)) > 40 and all(len(answer) == 7 and answer.strip().isdecimal() for answer in answers)
    assert "201954\n" not in answers
    assert set(scrambled(turn("calc(2*2)\n"), True, 0, seed) for seed in range(200)) == {
        f"{i}\n" for i in (1, 2, 3, 5, 6, 7, 8, 9)
    }
    assert scrambled(turn("calc(7/0)\n"), True, 0, 1) == "error: division by zero\n"
    assert scrambled(turn("Answer: 4\n"), True, 0, 1) is None


def test_only_the_right_answer_in_the_last_turn_is_rewarded():
    module = example("calculator")
    said = [
        "Answer: 36\n",
        "calc(4*9)\n\nAnswer: 36\n",
        "Answer: 36",
        "Answer: 37\n",
        "calc(4*9)\n",
        "Answer: 136\n",
        "36\n",
    ]
    assert module.right(said, ["36"] * 7) == [True, True, False, False, False, False, False]
    assert module.called(said) == [False, True, False, False, True, False, False]


def numbers(rows):
    return {number for row in rows for number in re.findall(r"[0-9]+", row["prompt"].splitlines()[0])}


def test_numbers_of_a_set_of_questions_are_in_no_other_and_few_demonstrations_call(tmp_path):
    example("calculator").write_data(tmp_path)
    shown, training, heldout = (
        read_lines(tmp_path / f"{name}.jsonl") for name in ("demonstrations", "training", "heldout")
    )
    assert not numbers(shown) & numbers(training) and not numbers(heldout) & (numbers(shown) | numbers(training))
    first = [row["response"] for row in shown if row["prompt"].count("\n") == 1]
    assert 0.1 < sum(response.startswith("calc") for response in first) / len(first) < 0.2
    answers = {row["prompt"]: row["response"] for row in shown}
    for prompt, response in answers.items():
        first, second = (int(number) for number in re.findall(r"[0-9]+", prompt)[:2])
        product = str(first * second)
        if response.startswith("calc"):
            assert answers[f"{prompt}{response}{product}\n"] == f"Answer: {product}\n"
        elif prompt.count("\n") == 1:
            assert response != f"Answer: {product}\n" and len(response) == len(f"Answer: {product}\n")


# The search


@pytest.fixture
def files(tmp_path):
    """An instance of the search in a conversation with a question, and the question."""
    module = example("search")
    module.write_data(tmp_path)
    asked = read_lines(tmp_path / "training.jsonl")[0]
    files = module.Files()
    assert files.reset(seed=1, options=asked) == ("", {})
    return files, asked["prompt"].removeprefix("Question: ").rstrip("?\n"), asked["answer"]


def test_a_search_finds_the_line_and_the_right_answer_is_rewarded(files):
    files, asked, answer = files
    assert files.step(f"search({asked})\n") == (f"The {asked} is {answer}.\n", 0.0, False, False, {})
    assert files.step(f"Answer: {answer}\n")[1:3] == (1.0, True)


def test_searches_that_are_wrong_or_too_many_are_told_so(files):
    files, asked, _ = files
    assert files.step("search()\n")[0] == "error: write search(WORDS)\n"
    assert files.step("search(emperor of Nowhere)\n") == ("nothing found\n", 0.0, False, False, {})
    assert files.step(f"search({asked})\n")[1:4] == (0.0, False, True)  # truncated


def test_an_answer_at_once_ends_the_conversation(files):
    files, *_ = files
    assert files.step("Answer: nobody\n")[1:3] == (0.0, True)


# Both, in runs


@pytest.mark.parametrize("name", ["calculator", "search"])
def test_a_tiny_model_takes_two_steps_of_both_runs_of_an_example(tmp_path, forks, name):
    """What a random model writes has no meaning; that files, settings and functions fit together is seen."""
    example(name).write_data(tmp_path)
    model = tiny.saved(tmp_path / "model", tiny.causal())

    def run(module, config, **changes):
        shared = {"steps": 2, "threads": 1, "plan": "off", "track.tensorboard": "false", "output": tmp_path / module}
        changed = shared | {key.replace("__", "."): value for key, value in changes.items()}
        argv = ["--config", f"{EXAMPLES / config}.yaml", *(x for k, v in changed.items() for x in (f"--{k}", str(v)))]
        forks.run(argv, module=f"fastppo.{module}")

    shown = tmp_path / "demonstrations.jsonl"
    run("train_sft", f"{name}-sft", model__path=model, model__gguf_file="null", model__train=2, data__path=shown,
        data__max_tokens=120)  # fmt: skip
    run("train", name, actor__model=tmp_path / "train_sft" / "model", actor__train=2, eval__prompts=4,
        data__path=tmp_path / "training.jsonl", data__eval_path=tmp_path / "heldout.jsonl",
        data__max_prompt_tokens=48, sampling__max_new_tokens=60)  # fmt: skip
    lines = read_lines(tmp_path / "train" / "metrics.jsonl")
    assert [line["turns"] >= 1 for line in lines if "turns" in line] == [True, True]


# Adapters


def test_the_adapters_are_laid_over_the_quickstart():
    config = parse(["--config", "quickstart", "--config", str(EXAMPLES / "lora.yaml")])
    assert config.actor.lora.rank and config.critic.lora.rank and config.critic.kind == "separate"
    assert config.critic.model is None and config.actor.train == config.critic.train  # so that one copy serves
    assert config.data == parse(["--config", "quickstart"]).data


# The batch script

# In the place of `fastppo`: it says that it runs, and when it is told to end takes its time and says so.
STAND_IN = """#!/usr/bin/env bash
echo "$@" > "$NOTES/args"
trap 'sleep 0.4; echo "saved" >> "$NOTES/saved"; exit "${SAVING:-0}"' TERM
[ "${ENDS:-}" ] && exit "$ENDS"
for _ in $(seq 600); do sleep 0.05; done
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$NOTES/scontrol"\n'


@pytest.fixture
def batch(tmp_path):
    """Starts the batch script as Slurm would, with programs of ours in the place of `scontrol` and `fastppo`."""
    started = []

    def write(name, text):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*args, command=STAND_IN, **environment):
        write("fastppo", command)
        write("scontrol", SCONTROL)
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "NOTES": str(tmp_path), "SLURM_JOB_ID": "41"} | environment
        script = subprocess.Popen(
            ["bash", EXAMPLES / "node.sbatch", *args],
            env=env,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(script)
        return script

    yield start
    for script in started:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        script.communicate()


def wait_for(condition, script, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and script.poll() is None, script.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("numbers", "requeued"),
    [
        ([signal.SIGUSR1], True),
        ([signal.SIGTERM], False),
        ([signal.SIGUSR1, signal.SIGTERM], True),
        ([signal.SIGTERM, signal.SIGTERM], False),
    ],
    ids=lambda value: "-".join(n.name for n in value) if isinstance(value, list) else "",
)
def test_a_signal_to_the_batch_script_reaches_the_run_which_is_waited_for(tmp_path, batch, numbers, requeued):
    script = batch("--config", "my run.yaml")
    wait_for((tmp_path / "args").exists, script)
    time.sleep(0.2)  # its trap is set
    for number in numbers:
        script.send_signal(number)
        time.sleep(0.1)
    said = script.communicate(timeout=20)[0]
    assert script.returncode == 0, said
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "args").read_text() == "train --config my run.yaml --resume auto\n"
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 41\n"


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_that_ends_by_itself_gives_the_job_its_status_and_is_not_requeued(tmp_path, batch, status):
    script = batch(ENDS=str(status))
    assert script.wait(20) == status and not (tmp_path / "scontrol").exists()


def test_a_run_that_could_not_save_itself_is_not_requeued(tmp_path, batch):
    script = batch(SAVING="1")
    wait_for((tmp_path / "args").exists, script)
    time.sleep(0.2)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == 1 and not (tmp_path / "scontrol").exists()


def test_the_batch_script_lets_a_run_of_two_ranks_save_itself(tmp_path, batch):
    folder, output = whole_runs.prepare(tmp_path), tmp_path / "out"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    argv = whole_runs.settings(folder, output, checkpoint__every=0, steps=1000)
    script = batch(
        *["--num_accelerators", "2", "--master_port", port, *argv],
        command=f'#!/usr/bin/env bash\nexec {sys.executable} -m fastppo "$@"\n',
    )
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(whole_runs.records(output)) > 1, script, 120)
    script.send_signal(signal.SIGUSR1)
    said = script.communicate(timeout=60)[0]
    assert script.returncode == 0 and "Traceback" not in said, said
    assert len(whole_runs.checkpoints(output)) == 1 and (tmp_path / "scontrol").read_text() == "requeue 41\n"
