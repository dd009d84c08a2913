"""Templates that write the date: one clock for all ranks, and for as long as a run is resumed."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import tiny
import transformers.utils.chat_template_utils as templates
import whole_runs
from transformers import PreTrainedTokenizerBase

from fastppo import train, train_dpo, train_reward, train_sft
from fastppo.checkpoint import save
from fastppo.checkpoint.save import Checkpoints
from fastppo.config.command_line import DPO, PPO, REWARD, SFT, parse
from fastppo.data.conversations import template_text
from fastppo.distributed import clock
from fastppo.distributed.world import World, start_world

DATE = "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}<{{ today() }}>"
COMMANDS = {
    "train": (train, PPO),
    "train_sft": (train_sft, SFT),
    "train_reward": (train_reward, REWARD),
    "train_dpo": (train_dpo, DPO),
}
FORMAT = "%d %b %Y"


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    monkeypatch.setattr(clock, "_start", None)


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def days_from_now(monkeypatch: pytest.MonkeyPatch, days: int) -> str:
    """Sets the computer's clock, as far as templates and this project see it; returns the date."""
    now = datetime.now() + timedelta(days=days)

    class Moved(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    for module in (clock, templates):
        monkeypatch.setattr(module, "datetime", Moved)
    return now.strftime(FORMAT)


def dated() -> PreTrainedTokenizerBase:
    tokenizer = tiny.tokenizer(("<pad>",))
    tokenizer.pad_token, tokenizer.chat_template = "<pad>", DATE + tiny.CHAT
    return tokenizer


def prepare(folder: Path, command: str) -> list[str]:
    """The settings of a small run on chat, whose template writes the date."""
    more: dict[str, Any] = {"output": folder / "out", "data__chat": "always", "optim__schedule": "constant"}
    if command == "train":
        whole_runs.prepare(folder)
        tiny.causal(vocab_size=258).save_pretrained(folder / "model")
        texts = [{"ask": f"{i}?", "text": "so it is"} for i in range(8)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        more |= {"data__max_prompt_tokens": 48, "ppo__microbatch_tokens": 80, "eval__prompts": 0, "eval__every": 0}
        more |= {"ptx__path": folder / "texts.jsonl", "ptx__coef": 0.1, "ptx__prompt": "ask", "ptx__chat": "always"}
        more |= {"ptx__max_tokens": 60, "ptx__batch_size": 2, "steps": 1}
        argv = whole_runs.settings(folder, **more)
    else:
        stage_runs.prepare(folder)
        kind = "answers" if command == "train_sft" else "pairs"
        more |= {"data__max_tokens": 60, "eval__examples": 4, "steps": 1, "checkpoint__every": 1}
        more["microbatch_tokens"] = 120
        argv = stage_runs.settings(folder, kind, **more)
    dated().save_pretrained(folder / "model")
    return argv


def run(command: str, argv: list[str], world: World) -> list[str]:
    """The texts that the run learned from."""
    found: list[str] = []
    module, settings = COMMANDS[command]
    made = Checkpoints.__init__

    def init(self: Checkpoints, config: Any, engines: Any, data: Any, *args: Any, **options: Any) -> None:
        found.extend(str(dated().decode(tokens)) for part in data for tokens in part)
        made(self, config, engines, data, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "__init__", init)
        module.train(parse(argv, settings), world)
    return found


def newest(folder: Path) -> dict[str, Any]:
    path = max((folder / "out" / "checkpoints").glob("step-*"))
    about: dict[str, Any] = json.loads((path / "about.json").read_text())
    return about


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_goes_on_the_next_day_with_the_date_on_which_it_began(command, tmp_path, world, monkeypatch):
    argv = prepare(tmp_path, command)
    began = days_from_now(monkeypatch, 3)
    first = run(command, argv, world)
    assert first and all(f"<{began}>" in text for text in first)
    later = days_from_now(monkeypatch, 4)
    assert later != began
    assert run(command, [*argv, "--steps", "2", "--resume", "auto"], world) == first
    assert newest(tmp_path)["step"] == 2
    days_from_now(monkeypatch, 5)  # the clock is in the second checkpoint too
    assert run(command, [*argv, "--steps", "3", "--resume", "auto"], world) == first
    anew = days_from_now(monkeypatch, 6)
    again = run(command, argv, world)
    assert all(f"<{anew}>" in text for text in again) and len(again) == len(first)


def test_a_checkpoint_without_a_clock_goes_on_with_the_day_on_which_it_was_written(tmp_path, world, monkeypatch):
    argv = prepare(tmp_path, "train_sft")
    about = Checkpoints._about
    with monkeypatch.context() as patch:
        patch.setattr(
            save.Checkpoints,
            "_about",
            lambda self, run: {name: value for name, value in about(self, run).items() if name != "clock"},
        )
        first = run("train_sft", argv, world)
    assert "clock" not in newest(tmp_path)
    days_from_now(monkeypatch, 1)
    assert run("train_sft", [*argv, "--steps", "2", "--resume", "auto"], world) == first
    assert newest(tmp_path)["clock"].startswith(f"{datetime.now():%Y-%m-%d}")


# The second rank's clock is a day ahead. What a rank makes of the data is all that is looked at.

SKEWED = """
import json, os
from datetime import datetime, timedelta
import transformers.utils.chat_template_utils as templates
from fastppo.checkpoint import save as checkpoint
try:
    from fastppo.distributed import clock
except ImportError:
    clock = templates

class Ahead(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=int(os.environ["RANK"]))

for module in (clock, templates):
    module.datetime = Ahead

def seen(self, config, engines, data, *args, **options):
    with open(f"FOLDER/tokens-{os.environ['RANK']}.json", "w") as file:
        json.dump([tokens for part in data for tokens in part], file)
    os._exit(0)

checkpoint.Checkpoints.__init__ = seen
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_ranks_whose_clocks_differ_make_the_same_tokens(command, tmp_path, forks):
    argv, today = prepare(tmp_path, command), {f"<{datetime.now():%d %b %Y}>"}
    forks.run(argv, 2, SKEWED.replace("FOLDER", str(tmp_path)), module=f"fastppo.{command}")
    one, other = (json.loads((tmp_path / f"tokens-{rank}.json").read_text()) for rank in range(2))
    today.add(f"<{datetime.now():%d %b %Y}>")  # midnight may have passed
    assert one == other and any(date in str(dated().decode(one[0])) for date in today)


def test_outside_of_a_run_it_is_the_time_of_now(monkeypatch, world):
    messages = [{"role": "user", "content": "x"}]
    for day in (1, 2):
        today = days_from_now(monkeypatch, day)
        assert template_text(messages, "", dated(), to_be_answered=True).startswith(f"<{today}>")
    clock.begin_clock("2024-02-29T23:59:59", world)
    assert template_text(messages, "", dated(), to_be_answered=True).startswith("<29 Feb 2024>")
    assert clock.reading() == "2024-02-29T23:59:59"
