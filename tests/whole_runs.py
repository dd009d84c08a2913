"""Settings of small runs and what they leave behind, and how the parts of a run move where there is no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forks import Run

from fastppo.distributed import Placement, Residency, uses

REWARD = """
import random

def letters(prompts, responses, **columns):
    # random numbers of Python's own: a resumed run must go on in their row
    return [sum("a" <= c <= "z" for c in response) / 8 + random.random() / 10 for response in responses]
"""

# Tells the last rank to stop at the nth place of a kind: `check`, where ranks agree, or `check_alone`, in sampling.
STOP_AT = """
import os
from fastppo.distributed import stop

real, count = stop.{kind}, iter(range(1, 1_000_000))

def place(*world):
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and next(count) >= {n}:
        stop._watch.asked.set()
    real(*world)

stop.{kind} = place
"""

# Told to stop after the nth update, on the last rank alone.
STOP_IN_LEARNING = """
import os
from fastppo import train
from fastppo.distributed import stop

updates, count = train.run_updates, iter(range(1, 1000))

def updating(*arguments, **done):
    for update in updates(*arguments, **done):
        yield update
        if next(count) == {n} and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            stop._watch.asked.set()

train.run_updates = updating
"""


def prepare(folder: Path) -> Path:
    """A model, prompts and a reward function."""
    tiny.saved(folder / "model", tiny.causal())
    lines = [json.dumps({"prompt": f"prompt {i}"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(REWARD)
    return folder


def settings(folder: Path, output: Path, **changes: Any) -> list[str]:
    """Changes are given as ppo__epochs=1."""
    fixed = {
        "output": output,
        "steps": 4,
        "threads": 1,
        "actor.model": folder / "model",
        "rewards": json.dumps([{"function": f"{folder}/reward.py:letters"}]),
        "data.path": folder / "prompts.jsonl",
        "data.max_prompt_tokens": 16,
        "sampling.max_new_tokens": 6,
        "ppo.batch_size": 8,
        "ppo.epochs": 2,
        "ppo.minibatches": 2,
        "ppo.microbatch_tokens": 40,
        "ppo.kl_target": 1.0,
        "ppo.kl_horizon": 100,
        "actor.lr": 1e-3,
        "actor.train": 2,
        "eval.prompts": 4,
        "eval.every": 2,
        "checkpoint.every": 1,
        "plan": "off",  # it takes a second, and is tested in test_plan.py
        "track.tensorboard": "false",
        "track.responses_every": 1,
    }
    changed = fixed | {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def wait_for(what: Callable[[], object], run: Run, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, run.text()
        time.sleep(0.01)


def records(output: Path) -> list[dict[str, Any]]:
    """The metrics but for those that measure time."""
    written = (output / "metrics.jsonl").read_text().rpartition("\n")[0]  # of a run that goes on, whole lines
    lines = [json.loads(line) for line in written.splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per_second"))} for line in lines]


def checkpoints(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def state(output: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds, by file."""
    folder = max((output / "checkpoints").glob("step-*"))
    files = sorted(path for path in folder.rglob("*.pt"))
    return {path.relative_to(folder).as_posix(): torch.load(path, weights_only=False) for path in files}


def same(one: Any, other: Any, where: str = "") -> bool:
    """Equal bit for bit; prints where not."""
    if isinstance(one, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    elif isinstance(one, dict):
        equal = one.keys() == other.keys() and all(same(one[k], other[k], f"{where}/{k}") for k in one)
    elif isinstance(one, list | tuple):
        equal = len(one) == len(other) and all(
            same(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(one, other, strict=True))
        )
    elif hasattr(one, "tolist"):  # numpy's
        equal = one.tolist() == other.tolist()
    elif hasattr(one, "__dict__"):  # DeepSpeed's own
        equal = type(one) is type(other) and same(vars(one), vars(other), where)
    else:
        equal = one == other or (one != one and other != other)
    if not equal:
        print(f"{where}: {one!r} and {other!r}"[:500])
    return bool(equal)


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    states = [state(output) for output in (one, other)]
    for saved in states:  # a run that stopped in an evaluation saved itself before it, and does not save twice
        del saved["progress.pt"]["evaluations"], saved["progress.pt"]["evaluated"]
    assert same(*states)
    for name in ("samples.jsonl", "responses.jsonl"):
        assert (one / name).read_text() == (other / name).read_text()


def move_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch, **placement: Any) -> set[str]:
    """Parts of a run leave and come back with their phases, as on a GPU; what moves are the same storages.

    placement: fields of a `Placement` that are others than those of the run. Returns the kinds that have left.
    """
    made, enter, left = Residency.__init__, Residency.enter, set[str]()

    def moving(self: Residency, device: torch.device, given: Placement | None = None) -> None:
        made(self, device, replace(given or Placement(uses(loss_reads_reference=False)), **placement))
        self._moves = True

    def entering(self: Residency, phase: str, then: str | None = None) -> None:
        for x in (x for part in self._parts if not part.moved_out for x in part.states()):
            if not x.untyped_storage().resizable():  # on the CPU a state that was loaded is mapped from its file
                x.data = x.data.clone()
        enter(self, phase, then)
        left.update(part.name[0] for part in self._parts if part.moved_out and getattr(part, "_storages", ()))

    monkeypatch.setattr(Residency, "__init__", moving)
    monkeypatch.setattr(Residency, "enter", entering)
    return left
