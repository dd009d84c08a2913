"""Whole ReST runs on tiny models, and what they leave behind."""

import json
import math

import pyarrow.parquet
import pytest
import rest_runs
import torch
import whole_runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.config.command_line import REST, parse
from fastppo.data.examples import load_texts
from fastppo.data.prompts import batches
from fastppo.data.scored_file import read_scored
from fastppo.data.tables import DataError
from fastppo.distributed.world import start_world
from fastppo.report.__main__ import main as report
from fastppo.rest.improves import batches_of_rows, learning_rate
from fastppo.rest.progress import Improved
from fastppo.rest.run import set_up
from fastppo.rest.selection import RestError
from fastppo.train_rest import train

pytestmark = pytest.mark.slow


PLAIN = """
def vowels(prompts, responses, **columns):
    return [sum(c in "aeiouAEIOU" for c in response) + len(response) / 10 for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("rest"))
    (folder / "plain.py").write_text(PLAIN)
    return folder


def run(folder, output, **changes):
    assert train(parse(rest_runs.settings(folder, output, **changes), REST), start_world(1))
    return output


@pytest.fixture(scope="module")
def trained(folder):
    changes = {"actor__train": "all", "actor__lr": 3e-3, "improve__epochs": 4, "optim__schedule": "constant"}
    return run(folder, folder / "out", steps=3, grow__prompts=24, **changes)


def plain(folder):
    """Rewards that draw no random numbers."""
    return json.dumps([{"function": f"{folder}/plain.py:vowels"}])


def weights(output):
    return load_file(output / "actor" / "model.safetensors")


def distance(one, other):
    return max(float((one[name].detach().double() - other[name].detach().double()).abs().max()) for name in one)


def test_the_score_rises_and_the_thresholds_with_it(trained):
    steps = [record for record in whole_runs.records(trained) if "score" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[-1]["score"] > steps[0]["score"] + 0.02
    for record in steps:
        assert record["improve1/threshold"] < record["improve2/threshold"]
        assert record["improve1/kept"] == 58 and record["improve2/kept"] == 29  # of 96
        assert record["tokens_trained"] > 0 and math.isfinite(record["improve1/loss"])


def test_the_reference_is_where_the_run_began(trained):
    first, second, *_ = [record for record in whole_runs.records(trained) if "score" in record]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 0.01


def test_every_grow_is_kept_as_scored_responses(trained):
    for step in (1, 2, 3):
        found = read_scored(trained / "grows" / f"step-{step:08d}", leave_out=())
        assert [len(rows) for rows in found.prompts] == [4] * 24
        table = found.table.columns
        assert all(len(t) == len(p) for t, p in zip(table["tokens"], table["logprobs"], strict=True))
        record = next(r for r in whole_runs.records(trained) if r["step"] == step and "score" in r)
        assert sum(table["score"]) / len(table["score"]) == pytest.approx(record["score"], abs=1e-6)


def test_a_report_shows_it(trained, capsys):
    report([str(trained)])
    page = (trained / "report.html").read_text()
    for shown in ("Threshold, Improve 2", "Responses learned from, Improve 1", "Entropy", "KL to the reference"):
        assert shown in page


def oracle(folder, output, config):
    """The fp64 parameters after the Improves of a first step, from the rows of its Grow, the order of the data alone
    being fastppo's."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    tokenizer, optim = AutoTokenizer.from_pretrained(folder / "model"), config.optim
    adam = torch.optim.AdamW(model.parameters(), lr=config.actor.lr, eps=optim.eps, betas=optim.betas, weight_decay=0)
    columns = read_scored(output / "grows/step-00000001", leave_out=()).table.columns
    grown = [(tokenizer(p)["input_ids"], t) for p, t in zip(columns["prompt"], columns["tokens"], strict=True)]
    texts = load_texts(config.mixture, tokenizer, context=None)
    given = [(t[:-n], t[-n:]) for t, n in zip(texts.tokens, texts.response_lengths.tolist(), strict=True)]
    done = 0
    for number, level in enumerate(config.improve.thresholds):
        threshold = sorted(columns["score"])[math.ceil(level * (len(grown) - 1))]
        kept = [row for row, score in zip(grown, columns["score"], strict=True) if score >= threshold]
        seed = (config.seed * 1_000_003 + 0) * 1_009 + number + 1
        responses = batches(range(len(kept)), size=6, seed=seed, shuffle=True)
        for _ in range(-(-2 * len(kept) // 6)):
            demonstrations = next(batches(range(6), size=2, seed=config.seed, shuffle=True, start=done))
            rows = [kept[i] for i in next(responses)] + [given[i] for i in demonstrations]
            adam.zero_grad()
            losses = [negative_logprobs(model, *row) for row in rows]
            torch.cat(losses).mean().backward()
            adam.step()
            done += 1
    return dict(model.named_parameters())


def negative_logprobs(model, prompt, response):
    logprobs = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_the_improves_of_a_step_are_those_of_an_fp64_oracle_on_1_and_2_ranks_in_any_packing(folder, forks, tmp_path):
    """With demonstrations mixed in."""
    (tmp_path / "given.jsonl").write_text("".join(f'{{"prompt": "p{i} ", "response": "r{i}"}}\n' for i in range(6)))
    mixed = {"mixture__path": tmp_path / "given.jsonl", "mixture__share": 0.25, "mixture__max_tokens": 30}
    changes = {"steps": 1, "actor__train": "all", "optim__dtype": "fp32", "optim__schedule": "constant", **mixed}
    changes |= {"optim__max_grad_norm": 0, "eval__prompts": 0, "eval__every": 0, "rewards": plain(folder)}
    start, expected = load_file(folder / "model" / "model.safetensors"), None
    for ranks, tokens in ((1, 400), (1, 40), (2, 40)):
        output = tmp_path / f"{ranks}-{tokens}"
        argv = rest_runs.settings(folder, output, improve__microbatch_tokens=tokens, **changes)
        forks.run(argv, ranks, module=rest_runs.MODULE)
        expected = expected or oracle(folder, output, parse(argv, REST))
        assert distance(start, expected) > 0.01
        assert distance(weights(output), expected) < 1e-5


@pytest.mark.parametrize("changes", [{"improve__microbatch_tokens": 400}, {"grow__batch_size": 32}, {"ranks": 2}])
def test_a_run_in_fp32_depends_on_neither_microbatches_nor_batches_nor_ranks(folder, forks, tmp_path, changes):
    fp32 = {"optim__dtype": "fp32", "zero__stage": 1, "steps": 1, "rewards": plain(folder)}
    for name, more in (("one", {}), ("other", dict(changes))):
        ranks = more.pop("ranks", 1)
        forks.run(rest_runs.settings(folder, tmp_path / name, **fp32, **more), ranks, module=rest_runs.MODULE)
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "other")) < 1e-5
    one, other = (read_scored(tmp_path / name / "grows/step-00000001", leave_out=()) for name in ("one", "other"))
    assert one.table.columns["tokens"] == other.table.columns["tokens"]


