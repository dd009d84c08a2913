"""Conversations with an environment as sources of reward see them, and the environment's own rewards in the score."""

import json
import logging
import textwrap
from contextlib import nullcontext
from dataclasses import replace

import chat_templates
import finished_talks
import pytest
import tiny
import torch
from services import lengths, reward_service, service

from fastppo.config import Config, PPOConfig, RewardConfig, RolloutConfig
from fastppo.data.batch import Moments
from fastppo.data.prompts import PromptSet
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import World
from fastppo.errors import log_once
from fastppo.models import load_reward
from fastppo.rewards import RewardError, check_chats, load_sources, read_request, response_texts, score, shape
from fastppo.rewards.model import chat_tokens
from fastppo.serve_reward import alone

TOKENIZER, CPU = tiny.tokenizer(), torch.device("cpu")
DATA = PromptSet(
    tuple(tuple(TOKENIZER(t)["input_ids"]) for t in finished_talks.PROMPTS),
    finished_talks.PROMPTS,
    {"answer": [1, 3, 2]},
)
# as chats, which the reward model's own template writes
CHATS = replace(DATA, messages=tuple([{"role": "user", "content": text}] for text in finished_talks.PROMPTS))
OF_TURNS = [sum(rewards) for rewards in finished_talks.REWARDS]


def scored(*rewards, rollout=None, data=DATA):
    config = Config(rewards=rewards)
    config = replace(config, optim=replace(config.optim, dtype="fp32"))
    world = World(0, 1, CPU)
    sources = load_sources(config, TOKENIZER, world, Residency(CPU))
    return score(rollout or finished_talks.rollout(), data, sources, TOKENIZER, world)


def function(tmp_path, monkeypatch, body, parameters="responses, conversations"):
    source = f"def reward({parameters}):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    return RewardConfig(function="mine.py:reward")


def test_a_response_is_what_the_policy_wrote_with_its_turns_on_lines():
    assert response_texts(finished_talks.rollout().packed, TOKENIZER) == finished_talks.TEXTS


def test_a_conversation_of_one_turn_has_the_text_of_a_response_without_a_mask():
    packed = finished_talks.rollout(said=[["ab"], ["e"], ["hi"]], rewards=[[0.0]] * 3).packed
    assert response_texts(packed, TOKENIZER) == response_texts(replace(packed, mask=None), TOKENIZER)


def test_rewards_for_turns_are_the_last_source_of_the_score():
    found = scored(RewardConfig(pattern="i|b", weight=2.0))
    assert found.by_source.tolist() == [[1, OF_TURNS[0]], [0, OF_TURNS[1]], [1, OF_TURNS[2]]]
    assert found.scores.tolist() == [2 + OF_TURNS[0], OF_TURNS[1], 2 + OF_TURNS[2]]
    assert found.end_scores.tolist() == [2, 0, 2]
    chosen = found.select(torch.tensor([2, 0]))
    assert chosen.end_scores.tolist() == [2, 2] and chosen.scores.tolist() == [2.625, 1.25]


def test_an_environment_may_be_the_only_source():
    found = scored()
    assert found.by_source.tolist() == [[x] for x in OF_TURNS] and found.scores.tolist() == OF_TURNS
    assert shape(found, Moments().add(found.end_scores), PPOConfig(score_normalise=True)).tolist() == [0, 0, 0]


def test_what_shapes_a_score_leaves_the_rewards_for_turns_alone():
    found = scored(RewardConfig(pattern="i|b", weight=2.0))
    ppo = PPOConfig(score_normalise=True, score_clip=1.0, truncation_penalty=0.5, length_limit=4, length_penalty=0.25)
    expected = torch.tensor([2**0.5 / 2, -(2**0.5), 2**0.5 / 2]).clamp(-1, 1) - torch.tensor([0.25, 0, 0.5])
    assert shape(found, Moments().add(found.end_scores), ppo).tolist() == pytest.approx(expected.tolist())


def test_rewards_for_turns_beyond_fp32_are_an_error():
    with pytest.raises(RewardError, match=r"rollout.environment: .* turns of response 0 of the batch are 6e"):
        scored(rollout=finished_talks.rollout(rewards=((3e38, 3e38), (0.0,), (0.0,) * 3)))
    with pytest.raises(RewardError, match=r"response 1 of the batch scores 3e\+38 at its end and 3e\+38 for its turns"):
        scored(
            RewardConfig(pattern="e", weight=3e38),
            rollout=finished_talks.rollout(rewards=((0.0,) * 2, (3e38,), (0.0,) * 3)),
        )


def test_a_function_gets_copies_of_conversations(tmp_path, monkeypatch):
    body = """
        assert responses == ["ab\\ncd", "e", "f\\ng\\nhi"]
        found = [len(conversation) for conversation in conversations]
        conversations[0].clear()
        conversations[1][1]["content"] = "?"
        return found"""
    rollout = finished_talks.rollout()
    assert scored(function(tmp_path, monkeypatch, body), rollout=rollout).end_scores.tolist() == [4, 2, 6]
    assert [m["content"] for m in rollout.conversations[1]] == ["three", "e"] and len(rollout.conversations[0]) == 4


def test_a_function_that_wants_conversations_of_a_run_without_any_is_an_error(tmp_path, monkeypatch):
    plain = replace(finished_talks.rollout(), turn_rewards=None, conversations=None)
    source = function(tmp_path, monkeypatch, "return [0.0] * len(responses)")
    with pytest.raises(RewardError, match=r"parameter conversations, which only a run with rollout.environment has"):
        scored(source, rollout=plain)
    column = replace(DATA, columns={"conversations": [1, 2, 3]})  # as before there were environments
    assert scored(source, rollout=plain, data=column).scores.tolist() == [0, 0, 0]


