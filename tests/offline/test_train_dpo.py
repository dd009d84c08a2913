"""Runs of DPO: each update against an fp64 oracle, the reference and its place in checkpoints, and mistakes."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import stage_runs
import torch
import torch.nn.functional as F
import whole_runs
from safetensors.torch import load_file
from stage_runs import evaluations, records
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import train_dpo
from fastppo.checkpoint.resume import CheckpointError
from fastppo.config.command_line import DPO, parse
from fastppo.config.health import QUIET_STEPS
from fastppo.data.examples import Examples, load_pairs
from fastppo.data.prompts import batches
from fastppo.data.tables import DataError
from fastppo.distributed.world import start_world
from fastppo.models.frozen_prefix import PrefixStates
from fastppo.offline import reference as reference_module
from fastppo.offline.dpo import DPO_STATISTICS, direct_preference, watching_chosen
from fastppo.offline.loop import set_up
from fastppo.offline.model import assemble
from fastppo.offline.reference import ReferenceLogprobs, answer_logprobs
from fastppo.offline.updates import Training, microbatches_of, update
from fastppo.report.page import page
from fastppo.report.run import read_runs

pytestmark = pytest.mark.slow

LOG2 = 0.6931471805599453
ROWS = [3, 1, 12, 7, 20, 9, 15, 4]
# Adam with a large eps takes steps in proportion to the gradient; with a small one a step has its sign, which rounding
# can turn where the gradient is 0.
SMOOTH: dict[str, Any] = {"optim__eps": 1.0, "optim__max_grad_norm": 0, "model__lr": 1.0, "beta": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stage_runs.prepare(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def world():
    return start_world(1)


def settings(folder: Path, **changes: Any) -> list[str]:
    return stage_runs.settings(folder, "pairs", **{"eval__every": 0, "patience": "null"} | changes)


def load(folder: Path, heldout: int = 0) -> tuple[Examples, Examples]:
    config = parse(settings(folder), DPO)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return load_pairs(config.data, tokenizer, heldout=heldout, context=None, closed=False)


def sums_of(model: Any, pairs: Examples, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed logprobs and lengths of these pairs' answers, (P, 2), by transformers, one sequence at a time."""
    sums, lengths = [], []
    for sequence in pairs.sequences(torch.tensor(rows)).tolist():
        tokens, length = torch.tensor([pairs.tokens[sequence]]), int(pairs.packed.response_lengths[sequence])
        logprobs = model(tokens).logits[0, -length - 1 : -1].log_softmax(-1)
        sums.append(logprobs.gather(1, tokens[0, -length:, None]).sum())
        lengths.append(length)
    return torch.stack(sums).view(-1, 2), torch.tensor(lengths).view(-1, 2)


def oracle_loss(policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, config: Any) -> torch.Tensor:
    """Written anew, from the papers."""
    if config.loss == "ipo":
        policy_means, reference_means = policy / lengths, reference / lengths
        gap = (policy_means - reference_means)[:, 0] - (policy_means - reference_means)[:, 1]
        losses = (gap - 0.5 / config.beta) ** 2
    else:
        gap = config.beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
        losses = (1 - config.label_smoothing) * F.softplus(-gap) + config.label_smoothing * F.softplus(gap)
    return losses - config.nll_coef * policy[:, 0] / lengths[:, 0]