def test_the_judge_and_each_source_are_in_a_grow_and_not_learned_from(folder, tmp_path):
    two = json.dumps([*json.loads(plain(folder)), {"pattern": "a", "weight": 0.5}])
    alone = run(folder, tmp_path / "plain", steps=1, rewards=plain(folder))
    judged = run(folder, tmp_path / "judged", steps=1, rewards=plain(folder), health__judge=two)
    assert distance(weights(alone), weights(judged)) == 0
    assert "judge" in read_scored(judged / "grows/step-00000001").table.columns
    columns = read_scored(run(folder, tmp_path / "two", steps=1, rewards=two) / "grows/step-00000001").table.columns
    sums = [a + 0.5 * b for a, b in zip(columns["score/0"], columns["score/1"], strict=True)]
    assert columns["score"] == pytest.approx(sums)


def test_best_of_each_prompt_is_one_improve(folder, tmp_path):
    output = run(folder, tmp_path / "best", steps=1, improve__keep="best", improve__thresholds="null")
    record = next(r for r in whole_runs.records(output) if "score" in r)
    assert record["improve1/kept"] == 8 - record["equal_prompts"] and "improve2/kept" not in record
    assert record["improve1/threshold"] is None


def test_what_teaches_nothing_is_told(folder, tmp_path, caplog):
    """A pattern that matches every response of most prompts."""
    rewards = json.dumps([{"pattern": "[a-zA-Z]"}])
    caplog.set_level("INFO", logger="fastppo")
    train(parse(rest_runs.settings(folder, tmp_path / "told", steps=1, rewards=rewards), REST), start_world(1))
    record = next(r for r in whole_runs.records(tmp_path / "told") if "score" in r)
    assert record["equal_prompts"] >= 1
    assert f"all responses to each of {record['equal_prompts']:.0f} prompts have the same score" in caplog.text


def test_an_empty_improve_is_an_error_and_the_grow_is_kept(folder, tmp_path):
    nothing = {"improve__keep": "value", "improve__thresholds": "[0.0, 5.0]"}
    with pytest.raises(RestError, match="none of the 32 responses of this Grow scores above it: the highest score is"):
        train(parse(rest_runs.settings(folder, tmp_path / "out", **nothing), REST), start_world(1))
    assert len(read_scored(tmp_path / "out/grows/step-00000001").prompts) == 8