def test_a_column_of_that_name_gives_way_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "fastppo")
    source = function(tmp_path, monkeypatch, "return [len(c) for c in rest['conversations']]", "**rest")
    column = replace(DATA, columns={"conversations": [[]] * 3})
    assert scored(source, data=column).end_scores.tolist() == [4, 2, 6]
    assert "does not receive the column conversations" in caplog.text


def test_a_service_is_sent_conversations():
    with service(lengths) as (url, asked):
        found = scored(RewardConfig(url=url, request_size=2, concurrency=1))
    assert found.end_scores.tolist() == [len(text) for text in finished_talks.TEXTS]
    assert [request["conversations"] for request in asked] == [
        list(finished_talks.rollout().conversations[:2]),
        list(finished_talks.rollout().conversations[2:]),
    ]


def test_a_conversation_that_is_no_json_is_an_error():
    rollout = finished_talks.rollout()
    rollout.conversations[1].insert(1, {"role": "user", "content": "", "data": {1, 2}})
    with pytest.raises(RewardError, match=r"the conversation of response 1 .*Let rollout.environment answer"):
        scored(RewardConfig(url="http://127.0.0.1:1"), rollout=rollout)


def test_a_reward_model_with_the_actors_tokenizer_reads_all_tokens(tmp_path):
    model = tiny.classifier()
    found = scored(RewardConfig(model=tiny.saved(tmp_path / "reward", model))).end_scores
    packed = finished_talks.rollout().packed
    with torch.no_grad():
        rows = [model(part[None]).logits.item() for part in packed.tokens.split(packed.lengths.tolist())]
    assert found.tolist() == pytest.approx(rows, abs=1e-5)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reward model with another tokenizer: its path, itself, its tokenizer."""
    model, extra = tiny.classifier(vocabulary=258), ("<more>",)
    return tiny.saved(tmp_path_factory.mktemp("other") / "reward", model, extra=extra), model, tiny.tokenizer(extra)


def read_by(model, tokenizer, texts):
    with torch.no_grad():
        return pytest.approx([model(torch.tensor([tokenizer(t)["input_ids"]])).logits.item() for t in texts], abs=1e-5)


def test_another_reward_model_reads_what_was_observed_too(other):
    path, model, tokenizer = other
    wholes = ["oneab?cd<eos>", "threee<eos>", "twof!!g?hi"]  # the last was cut
    assert scored(RewardConfig(model=path)).end_scores.tolist() == read_by(model, tokenizer, wholes)
    with reward_service(lambda: alone(*load_reward(path, torch.float32, CPU), 100, CPU)) as (url, _):
        assert scored(RewardConfig(url=url)).end_scores.tolist() == read_by(model, tokenizer, wholes)


def test_another_reward_model_reads_a_chat_by_its_own_template(other):
    path, model, tokenizer = other
    rollout = finished_talks.rollout()
    for conversation in rollout.conversations:
        conversation[-1]["content"] = f" {conversation[-1]['content']}\n"  # spaces of the actor's template
    wholes = [
        "<user>one<assistant>ab<user>?<assistant>cd",
        "<user>three<assistant>e",
        "<user>two<assistant>f<user>!!<assistant>g<user>?<assistant>hi",
    ]
    assert scored(RewardConfig(model=path), rollout=rollout, data=CHATS).end_scores.tolist() == read_by(
        model, tokenizer, wholes
    )


def test_a_request_with_wrong_conversations_is_refused_with_what_they_are():
    request = {"prompts": ["p"], "responses": ["r"], "conversations": [[]]}
    with pytest.raises(ValueError, match="conversations has a list of chat messages"):
        read_request(json.dumps(request).encode())
    with pytest.raises(ValueError, match="1 responses and 1 ended, and 0 conversations"):
        read_request(json.dumps(request | {"conversations": []}).encode())


ASKED = [{"role": "user", "content": "What are 2 * 3 and 4 * 5?"}]


def test_a_turn_of_several_calls_is_read_by_a_template_that_takes_one_at_a_time():
    """The actor may write them whatever the template of its reward model says, and that is no error of the run."""
    tokenizer = chat_templates.tokenizer("llama3")
    calls = [
        {"type": "function", "function": {"name": "multiply", "arguments": {"x": x, "y": y}}}
        for x, y in (("2", "3"), ("4", "5"))
    ]
    answer = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "6, 20"}]
    text = tokenizer.decode(chat_tokens("the reward model", ASKED, answer, tokenizer, {}))
    assert text.count('"name": "multiply"') == 2 and text.index('"2"') < text.index('"5"') < text.index("6, 20")


@pytest.mark.parametrize(("environment", "refused"), [(None, False), ("talk.py:talk", True)])
def test_a_template_that_refuses_an_observation_is_found_before_models_load(tmp_path, environment, refused):
    theirs = tiny.tokenizer()
    theirs.chat_template = (
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one answer only') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    theirs.save_pretrained(tmp_path / "reward")
    config = Config(
        rewards=(RewardConfig(model=str(tmp_path / "reward")),), rollout=RolloutConfig(environment=environment)
    )
    prompts = PromptSet(((1, 2),), ("?",), {}, (ASKED,))
    with pytest.raises(RewardError, match="one answer only") if refused else nullcontext():
        check_chats(config, tiny.tokenizer(), prompts)
