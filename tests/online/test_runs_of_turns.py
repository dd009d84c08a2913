"""Whole runs with an environment whose rewards are the only ones, and what they leave of conversations."""

import json

import generated
import pytest
import rest_runs
import tiny
import whole_runs

from fastppo import generate, train, train_rest
from fastppo.config import PtxConfig
from fastppo.config.command_line import GENERATE, PPO, REST, parse
from fastppo.data import load_texts, read_scored
from fastppo.distributed.world import start_world
from fastppo.monitor import read_lines
from fastppo.report.page import page
from fastppo.report.run import read_runs

TALK = """
def talk(turn, seed):
    return None if turn == seed % 3 else f" {turn}?", turn - 0.5
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = whole_runs.prepare(tmp_path_factory.mktemp("runs"))
    (place / "talk.py").write_text(TALK)
    return place


def environment(folder):
    return {
        "rewards": "[]",
        "rollout__environment": f"{folder}/talk.py:talk",
        "rollout__turn_tokens": 3,
        "sampling__max_new_tokens": 16,
    }


@pytest.fixture(scope="module")
def ppo(folder):
    output = folder / "ppo"
    train.train(parse(whole_runs.settings(folder, output, steps=2, **environment(folder)), PPO), start_world(1))
    return output


def test_a_runs_metrics_are_those_of_its_conversations(ppo):
    steps = [line for line in read_lines(ppo / "metrics.jsonl") if "turns" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert 1 <= line["turns"] <= 3 and line["turn1/reward"] == -0.5 and line["score"] == line["turn_reward"]
        assert line["response_length"] <= 3 * line["turns"]
    assert any("eval/turns" in line for line in read_lines(ppo / "metrics.jsonl"))


def test_a_runs_responses_and_report_show_turns(ppo):
    records = read_lines(ppo / "responses.jsonl")
    training = [record for record in records if record["of"] == "training"]
    assert any(len(record["turn_rewards"]) > 1 for record in training)
    for record in training:
        assert [a is not None for a in record["advantages"]] == record["written"]
        assert record["written"][0] and record["written"][-1]
    heldout = next(record for record in records if record["of"] == "heldout" and len(record["said"]) > 1)
    assert heldout["said"][1] == {"role": "user", "text": " 0?"} and "\nuser: 0?\nassistant: " in heldout["response"]
    sample = read_lines(ppo / "samples.jsonl")[0]
    assert sample["before"].startswith("assistant: ") and sample["after"].startswith("assistant: ")
    html = page(read_runs([ppo]))
    assert "turn 2 · reward +0.5" in html and "observed, user" in html and "Reward of turn 1" in html


def test_rest_learns_from_conversations_and_keeps_them(folder):
    output = folder / "rest"
    argv = rest_runs.settings(folder, output, steps=1, **environment(folder))
    train_rest.train(parse(argv, REST), start_world(1))
    rows = read_scored(output / "grows" / "step-00000001").table.columns
    sums = [sum(rewards) for rewards in rows["turn_rewards"]]
    assert rows["score"] == sums and len(set(sums)) > 1
    assert [len(said) for said in rows["conversation"]] == [2 * len(rewards) for rewards in rows["turn_rewards"]]
    step = next(line for line in read_lines(output / "metrics.jsonl") if "turns" in line)
    assert step["turn_reward"] == pytest.approx(sum(sums) / len(sums)) and step["improve1/updates"] > 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_generated_conversations_are_rows_that_supervised_learning_reads(folder, form):
    place = generated.prepare(folder / form)
    argv = generated.settings(
        *(place, place / "out"),
        **environment(folder) | {"sampling__max_new_tokens": 70, "microbatch_tokens": 200},
        format=form,
        data__path=place / "chats.jsonl",
    )
    generate.generate(parse(argv, GENERATE), start_world(1))
    rows = generated.rows(place / "out")
    assert len(rows) == 44 and {len(row["turn_rewards"]) for row in rows} == {1, 2, 3}
    for row in rows:
        turns = [message["content"] for message in row["conversation"] if message["role"] == "assistant"]
        assert row["response"] == "\n".join(turns) and row["score"] == sum(row["turn_rewards"])
    path = place / "out" / ("responses.jsonl" if form == "jsonl" else "responses")
    texts = load_texts(PtxConfig(path=str(path), messages="conversation"), tiny.tokenizer(), context=None)
    assert len(texts) > len(rows) / 2
    assert json.loads((place / "out" / "metrics.jsonl").read_text().splitlines()[0])["turns"] >= 1
