"""Whole runs of generate: what they write, what ends them, and that those that are continued write the same."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import generated
import pytest
import tiny
from generated import files, metrics, rewards, rows, settings

from fastppo import best_of_n, generate, train_dpo, train_reward, train_sft
from fastppo.checkpoint import CheckpointError
from fastppo.checkpoint.resume import FREE, ROUNDING
from fastppo.config.command_line import DPO, GENERATE, REWARD, SFT, parse
from fastppo.data import DataError
from fastppo.distributed.world import start_world
from fastppo.errors import ModelError
from fastppo.monitor import RunFolderError
from fastppo.report import __main__ as report
from fastppo.rewards import RewardError, scoring

FORMATS = ("jsonl", "parquet")

# Runs end where a test wants it: after so many calls of a function that all ranks make once a batch.
KILL = """
import os, signal
from fastppo.generation import store

real, calls = store.agreed, iter(range(1, 1_000_000))

def dying(answer, world):
    if next(calls) == {n} and int(os.environ["RANK"]) == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(answer, world)

import fastppo.generation.lines, fastppo.generation.parts
fastppo.generation.lines.agreed = fastppo.generation.parts.agreed = dying
"""
FULL = """
import errno, os
import fastppo.generation.lines, fastppo.generation.parts

real, calls = os.fsync, iter(range(1, 1_000_000))

def full(handle):
    if next(calls) >= {n} and int(os.environ["RANK"]) == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(handle)

os.fsync = full
"""
SLOW = """
import time
from fastppo import generate

real = generate.batch_metrics

def slow(*arguments):
    time.sleep(0.4)
    return real(*arguments)

