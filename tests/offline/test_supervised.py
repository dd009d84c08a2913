"""Updates of SFT and reward modelling: the same for any packing, and for a run that was broken off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import torch
import whole_runs
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastppo import train_reward, train_sft
from fastppo.config.command_line import REWARD, SFT, parse
from fastppo.data.examples import load_answers, load_pairs
from fastppo.distributed.world import World, start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.offline.model import assemble
from fastppo.offline.reward_modelling import bradley_terry
from fastppo.offline.sft import negative_logprob
from fastppo.offline.updates import Training, update

COMMANDS = {"pairs": "fastppo.train_reward", "answers": "fastppo.train_sft"}
ROWS = [3, 1, 12, 7, 20, 9, 15, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def updated(
    folder: Path, kind: str, world: World, rows: Sequence[int] = ROWS, **changes: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parameters after one update on these examples, and its sums."""
    argv = stage_runs.settings(folder, kind, margin=0.3, **changes) if kind == "pairs" else None
    argv = argv or stage_runs.settings(folder, kind, **changes)
    config = parse(argv, REWARD if kind == "pairs" else SFT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trained = assemble(config, world, tokenizer)
    load = load_pairs if kind == "pairs" else load_answers
    examples, _ = load(config.data, trained.tokenizer, heldout=0, context=None)
    objective = bradley_terry(config) if kind == "pairs" else negative_logprob
    count = len(rows) if kind == "pairs" else int(examples.response_lengths[list(rows)].sum())
    done = update(
        trained,
        examples,
        rows,
        objective,
        PrefixStates(),
        config,
        normalizer=count,
        rate=config.model.lr,
        step=0,
        skipped=0,
        world=world,
    )
    return {name: p.detach().clone() for name, p in trained.role.named_parameters()}, done.sums


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_update_depends_on_neither_microbatch_size_nor_order_nor_packing(folder, world, kind):
    whole, sums = updated(folder, kind, world, microbatch_tokens=10_000)
    for changes in ({"microbatch_tokens": 45}, {"rows": ROWS[::-1]}, {"microbatch_tokens": 90}):
        other, other_sums = updated(folder, kind, world, **{"microbatch_tokens": 10_000} | changes)
        assert difference(whole, other) < 2e-5
        torch.testing.assert_close(sums, other_sums, rtol=1e-5, atol=1e-5)
    still, _ = updated(folder, kind, world, model__lr=0.0)
    assert difference(whole, still) > 1e-3


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_is_the_same_on_one_and_two_ranks(folder, forks, kind):
    exports, losses = [], []
    for ranks in (1, 2):
        output = folder / f"{kind}-on-{ranks}"
        argv = stage_runs.settings(folder, kind, output=output, steps=3, eval__every=0, model__lr=3e-4)
        forks.run(argv, ranks, module=COMMANDS[kind])
        (path,) = output.glob("*/model.safetensors")
        exports.append(load_file(path))
        losses.append([record.get("loss", record.get("eval/loss")) for record in stage_runs.records(output)])
    assert difference(*exports) < 5e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_at_stage_3_leaves_what_one_without_zero_leaves(folder, forks, kind):
    """One rank has a held-out microbatch more than the other, and its parameters are split all the same."""
    split = folder / "split.json"
    split.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    exports, losses = [], []
    for stage, changes in ((0, {}), (3, {"zero__deepspeed": split, "zero__offload": "cpu"})):
        output = folder / f"{kind}-at-stage-{stage}"
        fixed = {"steps": 2, "eval__examples": 3, "eval__every": 1, "microbatch_tokens": 2 * stage_runs.LONGEST}
        argv = stage_runs.settings(folder, kind, output=output, zero__stage=stage, **fixed, **changes)
        forks.run(argv, 2, module=COMMANDS[kind])
        (path,) = output.glob("*/model.safetensors")
        exports.append(load_file(path))
        losses.append([record["eval/loss"] for record in stage_runs.evaluations(output)])
    assert exports[0].keys() == exports[1].keys() and difference(*exports) < 2e-4
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("kind", COMMANDS)
def test_adapters_alone_train_and_are_merged_in_the_export(folder, world, tmp_path, kind):
    """What transformers reads has the names and shapes of the model, and differs where adapters were."""
    train = train_reward.train if kind == "pairs" else train_sft.train
    changes = {"model__lora__rank": 4, "model__lora__targets": "up_proj", "model__train": 1, "eval__every": 0}
    argv = stage_runs.settings(folder, kind, output=tmp_path / "out", steps=4, model__lr=1e-2, **changes)
    train(parse(argv, REWARD if kind == "pairs" else SFT), world)
    (path,) = (tmp_path / "out").glob("*/model.safetensors")
    start, end = load_file(folder / "model/model.safetensors"), load_file(path)
    changed = {name for name in start if name in end and not torch.equal(start[name], end[name])}
    last = max(int(name.split(".")[2]) for name in start if ".layers." in name)
    assert changed == {f"model.layers.{last}.mlp.up_proj.weight"}
    assert set(end) - set(start) == ({"score.weight"} if kind == "pairs" else set())
    before, after = (record["eval/loss"] for record in stage_runs.evaluations(tmp_path / "out"))
    assert after < before


# Tells the last rank to stop at the nth microbatch of training.
STOP_AT = """
import os
from fastppo.distributed import stop

real, count = stop.check, iter(range(1, 1_000_000))

def place(*world):
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and next(count) >= {n}:
        stop._watch.asked.set()
    real(*world)

stop.check = place
"""


@pytest.mark.parametrize(
    ("kind", "ranks", "changes"),
    [
        ("pairs", 2, {"optim__dtype": "bf16", "model__train": 1, "zero__stage": 2}),  # prefixes are kept over epochs
        ("answers", 1, {"model__train": 2}),
    ],
)
def test_a_run_that_stops_anywhere_and_goes_on_equals_the_one_that_did_not(folder, forks, kind, ranks, changes):
    straight, broken = folder / f"{kind}-straight", folder / f"{kind}-broken"
    changes = {"checkpoint__every": 4, "resume": "auto", "microbatch_tokens": 90, **changes}
    forks.run(stage_runs.settings(folder, kind, output=straight, **changes), ranks, module=COMMANDS[kind])
    argv = stage_runs.settings(folder, kind, output=broken, **changes)
    for n in (6, 3):
        forks.run(argv, ranks, STOP_AT.format(n=n), module=COMMANDS[kind])
    assert not list(broken.glob("checkpoints/step-00000008"))
    forks.run(argv, ranks, module=COMMANDS[kind])
    assert stage_runs.records(straight) == stage_runs.records(broken)
    exports = [load_file(next(output.glob("*/model.safetensors"))) for output in (straight, broken)]
    assert whole_runs.same(*exports) and whole_runs.same(*map(whole_runs.state, (straight, broken)))


def test_other_data_and_other_evaluations_are_not_resumed(folder, forks):
    output = folder / "refused"
    argv = stage_runs.settings(folder, "answers", output=output, steps=2, checkpoint__every=2, resume="auto")
    forks.run(argv, module="fastppo.train_sft")
    for more, words in (
        (["--eval.every", "1"], "eval.every is 1, but"),
        (["--data.limit", "64"], "data.limit is 64, but"),
    ):
        run = forks.start([*argv, *more], module="fastppo.train_sft")
        assert forks.wait(run) == [1] and words in run.text() and "Traceback" not in run.text()


def test_patience_counts_evaluations_without_a_lower_loss():
    run = Training.begin(seed=1, rank=0)
    assert not run.add_evaluation(1.5) and run.score is None  # of the model as it came
    for loss, better, done in ((1.2, True, False), (1.3, False, False), (1.1, True, False), (1.1, False, False)):
        run.end_step(skipped=0)
        assert (run.add_evaluation(loss), run.is_done(2)) == (better, done)
    run.end_step(skipped=0)
    assert not run.add_evaluation(float("nan"))
    assert run.is_done(2) and not run.is_done(None) and (run.best, run.best_step) == (1.1, 3)
    again = Training.begin(seed=2, rank=0)
    again.restore(run.state(), run.random)
    assert dataclasses.asdict(again).keys() == dataclasses.asdict(run).keys() and again.state() == run.state()


def test_patience_counts_evaluations_of_a_model_worse_than_its_start_though_the_best_is_left():
    run = Training.begin(seed=1, rank=0)
    run.add_evaluation(1.0)
    for loss, better, done in ((7.0, True, False), (6.0, True, True)):
        run.end_step(skipped=0)
        assert (run.add_evaluation(loss), run.is_done(2)) == (better, done)
