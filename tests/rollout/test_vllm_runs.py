"""Whole runs that vLLM samples for, on the CPU: `make vllm` runs these in an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import generated
import pytest
import vllm_ranks
import whole_runs

from fastppo.config import NEEDED

pytest.importorskip("vllm", reason="vLLM is not installed here; `make vllm` makes an environment with it")

VLLM = {"rollout__engine": "vllm", "rollout__vllm__arguments": "{kv_cache_memory_bytes: 33554432}"}
FP32 = {"optim__dtype": "fp32", "optim__schedule": "constant"}


@pytest.fixture
def folder(tmp_path):
    folder = generated.prepare(whole_runs.prepare(tmp_path))
    (folder / "reward.py").write_text(whole_runs.REWARD)
    vllm_ranks.saved(folder / "model")
    return folder


def sampler_errors(output: Path) -> list[float]:
    """The largest difference of its logprobs from the trainer's, at each step."""
    return [record["sampler_error_max"] for record in whole_runs.records(output) if "sampler_error_max" in record]


def test_a_run_samples_from_present_weights_and_weights_its_tokens(forks, folder):
    """Evaluations between the steps have a temperature of their own."""
    argv = whole_runs.settings(folder, folder / "out", **VLLM, **FP32, eval__temperature=0.5)
    run = forks.start(argv)
    assert forks.wait(run) == [0], run.text()
    errors = sampler_errors(folder / "out")
    assert len(errors) == 4 and max(errors) < 1e-5
    assert "ppo.importance auto is token, for rollout.engine vllm" in run.text()
    assert "vLLM 0.32.0 samples: LlamaForCausalLM, a copy of it on 1 rank(s)" in run.text()
    assert (folder / "out" / "actor" / "config.json").exists()


@pytest.mark.parametrize("changes", [{}, {"actor__lora__rank": 2, "actor__train": "all", "actor__average": 0.5}])
def test_a_run_that_is_resumed_ends_like_one_that_was_not_interrupted(forks, folder, changes):
    """Bit for bit: what a response is computed with is the same in both."""
    same = VLLM | FP32 | changes
    forks.run(whole_runs.settings(folder, folder / "whole", **same))
    forks.run(whole_runs.settings(folder, folder / "parts", **same, steps=2))
    forks.run(whole_runs.settings(folder, folder / "parts", **same, resume="auto"))
    assert whole_runs.records(folder / "whole")[-1] == whole_runs.records(folder / "parts")[-1]
    states = [whole_runs.state(folder / output) for output in ("whole", "parts")]
    for state in states:  # the first run of the parts was evaluated at its own end, too
        del state["progress.pt"]["evaluations"], state["progress.pt"]["evaluated"]
    assert whole_runs.same(*states)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_ranks_that_sample_together_stop_together_and_go_on(forks, folder, n):
    """Told on the last rank alone, at the nth time that the two agree, in an evaluation or a step."""
    same = VLLM | FP32 | {"rollout__vllm__tensor_parallel_size": 2, "zero__stage": 3, "sampling__max_new_tokens": 20}
    same |= {"ppo__microbatch_tokens": 80}
    if n == 1:
        forks.run(whole_runs.settings(folder, folder / "whole", **same), ranks=2)
        assert max(sampler_errors(folder / "whole")) < 1e-5
    argv = whole_runs.settings(folder, folder / "parts", **same)
    forks.run(argv, ranks=2, before=whole_runs.STOP_AT.format(kind="check_among", n=n))
    assert len(sampler_errors(folder / "parts")) < 4
    forks.run([*argv, "--resume", "auto"], ranks=2)
    assert len(sampler_errors(folder / "parts")) == 4 and max(sampler_errors(folder / "parts")) < 1e-5
    if n == 1:
        whole_runs.assert_same_run(folder / "whole", folder / "parts")


def test_a_rank_alone_stops_within_a_response(forks, folder):
    argv = whole_runs.settings(folder, folder / "out", **VLLM, **FP32)
    forks.run(argv, ranks=2, before=whole_runs.STOP_AT.format(kind="check_alone", n=9))
    forks.run([*argv, "--resume", "auto"], ranks=2)
    assert len(sampler_errors(folder / "out")) == 4


TALKS = {
    "rollout__turn_tokens": 5,
    "sampling__max_new_tokens": 20,
    "sampling__stop_tokens": vllm_ranks.STOPS,
    "ppo__microbatch_tokens": 80,
    "rollout__vllm__tensor_parallel_size": 2,
}


def test_conversations_of_ranks_that_sample_together_stop_together_and_go_on(forks, folder):
    """Told on the last rank alone, in the middle of conversations."""
    vllm_ranks.talking(folder)
    same = VLLM | FP32 | TALKS | {"rollout__environment": f"{folder}/partner.py:slow"}
    argv = whole_runs.settings(folder, folder / "out", **same)
    forks.run(argv, ranks=2, before=whole_runs.STOP_AT.format(kind="check_among", n=6))
    assert len(sampler_errors(folder / "out")) < 4
    forks.run([*argv, "--resume", "auto"], ranks=2)
    assert len(sampler_errors(folder / "out")) == 4 and max(sampler_errors(folder / "out")) < 1e-5


def test_an_environment_that_fails_on_one_rank_ends_all_with_its_reason(forks, folder):
    lines = [
        "import os",
        "def fails(turn):",
        "    if os.environ['RANK'] == '1' and turn == 1:",
        "        raise LookupError('gone')",
        "    return 'go on'",
    ]
    (folder / "fails.py").write_text("\n".join(lines))
    same = VLLM | FP32 | TALKS | {"rollout__environment": f"{folder}/fails.py:fails"}
    run = forks.start(whole_runs.settings(folder, folder / "out", **same), ranks=2)
    codes = forks.wait(run)
    assert len({*codes}) == 1 and codes[0] not in (0, 99), run.text()
    assert "fails.py:fails raised LookupError: gone (fails.py:4)" in run.text()


def test_generate_draws_with_it(forks, folder):
    argv = generated.settings(folder, folder / "drawn", **VLLM)
    forks.run(argv, ranks=2, module="fastppo.generate")
    assert len(generated.rows(folder / "drawn")) == 44


def test_a_process_ends_with_its_status_and_says_nothing_of_its_end(folder):
    argv = whole_runs.settings(folder, folder / "out", **VLLM, **FP32, steps=3, health__window=1)
    command = [sys.executable, "-m", "fastppo.train", *argv]
    environment = {k: v for k, v in os.environ.items() if k not in NEEDED}  # of a rank in the tests' own process
    run = partial(subprocess.run, capture_output=True, text=True, timeout=300, env=environment)
    done = run(command)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    ended = ["--health.alarms", json.dumps([{"figure": "sampler_error", "level": 1e-12, "action": "stop"}])]
    done = run([*command, *ended])
    assert done.returncode == 3, done.stdout + done.stderr