generate.batch_metrics = slow
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generated.prepare(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def run(folder: Path, output: Path, world: Any, **changes: Any) -> Path:
    generate.generate(parse(settings(folder, output, **changes), GENERATE), world)
    return output


@pytest.fixture(scope="module")
def undisturbed(folder, world, tmp_path_factory):
    """The folders of whole runs, by format."""
    place = tmp_path_factory.mktemp("whole")
    return {form: run(folder, place / form, world, format=form) for form in FORMATS}


# What is written


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_in_the_order_of_prompts_and_samples_with_the_data_s_columns(undisturbed, form):
    found = rows(undisturbed[form])
    assert [(row["prompt_index"], row["sample"]) for row in found] == [(i, k) for i in range(11) for k in range(4)]
    assert [row["prompt"] for row in found] == [f"prompt {i}" for i in range(11) for _ in range(4)]
    assert [row["answer"] for row in found] == [i % 3 for i in range(11) for _ in range(4)]
    for row in found:
        assert len(row["tokens"]) == len(row["logprobs"]) <= 6 and all(x < 0 for x in row["logprobs"])
        assert row["ended"] == (row["tokens"][-1] == 0) and isinstance(row["score"], float)
    assert [line["step"] for line in metrics(undisturbed[form])] == list(range(1, 9))


def test_both_formats_hold_the_same_rows(undisturbed):
    assert rows(undisturbed["jsonl"]) == rows(undisturbed["parquet"])


def test_responses_do_not_depend_on_the_size_of_a_batch_or_on_the_other_samples(folder, world, tmp_path, undisturbed):
    wanted = [(row["prompt_index"], row["sample"], row["tokens"]) for row in rows(undisturbed["jsonl"])]
    other = run(folder, tmp_path / "a", world, batch_size=64, sampling__rows=5)
    assert [(row["prompt_index"], row["sample"], row["tokens"]) for row in rows(other)] == wanted


def test_one_response_to_a_prompt(folder, world, tmp_path):
    found = rows(run(folder, tmp_path / "a", world, sampling__samples_per_prompt=1))
    assert [(row["prompt_index"], row["sample"]) for row in found] == [(i, 0) for i in range(11)]


def test_a_limit_takes_that_many_rows_in_the_order_of_the_data_and_shuffle_changes_it(folder, world, tmp_path):
    few = rows(run(folder, tmp_path / "a", world, data__limit=4))
    kept = [row["prompt"] for row in few[::4]]
    assert len(few) == 16 and kept == sorted(kept, key=lambda text: int(text.split()[1]))
    mixed = rows(run(folder, tmp_path / "b", world, data__shuffle="true"))
    assert {row["prompt"] for row in mixed} == {f"prompt {i}" for i in range(11)}
    assert [row["prompt"] for row in mixed[::4]] != [f"prompt {i}" for i in range(11)]
    assert [row["prompt_index"] for row in mixed[::4]] == list(range(11))


@pytest.mark.parametrize("form", FORMATS)
def test_without_rewards_there_is_no_score_and_its_readers_say_so(folder, world, tmp_path, capsys, form):
    output = run(folder, tmp_path / "a", world, format=form, rewards="[]")
    assert "score" not in rows(output)[0] and "score" not in metrics(output)[0]
    path = output / ("responses.jsonl" if form == "jsonl" else "responses")
    with pytest.raises(SystemExit):
        best_of_n.main([str(path)])
    assert "has no column score" in capsys.readouterr().err


def test_scores_by_source_and_a_judge(folder, world, tmp_path):
    two = rewards(folder, "letters", "length")
    output = run(folder, tmp_path / "a", world, rewards=two, judge=rewards(folder, "length"))
    for row in rows(output):
        assert row["score"] == pytest.approx(row["score/0"] + row["score/1"], abs=1e-6)
        assert row["judge"] == row["score/1"] == pytest.approx(len(row["response"]) / 10)
    assert {"score", "score/0", "score/1", "judge", "distinct_2", "ended"} <= set(metrics(output)[0])


def test_reference_answers_score_and_judge(folder, world, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "response_texts", lambda packed, tokenizer: ["#### 1"] * len(packed))
    math = '[{"math": "answer", "weight": 2}]'
    found = rows(run(folder, tmp_path / "a", world, rewards=math, judge=math, data__limit=5))
    assert [(row["score"], row["judge"]) for row in found] == [(2 * (row["answer"] == 1),) * 2 for row in found]
    with pytest.raises(RewardError, match=r"judge.math = solution names a column .*it has: prompt, answer, score"):
        run(folder, tmp_path / "b", world, judge='[{"math": "solution"}]')


def test_a_judge_alone(folder, world, tmp_path):
    output = run(folder, tmp_path / "a", world, rewards="[]", judge=rewards(folder, "length"))
    assert "score" not in rows(output)[0] and rows(output)[0]["judge"] > 0


def test_a_reward_model_scores_wherever_its_weights_are(folder, world, tmp_path):
    model = tiny.saved(tmp_path / "reward", tiny.classifier(vocabulary=258), ("<pad>",))
    found = [
        rows(run(folder, tmp_path / place, world, rewards=json.dumps([{"model": model}]), rewards_on=place))
        for place in ("gpu", "ranks", "cpu")
    ]
    for other in found[1:]:
        assert [row["score"] for row in found[0]] == pytest.approx([row["score"] for row in other], abs=1e-6)


# Mistakes


def test_there_is_no_report_of_responses_but_a_page_of_best_of_n(undisturbed, capsys):
    with pytest.raises(SystemExit):
        report.main([str(undisturbed["jsonl"])])
    assert "which trains nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__path": ""}, "model.path is not set"),
        ({"data__path": ""}, "data.path is not set"),
        ({"data__eval_path": "a.jsonl"}, "data.eval_path is a.jsonl, but this command holds no prompts out"),
        ({"data__eval_split": "test"}, "data.eval_split is test, but this command"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"microbatch_tokens": 10}, "microbatch_tokens is 10, but one sequence can have 54 tokens"),
        ({"resume": "step-1"}, "resume is step-1; it must be auto or null"),
        ({"attention": "flash"}, "attention is flash and dtype fp32"),
        ({"attention": "varlen"}, "attention is varlen and dtype fp32"),
        ({"judge": '[{"function": "a"}]'}, r"judge\[0\].function is a"),
    ],
)
def test_settings_that_cannot_be(folder, tmp_path, capsys, changes, said):
    with pytest.raises(SystemExit) as left:
        parse(settings(folder, tmp_path / "a", **changes), GENERATE)
    assert left.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_scores_that_are_no_numbers_end_the_run_with_the_response_and_what_is_written_stays(folder, world, tmp_path):
    with pytest.raises(RewardError, match=r"nan returned nan for response 0"):
        run(folder, tmp_path / "a", world, rewards=rewards(folder, "nan"))
    assert not files(tmp_path / "a")


def test_prompts_and_responses_longer_than_the_context_are_refused(folder, world, tmp_path):
    tiny.saved(tmp_path / "short", tiny.causal(max_position_embeddings=32))
    with pytest.raises(DataError, match=r"max_prompt_tokens 48 \+ sampling.max_new_tokens 6 .* context holds 32"):
        run(folder, tmp_path / "a", world, model__path=tmp_path / "short")