def oracle(folder: Path, config: Any, todo: list[list[int]], heldout: int) -> dict[str, torch.Tensor]:
    """The fp64 parameters after an update on each of these batches."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    pairs, _ = load(folder, heldout)
    optim = config.optim
    adam = torch.optim.AdamW(
        model.parameters(), lr=config.model.lr, eps=optim.eps, betas=optim.betas, weight_decay=optim.weight_decay
    )
    with torch.no_grad():
        references = [sums_of(model, pairs, rows)[0] for rows in todo]
    for rows, reference in zip(todo, references, strict=True):
        adam.zero_grad()
        oracle_loss(*_with(reference, *sums_of(model, pairs, rows)), config).mean().backward()
        adam.step()
    return dict(model.named_parameters())


def _with(reference: torch.Tensor, sums: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sums, reference, lengths


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].detach().double() - other[name].detach().double()).abs().max()) for name in one)


@pytest.mark.parametrize(
    "loss",
    [{}, {"label_smoothing": 0.1, "nll_coef": 0.3}, {"loss": "ipo", "nll_coef": 0.2}],
    ids=["dpo", "smoothed with NLL", "ipo with NLL"],
)
def test_two_updates_are_those_of_an_fp64_oracle_on_1_and_2_ranks_in_any_packing(folder, forks, tmp_path, loss):
    """The second update has margins; it is on the pairs that follow in the data's order."""
    changes = {**SMOOTH, **loss, "optim__schedule": "constant", "steps": 2, "eval__examples": 0, "batch_size": 8}
    config = parse(settings(folder, **changes), DPO)
    pairs, _ = load(folder)
    todo = list(islice(batches(pairs, size=8, seed=config.seed, shuffle=True), 2))
    expected = oracle(folder, config, todo, 0)
    start = load_file(folder / "model/model.safetensors")
    assert distance(start, expected) > 0.05
    for ranks, more in ((1, {"microbatch_tokens": 10_000}), (1, {"microbatch_tokens": 45}), (2, {})):
        output = tmp_path / f"{ranks}-{more.get('microbatch_tokens')}"
        forks.run(settings(folder, output=output, **changes, **more), ranks, module="fastppo.train_dpo")
        assert distance(load_file(output / "model" / "model.safetensors"), expected) < 1e-5


def test_an_update_depends_on_neither_microbatch_size_nor_order_nor_packing(folder, world):
    """Against any reference, which here is far from the policy."""
    pairs, _ = load(folder)
    reference = 3 * torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 50
    seen = []
    for rows, tokens in ((ROWS, 10_000), (ROWS, 45), (ROWS[::-1], 90)):
        config = parse(settings(folder, **SMOOTH, microbatch_tokens=tokens), DPO)
        trained = assemble(config, world, AutoTokenizer.from_pretrained(folder / "model"))
        objective = direct_preference(config, reference)
        fixed = {"normalizer": len(rows), "rate": config.model.lr, "step": 0, "skipped": 0, "world": world}
        done = update(trained, pairs, rows, objective, PrefixStates(), config, **fixed)
        seen.append(({name: p.detach().clone() for name, p in trained.role.named_parameters()}, done.sums))
    for parameters, sums in seen[1:]:
        assert distance(seen[0][0], parameters) < 1e-5
        torch.testing.assert_close(sums, seen[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__train": 1},  # a frozen prefix
        {"optim__dtype": "bf16"},
        {"optim__activation_checkpointing": "true"},
        {"model__lora__rank": 4},
        {"epochs": 3, "batch_size": 7},  # batches that end one pass and begin the next
    ],
    ids=["all", "prefix", "bf16", "checkpointed", "lora", "ragged"],
)
def test_every_margin_of_the_first_update_is_exactly_0_and_the_log_says_so(folder, world, tmp_path, changes, caplog):
    caplog.set_level(logging.INFO, "fastppo")
    config = parse(settings(folder, output=tmp_path / "out", eval__every=2, **changes), DPO)
    reference = ReferenceLogprobs(world)
    setup = set_up(config, world, load_pairs, saved={"reference": reference})
    reference.compute(setup)
    assert bool(reference.known.all()) and bool((reference.heldout < 0).all())
    for part in microbatches_of(next(setup.order), setup.examples, config, world):
        packed, states = setup.trained.select(setup.examples, part, setup.prefix)
        ask = lambda policy, hidden, packed=packed: answer_logprobs(policy, hidden, packed)  # noqa: E731
        assert setup.trained.engine(packed, ask, states).view(-1, 2).equal(reference.training[part])
    shutil.rmtree(tmp_path / "out")
    train_dpo.train(config, world)
    first = next(record for record in records(tmp_path / "out") if record.get("step") == 1 and "loss" in record)
    assert abs(first["loss"] - LOG2) < 1e-6 and first["margin"] == first["reward_chosen"] == first["kl"] == 0
    assert evaluations(tmp_path / "out")[0]["eval/loss"] == pytest.approx(LOG2, abs=1e-12)
    assert "before the first update every margin is 0, and the mean loss 0.693147" in caplog.text
    assert "should be" not in caplog.text


