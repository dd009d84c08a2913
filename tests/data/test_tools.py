"""Tools in conversations: prompts and demonstrations tell the model of them, and calls are learned but not answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tiny
import torch
from chat_templates import KINDS, tool

from fastppo.config import AnswersConfig, Config, DataConfig, OptimConfig, PtxConfig, RewardConfig
from fastppo.data.batch import Rollout
from fastppo.data.conversations import are_messages
from fastppo.data.examples import load_answers
from fastppo.data.packed import pack
from fastppo.data.prompts import load_prompts
from fastppo.data.tables import DataError
from fastppo.distributed import Residency, World
from fastppo.ppo.ptx import read_texts
from fastppo.rewards import load_sources, score

TOOLS = (tool("calculate", "expression"),)
SCHEMA = json.dumps(TOOLS[0])
USER = [{"role": "user", "content": "1+2?"}]
CALL = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "1+2"}}}
ANSWER = {"role": "tool", "content": "3"}
WRITTEN_CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1+2"}}\n</tool_call>'
TALK = [*USER, {"role": "assistant", "tool_calls": [CALL]}, ANSWER, {"role": "assistant", "content": "It is 3."}]


def written(folder: Path, **row: Any) -> str:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return str(folder / "rows.jsonl")


def prompts_of(folder: Path, tokenizer: Any, prompt: Any = USER, **settings: Any) -> Any:
    config = DataConfig(path=written(folder, prompt=prompt), tools=TOOLS, **settings)
    return load_prompts(config, tokenizer, prompts_heldout=0, context=None, reserve=0)[0]


def answers_of(folder: Path, tokenizer: Any, talk: Any, **settings: Any) -> Any:
    config = AnswersConfig(path=written(folder, talk=talk), **{"messages": "talk", "tools": TOOLS} | settings)
    return load_answers(config, tokenizer, heldout=0, context=None)[0]


def learned(examples: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """The prompt and the learned text of each example, the shorter ones first."""
    parts = zip(examples.tokens, examples.response_lengths.tolist(), strict=True)
    return sorted((tokenizer.decode(ids[:-n]), tokenizer.decode(ids[-n:])) for ids, n in parts)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.tools])
def test_a_prompt_tells_the_actor_of_the_tools(name, tmp_path):
    prompts = prompts_of(tmp_path, chat_templates.tokenizer(name))
    assert SCHEMA in prompts.texts[0]
    assert prompts.messages[0] == USER


def test_a_prompt_may_contain_earlier_calls(tmp_path):
    tokenizer = chat_templates.tokenizer("qwen2.5")
    (text,) = prompts_of(tmp_path, tokenizer, prompt=TALK[:3]).texts
    assert text.endswith(
        f"{WRITTEN_CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["qwen2.5", "hermes"])
def test_a_demonstration_teaches_the_call_and_the_last_answer_and_not_what_the_tool_says(name, tmp_path):
    tokenizer = chat_templates.tokenizer(name)
    (first, call), (second, said) = learned(answers_of(tmp_path, tokenizer, TALK), tokenizer)
    assert call == WRITTEN_CALL + "<|im_end|>"
    assert said == "It is 3.<|im_end|>"
    assert first == prompts_of(tmp_path, tokenizer).texts[0]  # as in RL
    assert second.startswith(first + call) and "<tool_response>\n3\n</tool_response>" in second


def test_a_llama_demonstration_teaches_its_form_of_calls(tmp_path):
    tokenizer = chat_templates.tokenizer("llama3")
    (_, call), (second, said) = learned(answers_of(tmp_path, tokenizer, TALK), tokenizer)
    assert call == '{"name": "calculate", "parameters": {"expression": "1+2"}}<|eot_id|>'
    assert said == "It is 3.<|eot_id|>" and '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>' in second


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_the_spellings_of_a_conversation_with_calls_are_read_alike(name, tmp_path):
    """Content that is null or "", keys that a table fills up with null, and arguments as JSON text."""
    tokenizer = chat_templates.tokenizer(name)
    filled = [{"role": None, "content": None, "tool_calls": None} | message for message in TALK]
    quoted = CALL | {"function": {"name": "calculate", "arguments": '{"expression": "1+2"}'}}
    other = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [quoted]}, *TALK[2:]]
    found = [learned(answers_of(tmp_path, tokenizer, talk), tokenizer) for talk in (TALK, filled, other)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, True),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, True),
        ({"role": "tool", "content": "3", "name": "calculate"}, True),
        ({"role": "assistant", "content": None}, False),
        ({"role": "assistant", "tool_calls": []}, False),
        ({"role": "assistant", "content": 3, "tool_calls": [CALL]}, False),
        ({"role": "user", "tool_calls": [CALL]}, False),
    ],
)
def test_only_a_message_of_calls_may_lack_its_content(message, wanted):
    assert are_messages([*USER, message]) is wanted


def test_the_text_beside_ppo_is_written_with_the_tools(tmp_path):
    tokenizer = chat_templates.tokenizer("qwen2.5")
    ptx = PtxConfig(coef=1.0, path=written(tmp_path, talk=TALK), messages="talk")
    texts = read_texts(Config(data=DataConfig(tools=TOOLS), ptx=ptx), tokenizer, None)
    assert all(SCHEMA in tokenizer.decode(ids) for ids in texts.tokens)


@pytest.mark.parametrize("same", [True, False], ids=["the same template", "another one"])
def test_a_reward_model_with_the_actors_template_is_told_of_the_tools(tmp_path, same):
    actor = chat_templates.tokenizer("qwen2.5")
    own = chat_templates.tokenizer("qwen2.5")
    if not same:
        own.chat_template += "\n"
    model = tiny.classifier(vocabulary=len(own), max_position_embeddings=512)
    model.save_pretrained(tmp_path / "reward")
    own.save_pretrained(tmp_path / "reward")
    rewards = (RewardConfig(model=str(tmp_path / "reward")),)
    config = Config(data=DataConfig(tools=TOOLS), rewards=rewards, optim=OptimConfig(dtype="fp32"))
    prompts, response = prompts_of(tmp_path, actor), actor(" yes", add_special_tokens=False)["input_ids"]
    packed = pack([[*prompts.tokens[0], *response]], [len(response)])
    rollout = Rollout(packed, torch.zeros(len(response)), torch.ones(1).bool(), torch.zeros(1, dtype=torch.int64))
    world = World(0, 1, torch.device("cpu"))
    scores = score(rollout, prompts, load_sources(config, actor, world, Residency(world.device)), actor, world).scores
    chat = [*USER, {"role": "assistant", "content": "yes"}]
    seen = own.apply_chat_template(chat, tokenize=False, **({"tools": list(TOOLS)} if same else {}))
    with torch.no_grad():
        expected = model(torch.tensor([own(seen, add_special_tokens=False)["input_ids"]])).logits[0]
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("template", [KINDS["smollm2"].template, None])
def test_a_template_that_does_not_read_tools_is_an_error(template, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    words = r"data.tools has calculate, but the tokenizer has no chat template that reads tools. Use a model with one"
    with pytest.raises(DataError, match=words):
        prompts_of(tmp_path, tokenizer)
    with pytest.raises(DataError, match=words):
        answers_of(tmp_path, tokenizer, TALK)


def test_plain_text_cannot_tell_of_tools(tmp_path):
    tokenizer = chat_templates.tokenizer("qwen2.5")
    with pytest.raises(DataError, match=r"line 1, column prompt: this is plain text, .* Set data.chat to always"):
        prompts_of(tmp_path, tokenizer, prompt="1+2?")
    assert SCHEMA in prompts_of(tmp_path, tokenizer, prompt="1+2?", chat="always").texts[0]
    with pytest.raises(DataError, match=r"line 1, column talk: this is plain text, .* leave out data.tools"):
        answers_of(tmp_path, tokenizer, "It is 3.", messages=None, response="talk", prompt=None)