def test_an_adapter_is_refused_with_what_to_do(folder, world, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    with pytest.raises(ModelError, match=r"contains an adapter .* for base and no model. Merge it"):
        run(folder, tmp_path / "a", world, model__path=adapter)


def test_values_that_json_cannot_hold_are_told_before_a_model_is_loaded(folder, world, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pydict({"prompt": ["a", "b"], "when": [b"x", b"y"]})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match=r"column when of the data holds .* Set format to parquet"):
        run(folder, tmp_path / "a", world, data__path=tmp_path / "bytes.parquet")
    output = run(folder, tmp_path / "b", world, data__path=tmp_path / "bytes.parquet", format="parquet")
    assert rows(output)[0]["when"] == b"x"


# Continuing


def test_a_run_that_is_done_has_nothing_to_do(folder, world, undisturbed, caplog):
    for form in FORMATS:
        before = files(undisturbed[form])
        caplog.clear()
        with caplog.at_level("INFO", logger="fastppo"):
            run(folder, undisturbed[form], world, format=form, resume="auto")
        assert "there is nothing to do" in caplog.text and files(undisturbed[form]) == before


def cut(output: Path, lines: int, extra: int) -> None:
    """As a run that was killed while it wrote a batch."""
    path = output / "responses.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:lines]) + whole[lines][:extra])


@pytest.mark.parametrize(("lines", "extra"), [(0, 0), (0, 5), (6, 0), (13, 0), (15, 20), (43, 7)])
def test_a_torn_line_and_half_a_batch_are_done_again(folder, world, tmp_path, undisturbed, caplog, lines, extra):
    output = run(folder, tmp_path / "a", world)
    cut(output, lines, extra)
    with caplog.at_level("INFO", logger="fastppo"):
        run(folder, output, world, resume="auto")
    assert f"continuing after {lines // 6 * 6} of 44 responses" in caplog.text
    assert files(output) == files(undisturbed["jsonl"]) and metrics(output) == metrics(undisturbed["jsonl"])


def test_lines_that_are_not_the_rows_of_their_place_are_done_again(folder, world, tmp_path, undisturbed):
    output = run(folder, tmp_path / "a", world)
    path = output / "responses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[17] = b"\0" * (len(lines[17]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    run(folder, output, world, resume="auto")
    assert files(output) == files(undisturbed["jsonl"])


def test_parts_that_are_missing_are_made_again(folder, world, tmp_path, undisturbed):
    output = run(folder, tmp_path / "a", world, format="parquet")
    (output / "responses" / "part-00003.parquet").unlink()
    (output / "responses" / ".unfinished-part-00003.parquet").write_text("half")
    run(folder, output, world, format="parquet", resume="auto")
    assert files(output) == files(undisturbed["parquet"]) and metrics(output) == metrics(undisturbed["parquet"])


def test_a_new_run_moves_the_old_one_aside(folder, world, tmp_path):
    output = run(folder, tmp_path / "a", world)
    run(folder, output, world, seed=2)
    assert files(tmp_path / "a.1") and files(output) != files(tmp_path / "a.1")


def test_the_folder_of_another_run_is_moved_aside_and_any_other_refused(folder, world, tmp_path):
    other, mine = tmp_path / "a", tmp_path / "b"
    for place, name in ((other, "metrics.jsonl"), (mine, "thesis.txt")):
        place.mkdir()
        (place / name).write_text('{"step": 1}\n')
    run(folder, other, world, resume="auto")
    assert (tmp_path / "a.1" / "metrics.jsonl").is_file() and len(rows(other)) == 44
    with pytest.raises(RunFolderError, match="is not the folder of a run"):
        run(folder, mine, world, resume="auto")


def test_every_setting_is_free_or_compared_when_a_run_goes_on(folder, world, tmp_path):
    """Of those that change what is written, the first is enough: all go through one comparison."""
    output = run(folder, tmp_path / "a", world)
    cut(output, 7, 0)
    free = {*FREE, *ROUNDING, *GENERATE.root.free, *GENERATE.root.rounding}
    other = {"data.template": '{"a": 1}', "data.eval_path": None, "data.eval_split": None, "rewards": "[]"}
    other |= {
        "judge": rewards(folder, "length"),
        "sampling.stop_tokens": '["a"]',
        "rollout.engine": None,
        "rollout.vllm.arguments": None,
        "data.tools": None,
        "data.tool_format": None,
    }
    other |= {name: None for name in GENERATE.settings if name.startswith("rollout.") and name != "rollout.engine"}
    other |= {"model.path": f"{folder}/../{folder.name}/model", "data.path": f"{folder}/../{folder.name}/texts.jsonl"}
    config = parse(settings(folder, output), GENERATE)
    checked = 0
    for name, kind in GENERATE.settings.items():
        if any(name == setting for setting in free) or name.startswith(("rewards.", "judge.")):
            continue
        value = other.get(name, _another(config, name, kind))
        if value is None:
            continue
        changed = parse([*settings(folder, output, resume="auto"), f"--{name}", str(value)], GENERATE)
        with pytest.raises(CheckpointError, match=rf"^{name} is .*, but .* was made with"):
            generate.generate(changed, world)
        checked += 1
    assert checked >= 20


def _another(config: Any, name: str, kind: Any) -> Any:
    """Another valid value of a setting."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, bool):
        return str(not value).lower()
    choices = {"dtype": "bf16", "format": "parquet", "data.chat": "always", "data.too_long": "error"}
    if name in choices:
        return choices[name]
    if name == "data.first_tokens":
        return 3
    if name == "sampling.top_p":
        return 0.5
    if isinstance(value, int | float):
        return value + 1
    return 5 if "int" in str(kind) else "other"


def test_settings_that_change_nothing_may_change(folder, world, tmp_path, undisturbed):
    output = run(folder, tmp_path / "a", world)
    cut(output, 7, 0)
    run(folder, output, world, resume="auto", sampling__rows=8, microbatch_tokens=128, progress="never", timeout=99)
    assert files(output) == files(undisturbed["jsonl"])


def test_data_that_has_changed_since_is_refused(folder, world, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text((folder / "texts.jsonl").read_text())
    output = run(folder, tmp_path / "a", world, data__path=data)
    cut(output, 7, 0)
    for old, new in (('"prompt 3"', '"prompt three"'), ('"answer": 2', '"answer": 9')):
        data.write_text((folder / "texts.jsonl").read_text().replace(old, new))
        with pytest.raises(CheckpointError, match="was made with other data"):
            run(folder, output, world, data__path=data, resume="auto")


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_loses_nothing_that_was_written(folder, world, tmp_path, monkeypatch, undisturbed, form):
    output, calls, real = tmp_path / "a", iter(range(1, 1000)), os.fsync

    def full(handle: int) -> None:
        if next(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\).*--resume auto"):
            run(folder, output, world, format=form)
    there = rows(output)
    assert 0 < len(there) < 44 and there == rows(undisturbed[form])[: len(there)]
    run(folder, output, world, format=form, resume="auto")
    assert files(output) == files(undisturbed[form]) and metrics(output) == metrics(undisturbed[form])


def test_a_reward_that_fails_loses_nothing_that_was_written(folder, world, tmp_path, undisturbed, caplog):
    reward = folder / "reward.py"
    output, text = tmp_path / "a", reward.read_text()
    failing = tmp_path / "failing.py"
    failing.write_text(text + "\ncalls = iter(range(100))\nreal = letters\n")
    failing.write_text(
        failing.read_text()
        + "def letters(prompts, responses, **columns):\n"
        + "    if next(calls) == 3: raise ConnectionError('the service is down')\n"
        + "    return real(prompts, responses, **columns)\n"
    )
    source = json.dumps([{"function": f"{failing}:letters"}])
    with caplog.at_level("INFO", logger="fastppo"), pytest.raises(RewardError, match="the service is down"):
        run(folder, output, world, rewards=source)
    assert "18 of 44 responses are written; --resume auto continues" in caplog.text and len(rows(output)) == 18
    failing.write_text(text)
    run(folder, output, world, rewards=source, resume="auto")
    assert files(output) == files(undisturbed["jsonl"])


# Round trips


@pytest.mark.slow
@pytest.mark.parametrize(("data", "form"), [("texts", "jsonl"), ("chats", "parquet")])
def test_what_is_written_is_what_the_other_commands_read(folder, world, tmp_path, data, form):
    output = run(
        folder,
        tmp_path / "a",
        world,
        format="parquet" if form == "parquet" else "jsonl",
        data__path=folder / f"{data}.jsonl",
        sampling__min_new_tokens=3,
        sampling__samples_per_prompt=6,
    )
    path = output / ("responses.jsonl" if form == "jsonl" else "responses")
    prompts = [json.loads(line)["prompt"] for line in (folder / f"{data}.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows(output)[::6]] == (
        prompts if form == "jsonl" or data == "texts" else [[dict(m) for m in chat] for chat in prompts]
    )
    best_of_n.main([str(path), "--bootstrap", "100", "--keep", "best", "--output", str(tmp_path / "best.jsonl")])
    shared = ["--model.path", folder / "model", "--threads", 1, "--plan", "off", "--steps", 2, "--batch_size", 4]
    shared += ["--eval.examples", 4, "--data.max_tokens", 64, "--track.tensorboard", "false"]
    rated = ["--data.path", path, "--data.rating", "score", "--data.answer", "response"]
    for module, command, given in (
        (train_sft, SFT, ["--data.path", tmp_path / "best.jsonl"]),
        (train_dpo, DPO, rated),
        (train_reward, REWARD, rated),
    ):
        argv = [*shared, *given, "--output", tmp_path / command.name]
        module.train(parse([str(part) for part in argv], command), world)
    assert (tmp_path / "sft" / "model").is_dir() and (tmp_path / "dpo" / "model").is_dir()
    again = run(folder, tmp_path / "b", world, model__path=tmp_path / "dpo" / "model")
    assert len(rows(again)) == 44


# On two ranks


@pytest.fixture(scope="module")
def undisturbed_on_two(forks, folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    for form in FORMATS:
        forks.run(settings(folder, place / form, format=form), ranks=2, module="fastppo.generate")
    return {form: place / form for form in FORMATS}


@pytest.mark.parametrize("size", [6, 43])  # of 43: the last batch is one response, so that a rank has none
def test_one_and_two_ranks_write_the_same_rows(forks, folder, tmp_path, size):
    for ranks in (1, 2):
        made = settings(folder, tmp_path / str(ranks), rewards=rewards(folder, "length"), batch_size=size)
        forks.run(made, ranks=ranks, module="fastppo.generate")
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize("form", FORMATS)
def test_runs_that_are_killed_and_continued_write_what_an_undisturbed_one_writes(
    forks, folder, tmp_path, undisturbed_on_two, form
):
    output, chance = tmp_path / "a", random.Random(form)
    for kill in range(4):
        started = forks.start(
            settings(folder, output, format=form, resume="auto"),
            ranks=2,
            before=KILL.format(n=chance.randrange(2, 4), rank=kill % 2),
            module="fastppo.generate",
        )
        codes = forks.wait(started)
        assert -9 in codes and 0 not in codes, started.text()
    assert 0 < len(rows(output)) < 44
    # at any moment, once the ranks have met (before, DeepSpeed holds a lock that would outlive them)
    for _ in range(3):
        started = forks.start(settings(folder, output, format=form, resume="auto"), 2, "", "fastppo.generate")
        while not started.logs[0].exists() or "prompts" not in started.logs[0].read_text():
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.6))
        for pid in started.ranks:
            os.kill(pid, signal.SIGKILL)
        forks.wait(started)
    forks.run(settings(folder, output, format=form, resume="auto"), ranks=2, module="fastppo.generate")
    assert files(output) == files(undisturbed_on_two[form])
    assert metrics(output) == metrics(undisturbed_on_two[form])


@pytest.mark.parametrize("form", FORMATS)
def test_no_rank_waits_for_one_whose_disk_is_full(forks, folder, tmp_path, undisturbed_on_two, form):
    output = tmp_path / "a"
    started = forks.start(settings(folder, output, format=form), 2, before=FULL.format(n=7), module="fastppo.generate")
    assert forks.wait(started) == [1, 1], started.text()
    assert "No space left on device" in started.text() and "Traceback" not in started.text()
    forks.run(settings(folder, output, format=form, resume="auto"), ranks=2, module="fastppo.generate")
    assert files(output) == files(undisturbed_on_two[form])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_whole_batches_and_status_0(forks, folder, tmp_path, undisturbed_on_two, number):
    output = tmp_path / "a"
    started = forks.start(settings(folder, output), 2, before=SLOW, module="fastppo.generate")
    while not (output / "responses.jsonl").exists() or not (output / "responses.jsonl").stat().st_size:
        time.sleep(0.05)
    os.kill(started.ranks[0], number)
    assert forks.wait(started) == [0, 0], started.text()
    found = rows(output)
    assert 0 < len(found) < 44 and len(found) % 6 == 0 and "stopped by a signal" in started.text()
    forks.run(settings(folder, output, resume="auto"), ranks=2, module="fastppo.generate")
    assert files(output) == files(undisturbed_on_two["jsonl"])