def test_a_reference_that_is_not_the_start_is_told(folder, world, tmp_path, caplog, monkeypatch):
    real = reference_module.answer_logprobs

    def shifted(policy, hidden, packed):
        return real(policy, hidden, packed) + 1e-3 * torch.rand(1).double()

    monkeypatch.setattr(reference_module, "answer_logprobs", shifted)
    train_dpo.train(parse(settings(folder, output=tmp_path / "out", steps=1), DPO), world)
    assert "before the first update the mean loss is 0.69" in caplog.text and "should be 0.693147181" in caplog.text


@pytest.fixture(scope="module")
def trained(folder, world):
    changes = {"epochs": 3, "eval__every": 4, "checkpoint__every": 5, "batch_size": 14, "model__lr": 1e-3}
    argv = settings(folder, output=folder / "straight", **changes)
    train_dpo.train(parse(argv, DPO), world)
    return folder / "straight", argv


def test_it_learns_and_its_held_out_figures_are_those_of_transformers_logprobs(folder, trained):
    output, argv = trained
    before, *_, after = evaluations(output)
    assert after["eval/loss"] < before["eval/loss"] and after["eval/accuracy"] > 0.9 > before["eval/accuracy"] == 0.5
    _, pairs = load(folder, heldout=32)
    best = min(evaluations(output)[1:], key=lambda record: record["eval/loss"])
    config, rows = parse(argv, DPO), list(range(32))
    with torch.no_grad():
        (reference, lengths), (policy, _) = (
            sums_of(AutoModelForCausalLM.from_pretrained(path).double(), pairs, rows)
            for path in (folder / "model", output / "model")
        )
    ratios = policy - reference
    expected = {
        "loss": float(oracle_loss(policy, reference, lengths, config).mean()),
        "reward_chosen": config.beta * float(ratios[:, 0].mean()),
        "reward_rejected": config.beta * float(ratios[:, 1].mean()),
        "margin": config.beta * float((ratios[:, 0] - ratios[:, 1]).mean()),
        "accuracy": float((ratios[:, 0] > ratios[:, 1]).double().mean()),
        "kl": -float(ratios.mean()),
        "logprob_chosen": float((policy / lengths)[:, 0].mean()),
        "logprob_chosen_change": float((ratios / lengths)[:, 0].mean()),
    }
    assert {name: best[f"eval/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert best["eval/accuracy_low"] < best["eval/accuracy"] <= best["eval/accuracy_high"]


def test_it_resumes_bit_for_bit_with_the_reference_of_its_start(folder, world, trained, monkeypatch):
    """In the second of three passes: a reference computed anew would be that of a trained model."""
    output, argv = trained
    broken = shutil.copytree(output, folder / "broken")
    shutil.rmtree(broken / "model")
    for later in sorted((broken / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    monkeypatch.setattr(ReferenceLogprobs, "_compute_training", lambda *args: pytest.fail("it is in the checkpoint"))
    train_dpo.train(parse([*argv, "--output", str(broken), "--resume", "auto", "--chosen_fall", "9"], DPO), world)
    assert records(broken) == records(output)
    exports = [load_file(path / "model" / "model.safetensors") for path in (output, broken)]
    assert whole_runs.same(*exports) and whole_runs.same(*map(whole_runs.state, (output, broken)))
    assert any(name.startswith("reference/") for name in whole_runs.state(broken))
    with pytest.raises(CheckpointError, match=r"beta is 0.3, but .* was made with 0.1"):
        train_dpo.train(parse([*argv, "--output", str(broken), "--resume", "auto", "--beta", "0.3"], DPO), world)


# Tells the last rank to stop at the nth microbatch of the reference's pass and of training.
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


def test_a_run_on_two_ranks_that_stops_anywhere_and_goes_on_equals_the_one_that_did_not(folder, forks):
    changes = {"checkpoint__every": 4, "resume": "auto", "microbatch_tokens": 90, "model__train": 1, "eval__every": 4}
    changes |= {"optim__dtype": "bf16", "zero__stage": 2}
    straight, broken = folder / "two-straight", folder / "two-broken"
    forks.run(settings(folder, output=straight, **changes), 2, module="fastppo.train_dpo")
    argv = settings(folder, output=broken, **changes)
    for n in (4, 20, 5):  # in the reference's pass, in training, and soon after it goes on
        forks.run(argv, 2, STOP_AT.format(n=n), module="fastppo.train_dpo")
    assert list(broken.glob("checkpoints/step-*")) and not list(broken.glob("checkpoints/step-00000008"))
    forks.run(argv, 2, module="fastppo.train_dpo")
    assert records(straight) == records(broken)
    exports = [load_file(output / "model/model.safetensors") for output in (straight, broken)]
    assert whole_runs.same(*exports) and whole_runs.same(*map(whole_runs.state, (straight, broken)))


def test_a_run_at_stage_3_leaves_what_one_without_zero_leaves(folder, forks):
    """One rank has a held-out microbatch more than the other, and its parameters are split all the same."""
    split = folder / "split.json"
    split.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    exports, losses = [], []
    for stage, changes in ((0, {}), (3, {"zero__deepspeed": split, "zero__offload": "cpu"})):
        output = folder / f"stage-{stage}"
        fixed = {"steps": 2, "eval__examples": 3, "eval__every": 1, "microbatch_tokens": 2 * stage_runs.LONGEST}
        argv = settings(folder, output=output, zero__stage=stage, **fixed, **SMOOTH, **changes)
        run = forks.start(argv, 2, module="fastppo.train_dpo")
        assert forks.wait(run) == [0, 0], run.text()
        assert "before the first update every margin is 0" in run.text()
        exports.append(load_file(output / "model" / "model.safetensors"))
        losses.append([record["eval/loss"] for record in evaluations(output)])
    assert distance(*exports) < 2e-5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(LOG2, abs=1e-9) and losses[0][-1] < LOG2 - 1e-3


def test_adapters_at_stage_3_on_two_ranks_begin_at_the_reference(folder, forks, tmp_path):
    changes = {"zero__stage": 3, "model__lora__rank": 4, "steps": 2, "eval__examples": 3, "eval__every": 1}
    run = forks.start(settings(folder, output=tmp_path / "out", **changes), 2, module="fastppo.train_dpo")
    assert forks.wait(run) == [0, 0], run.text()
    assert "before the first update every margin is 0" in run.text()


def test_a_run_with_more_steps_than_it_had_is_the_one_that_had_them_from_its_start(folder, world, tmp_path):
    """The new steps reach pairs that the first did not; the reference of these is not the model that resumes."""
    fixed = {"optim__schedule": "constant", "checkpoint__every": 2, "batch_size": 8, "eval__examples": 8}
    short = settings(folder, output=tmp_path / "short", **fixed, steps=2)
    train_dpo.train(parse(short, DPO), world)
    train_dpo.train(parse([*short, "--steps", "4", "--resume", "auto"], DPO), world)
    train_dpo.train(parse([*short, "--steps", "4", "--output", str(tmp_path / "whole")], DPO), world)
    assert whole_runs.same(
        *(
            whole_runs.state(tmp_path / output)["model/mp_rank_00_model_states.pt"]["module"]
            for output in ("short", "whole")
        )
    )
    assert whole_runs.same(
        *(whole_runs.state(tmp_path / output)["reference/logprobs.pt"] for output in ("short", "whole"))
    )


def test_of_pairs_that_no_update_sees_nothing_is_computed(folder, world, tmp_path):
    """With a rate that falls to 0 at the last step there can be no further steps."""
    argv = settings(
        folder, output=tmp_path / "out", optim__schedule="linear", checkpoint__every=2, batch_size=8, steps=2
    )
    train_dpo.train(parse(argv, DPO), world)
    known = whole_runs.state(tmp_path / "out")["reference/logprobs.pt"]["known"]
    assert int(known.sum()) == 16 < len(known)


def test_a_batch_with_a_pair_twice_has_one_reference_for_it(folder, world, tmp_path):
    changes = {"data__limit": 13, "batch_size": 20, "eval__examples": 4, "steps": 2, "microbatch_tokens": 45}
    train_dpo.train(parse(settings(folder, output=tmp_path / "out", checkpoint__every=2, **changes), DPO), world)
    reference = whole_runs.state(tmp_path / "out")["reference/logprobs.pt"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = parse(settings(folder, output=tmp_path / "out", **changes), DPO)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs, heldout = load_pairs(config.data, tokenizer, heldout=4, context=None, closed=False)
    for examples, found in ((pairs, reference["training"]), (heldout, reference["heldout"])):
        with torch.no_grad():
            expected, _ = sums_of(model, examples, list(range(len(examples))))
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-4)


def test_a_fall_of_the_chosen_answers_is_an_alarm_with_what_helps(world, folder):
    watch = watching_chosen(parse(settings(folder), DPO), world)
    means = dict.fromkeys(DPO_STATISTICS, 0.0) | {"loss": LOG2}
    progress, alarms = Training(), []
    for step in range(1, 30):
        change = -0.4 if step in (1, 2, 20, 21, 22) else -0.6
        found = progress.alarms(watch(step, means | {"logprob_chosen_change": change, "logprob_chosen": -2.6}))
        progress.end_step(0)
        alarms += found
    assert [(alarm.step, alarm.good) for alarm in alarms] == [(3, 2), (13, 2), (23, 22)]
    first = alarms[0]
    assert (first.figure, first.value, first.threshold) == ("logprob_chosen_change", -0.6, -0.5)
    assert (first.level, first.action) == ("warn", None)
    for part in ("the chosen", "by 0.60 nats a token (to -2.60)", "chosen_fall 0.5", "nll_coef (0)"):
        assert part in first.message
    silent = watching_chosen(parse(settings(folder, chosen_fall="null"), DPO), world)
    assert silent(5, means | {"logprob_chosen_change": -9.0}) == []


def test_a_run_that_makes_chosen_answers_unlikely_raises_alarms_and_so_does_it_resumed(folder, world, tmp_path, caplog):
    """What the rejected answers lose, the chosen ones lose with them, since both have the same tokens. The run resumes
    while the alarm rests."""
    rows = [{"prompt": f"say {i}", "chosen": "a", "rejected": "a" * (6 + i % 3)} for i in range(48)]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__path": tmp_path / "alike.jsonl", "data__eos": "false", "chosen_fall": 0.2, "eval__examples": 0}
    argv = settings(folder, output=tmp_path / "out", steps=16, checkpoint__every=8, **changes)
    train_dpo.train(parse(argv, DPO), world)
    lines = [json.loads(line) for line in (tmp_path / "out/alarms.jsonl").read_text().splitlines()]
    assert 1 < lines[0]["step"] <= 6 and [line["step"] for line in lines[1:]] == [lines[0]["step"] + QUIET_STEPS]
    assert lines[0]["good"] == lines[0]["step"] - 1
    assert f"step {lines[0]['step']}: the chosen answers' mean logprob has fallen by" in caplog.text
    shown = page(read_runs([tmp_path / "out"]))
    assert "more than chosen_fall 0.2" in shown and "#alarm-0-0" in shown
    broken = shutil.copytree(tmp_path / "out", tmp_path / "broken")
    shutil.rmtree(broken / "model")
    shutil.rmtree(broken / "checkpoints/step-00000016")
    train_dpo.train(parse([*argv, "--output", str(broken), "--resume", "auto"], DPO), world)
    assert (broken / "alarms.jsonl").read_text() == (tmp_path / "out/alarms.jsonl").read_text()
    assert records(broken) == records(tmp_path / "out")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (["--beta", "0"], "beta is 0.0; it must be greater than 0."),
        (["--beta", "-1"], "beta is -1.0; it must be greater than 0."),
        (["--label_smoothing", "0.5"], "label_smoothing is 0.5; it must be 0 or more and less than 0.5."),
        (["--label_smoothing", "-0.1"], "label_smoothing is -0.1; it must be 0 or more and less than 0.5."),
        (["--label_smoothing", "0.1", "--loss", "ipo"], "label_smoothing is 0.1 and loss ipo"),
        (["--nll_coef", "-1"], "nll_coef is -1.0; it must be 0 or more."),
        (["--chosen_fall", "0"], "chosen_fall is 0.0; it must be greater than 0."),
        (["--loss", "kto"], "loss is kto; it must be dpo or ipo."),
        (["--data.margin", "m"], "data.margin is m, but margins of pairs are for reward models"),
        (["--data.rejected", "chosen"], "data.chosen and data.rejected are both chosen"),
        (["--model.train", "head"], "model.train is head, which is for reward models"),
    ],
)
def test_a_mistake_in_the_settings_is_named(folder, mistake, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*settings(folder), *mistake], DPO)
    assert words in capsys.readouterr().err


def test_pairs_with_equal_answers_are_dropped_or_an_error(folder, world, tmp_path, caplog):
    rows = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(9)]
    (tmp_path / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__path": tmp_path / "equal.jsonl", "steps": 1, "batch_size": 2, "eval__examples": 2}
    train_dpo.train(parse(settings(folder, output=tmp_path / "out", **changes), DPO), world)
    assert "dropped 1 of 9 examples: 1 (the two answers are equal)" in caplog.text
    config = parse(settings(folder, output=tmp_path / "error", data__unusable="error", **changes), DPO)
    with pytest.raises(DataError, match=r"line 1, .*: the two answers are equal. Remove the row"):
        train_dpo.train(config, world)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (
            [("yes", "yes")] * 9,
            {},
            r"no usable example: 9 \(the two answers are equal\). Correct the rows, or name other c",
        ),
        (
            [("yes", "no" * 60)] * 9,
            {},
            r"no usable example: 9 \(longer than data.max_tokens 20\). Raise data.max_tokens, or",
        ),
        (
            [("yes", "no" * 60)] * 9,
            {"data__max_tokens": 129, "microbatch_tokens": 258},
            r"data.max_tokens is 129, but the model's context holds 128 tokens. Set it to 128 or less",
        ),
    ],
    ids=["equal answers", "longer than allowed", "longer than the context"],
)
def test_pairs_from_which_nothing_can_be_learned_are_an_error(folder, world, tmp_path, rows, changes, words):
    lines = [json.dumps({"prompt": f"say {i}", "chosen": a, "rejected": b}) for i, (a, b) in enumerate(rows)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    argv = settings(folder, output=tmp_path / "out", data__path=tmp_path / "bad.jsonl", eval__examples=2, **changes)
    with pytest.raises(DataError, match=words):
        train_dpo.train(parse(argv, DPO), world)
    assert not (tmp_path / "out").exists()


def test_a_chat_answer_ends_as_responses_of_ppo_do(folder, tmp_path):
    """With the token that ends a turn, and without what a template writes after it, which no response has."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {"prompt": "say", "chosen": "yes", "rejected": "no"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row | {"chosen": "yes" * i}) + "\n" for i in range(1, 4)))
    argv = settings(folder, data__path=tmp_path / "chat.jsonl", data__chat="always", data__max_tokens=50)
    config = parse(argv, DPO)
    found = {}
    for closed in (True, False):
        pairs, _ = load_pairs(config.data, tokenizer, heldout=0, context=None, closed=closed)
        found[closed] = {tokenizer.decode(tokens[-3:]) for tokens in pairs.tokens}
    assert found == {True: {"s<eos>\n", "o<eos>\n"}, False: {"es<eos>", "no<eos>"}}