def test_demonstrations_are_their_share_of_each_update(folder, tmp_path, world_of_one):
    (tmp_path / "given.jsonl").write_text("".join(f'{{"prompt": "p{i} ", "response": "r{i}"}}\n' for i in range(6)))
    mixed = {"mixture__path": tmp_path / "given.jsonl", "mixture__share": 0.25, "mixture__max_tokens": 30}
    config = parse(rest_runs.settings(folder, tmp_path / "out", **mixed), REST)
    setup = set_up(config, world_of_one)
    now = Improved(kept=20, prompts=5, threshold=0.0)
    setup.progress.improves.append(now)
    rows = list(batches_of_rows(setup, now))
    assert len(rows) == 7 and all(len(batch) == 8 for batch in rows)  # 2 passes over 20 responses, 6 at a time
    given = [row - 20 for batch in rows for row in batch if row >= 20]
    assert len(given) == 14 and sorted(given[:12]) == sorted(2 * [*range(6)])
    kept = [row for batch in rows for row in batch if row < 20]
    assert sorted(kept[:40]) == sorted(2 * [*range(20)])
    now.updates, setup.progress.updates = 3, 3
    assert list(batches_of_rows(setup, now)) == rows[3:]
    setup.progress.step = 1
    assert [b for b in batches_of_rows(setup, now)] != rows[3:]


@pytest.fixture
def world_of_one():
    return start_world(1)


def test_demonstrations_change_what_is_learned(folder, tmp_path):
    (tmp_path / "given.jsonl").write_text("".join(f'{{"prompt": "p{i} ", "response": "r{i}"}}\n' for i in range(6)))
    mixed = {"mixture__path": tmp_path / "given.jsonl", "mixture__share": 0.5, "mixture__max_tokens": 30}
    without, other = run(folder, tmp_path / "plain", steps=1), run(folder, tmp_path / "mixed", steps=1, **mixed)
    assert distance(weights(without), weights(other)) > 1e-4


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_learning_rate_rises_falls_and_shrinks_from_improve_to_improve(schedule):
    argv = ["--actor.lr", "1.0", "--steps", "2", "--improve.lr_factor", "0.5", "--improve.thresholds", "[0.1, 0.2]"]
    argv += ["--optim.warmup_steps", "4", "--optim.schedule", schedule, "--actor.model", "m", "--data.path", "d"]
    config = parse([*argv, "--rewards", '[{"pattern": "a"}]'], REST)
    assert [learning_rate(config, u, 0, 0, u / 10) for u in range(4)] == [0.25, 0.5, 0.75, 1.0]
    falls = schedule == "linear"
    assert learning_rate(config, 9, 0, 0, 0.8) == pytest.approx(1 - 0.2 if falls else 1.0)
    assert learning_rate(config, 9, 0, 1, 0.0) == pytest.approx(0.5 * (1 - 0.25 if falls else 1.0))
    assert learning_rate(config, 99, 1, 1, 1.0) == pytest.approx(0.0 if falls else 0.5)


def test_parts_are_what_the_settings_ask_for(trained):
    parts = sorted((trained / "grows/step-00000002").iterdir())
    assert [path.name for path in parts] == [f"part-{i:05d}.parquet" for i in range(12)]
    assert all(pyarrow.parquet.read_metadata(path).num_rows == 8 for path in parts)
    assert torch.tensor(read_scored(trained / "grows/step-00000002").scores).shape == (24, 4)


def test_an_alarm_ends_the_run_at_the_checkpoint_from_before(folder, tmp_path):
    """The KL is 0 in the first Grow, and beyond the level in the second."""
    alarms = json.dumps([{"figure": "kl_sequence", "level": 1e-4, "action": "stop"}])
    same = {"rewards": plain(folder), "optim__schedule": "constant"}
    argv = rest_runs.settings(folder, tmp_path / "ended", steps=4, health__alarms=alarms, health__window=1, **same)
    config = parse(argv, REST)
    assert not train(config, start_world(1))
    (alarm,) = (json.loads(line) for line in (tmp_path / "ended/alarms.jsonl").read_text().splitlines())
    assert (alarm["figure"], alarm["step"], alarm["good"]) == ("kl_sequence", 2, 1)
    assert distance(weights(tmp_path / "ended"), weights(run(folder, tmp_path / "one step", steps=1, **same))) == 0


def test_data_that_a_grow_cannot_hold_is_refused_before_models_load(folder, tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "b"}]
    monkeypatch.setattr("fastppo.online.run.assemble", lambda *_: pytest.fail("models were loaded"))
    monkeypatch.setattr("fastppo.generation.parts.prompt_values", lambda data: ["a", chat])
    config = parse(rest_runs.settings(folder, tmp_path / "out", eval__prompts=0, eval__every=0), REST)
    with pytest.raises(DataError, match="the prompts cannot be one column of Parquet"):
        train(config, start_world(1))
