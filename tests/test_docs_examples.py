"""What users copy from docs/examples: each does what it says, and the batch script passes its signals on."""

import importlib.util
import os
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
import whole_runs

from fastppo.config import RewardConfig, parse
from fastppo.data import pack
from fastppo.rewards import Responses, RewardError
from fastppo.rewards.functions.function import function_source
from fastppo.rewards.remote import remote_source

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "docs" / "examples"


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
    spec = importlib.util.spec_from_file_location("service_example", EXAMPLES / "service.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
