"""Conversations with an environment in a report: what was written and what was observed, turns and their rewards."""

import json
import re

import finished_talks
import pytest
import tiny
from made_up_run import HOSTILE
from report_page import charts, runs, shown

from fastppo.monitor import RunFolderError, turn_metrics
from fastppo.monitor.response_log import as_text, heldout_responses, said_behind, training_responses
from fastppo.report.lines import read_responses
from fastppo.report.page import page
from fastppo.report.titles import quantity

TURN, OBSERVED = r'<span class="turn"><small>(.*?)</small>(.*?)</span></span>', r'class="observed"><small>(.*?)</small>'


def written(tmp_path, *records):
    (tmp_path / "metrics.jsonl").touch()
    lines = [json.dumps({"step": 1} | record) + "\n" for record in records]
    (tmp_path / "responses.jsonl").write_text("".join(lines))
    return page(runs(tmp_path))


def heldout():
    said = [said_behind(conversation, None) for conversation in finished_talks.rollout().conversations]
    return heldout_responses(
        finished_talks.PROMPTS, [*map(as_text, said)], [1.0, 2.0, 3.0], said, finished_talks.REWARDS, count=2
    )


def test_a_training_response_shows_turns_with_rewards_and_observations_apart(tmp_path):
    html = written(tmp_path, *training_responses(finished_talks.experience(), tiny.tokenizer(), count=1))
    card = html.split('<div class="card">')[1]
    assert [label for label, _ in re.findall(TURN, card)] == ["turn 1 · reward +0.25", "turn 2 · reward \u22121"]
    assert re.findall(OBSERVED, card) == ["observed"]
    assert '<span class="t">?</span>' in card and card.count('title="advantage') == 5
    assert "what the environment wrote" in html and "worse than expected" in html


def test_a_heldout_response_shows_turns_and_roles(tmp_path):
    html = written(tmp_path, *heldout())
    cards = html.split('<div class="card">')[1:]
    assert re.findall(OBSERVED, cards[0]) == ["observed, user"] and not re.findall(OBSERVED, cards[1])
    assert "turn 2 · reward \u22121</small>cd</span>" in cards[0] and "turn 1 · reward +2</small>e</span>" in cards[1]
    assert "what the environment wrote" in html


def test_what_an_environment_says_stays_text(tmp_path):
    hostile = heldout()[0] | {"said": [{"role": HOSTILE, "text": HOSTILE}]}
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "responses.jsonl").write_text(json.dumps({"step": 1} | hostile) + "\n")
    assert not shown(tmp_path).all("img") and "<img src=x" in shown(tmp_path).text


def test_a_run_without_an_environment_has_no_legend_of_turns(tmp_path):
    html = written(tmp_path, *heldout_responses(["p"], ["r"], [1.0], count=1))
    assert "what the environment wrote" not in html and '<span class="turn">' not in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"written": [1, 0]}, "list of true and false as its written"),
        ({"written": [True]}, "true or false for each of its tokens"),
        ({"turn_rewards": ["1"]}, "list of numbers as its turn_rewards"),
        ({"said": [{"role": "user"}]}, "list of messages, each a role and a text, as its said"),
    ],
)
def test_damaged_turns_are_named(changes, words, tmp_path):
    [record] = training_responses(finished_talks.experience(), tiny.tokenizer(), count=1)
    with pytest.raises(RunFolderError, match=words):
        written(tmp_path, record | changes)


def test_metrics_of_turns_have_titles_and_charts(tmp_path):
    metrics = turn_metrics(finished_talks.rollout().packed, finished_talks.rollout().turn_rewards)
    assert all(quantity(name).note and quantity(f"eval/{name}") == quantity(name) for name in metrics)
    rows = [{"step": step, "score": 1.0} | metrics for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = charts(shown(tmp_path))
    assert {"Turns", "Observed tokens", "Rewards of turns", "Reward of turn 1", "Reward of turn 3"} <= drawn.keys()
    assert read_responses(tmp_path / "responses.jsonl") == ([], [])
