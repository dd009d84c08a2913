"""Arguments of a chat template: wherever a run writes conversations, and none that the template does not read."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from fastppo import serve_reward
from fastppo.checkpoint.resume import CheckpointError, _check_fit, settings
from fastppo.config import (
    AnswersConfig,
    Config,
    DataConfig,
    OptimConfig,
    PairsConfig,
    PtxConfig,
    RewardConfig,
)
from fastppo.data.batch import Rollout
from fastppo.data.examples import load_answers, load_pairs
from fastppo.data.packed import pack
from fastppo.data.prompts import load_prompts
from fastppo.data.tables import DataError
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import World
from fastppo.errors import FastPPOError
from fastppo.ppo.ptx import read_texts
from fastppo.rewards import load_sources, score

WORLD = World(0, 1, torch.device("cpu"))
# Reads `thinking`, and `date` with a default of its own, as the templates of Qwen3 and Llama-3.1 do.
TEMPLATE = (
    "{% if not date is defined %}{% set date = 'today' %}{% endif %}[{{ date }}]"
    "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if thinking is defined and thinking + 0 is false %}{% endif %}"
    "{% if thinking is defined and not thinking and add_generation_prompt %}no thoughts:{% endif %}"
)
TOKENIZER = tiny.tokenizer()
TOKENIZER.chat_template = TEMPLATE
GIVEN = {"date": "1 May"}
USER, SAID = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]


def written(folder: Path, **row: Any) -> str:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return str(folder / "rows.jsonl")


def prompts_of(folder: Path, **settings: Any) -> Any:
    config = DataConfig(path=written(folder, prompt=USER), **settings)
    return load_prompts(config, TOKENIZER, prompts_heldout=0, context=None, reserve=0)[0]


def test_a_prompt_is_written_with_them(tmp_path):
    assert prompts_of(tmp_path).texts == ("[today]<user>q<assistant>",)
    found = prompts_of(tmp_path, template={"date": "1 May", "thinking": False})
    assert found.texts == ("[1 May]<user>q<assistant>no thoughts:",)
    assert TOKENIZER.decode(found.tokens[0]) == found.texts[0]


def test_answers_and_pairs_are_written_with_them(tmp_path):
    path, kept = (
        written(tmp_path, prompt=USER, response=SAID, chosen=SAID, rejected="b"),
        {"heldout": 0, "context": None},
    )
    answers, _ = load_answers(AnswersConfig(path=path, template=GIVEN), TOKENIZER, **kept)
    pairs, _ = load_pairs(PairsConfig(path=path, template=GIVEN), TOKENIZER, **kept)
    assert [TOKENIZER.decode(ids) for ids in answers.tokens] == ["[1 May]<user>q<assistant>a<eos>"]
    assert [TOKENIZER.decode(ids) for ids in pairs.tokens] == [
        "[1 May]<user>q<assistant>a",
        "[1 May]<user>q<assistant>b",
    ]


def test_the_text_beside_ppo_is_written_with_the_prompts_arguments(tmp_path):
    path = written(tmp_path, prompt=USER, response=SAID)
    ptx = PtxConfig(coef=1.0, path=path, prompt="prompt", response="response")
    texts = read_texts(Config(data=DataConfig(template=GIVEN), ptx=ptx), TOKENIZER, None)
    assert texts is not None
    assert [TOKENIZER.decode(ids) for ids in texts.tokens] == ["[1 May]<user>q<assistant>a<eos>"]


def rollout_of(prompts: Any) -> Rollout:
    response = TOKENIZER(" yes")["input_ids"]
    packed = pack([[*prompts.tokens[0], *response]], [len(response)])
    return Rollout(packed, torch.zeros(len(response)), torch.ones(1).bool(), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("template", "seen"), [(TEMPLATE, "[1 May]<user>q<assistant>yes"), ("{{ messages[1].content }}!", "yes!")]
)
def test_a_reward_model_with_the_actors_template_gets_them_and_another_does_not(tmp_path, template, seen):
    model, folder = tiny.classifier(), tmp_path / "reward"
    path = tiny.saved(folder, model)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = Config(
        data=DataConfig(template=GIVEN), rewards=(RewardConfig(model=path),), optim=OptimConfig(dtype="fp32")
    )
    prompts = prompts_of(tmp_path, template=GIVEN)
    sources = load_sources(config, TOKENIZER, WORLD, Residency(WORLD.device))
    said = score(rollout_of(prompts), prompts, sources, TOKENIZER, WORLD).scores
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer(seen)["input_ids"]])).logits[0]
    assert said.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"thinkin": False},
            r"data.template has thinkin, which the .* template does not read; did you mean thinking\?",
        ),
        ({"zzz": 1}, r"data.template has zzz, which .* does not read; it reads date, thinking\."),
        ({"messages": []}, r"data.template has messages, which"),
        ({"tokenize": True}, r"data.template has tokenize, which"),
        ({"add_generation_prompt": False}, r"data.template has add_generation_prompt, which"),
        ({"thinking": "no"}, r'line 1: .* template \(with \{"thinking": "no"\}\): '),
    ],
)
def test_an_argument_that_the_template_does_not_read_or_refuses_is_named(tmp_path, given, words):
    with pytest.raises(DataError, match=words):
        prompts_of(tmp_path, template=given)


def test_without_a_template_nothing_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(
        DataError, match=r'data.template is \{"date": "1 May"\}, but the tokenizer has no chat template'
    ):
        prompts_of(tmp_path, template=GIVEN)
    for load, kind in ((load_answers, AnswersConfig), (load_pairs, PairsConfig)):
        with pytest.raises(DataError, match=r"data.template is .*no chat template"):
            load(kind(path="none.jsonl", template=GIVEN), TOKENIZER, heldout=0, context=None)  # type: ignore[operator]


def test_they_are_part_of_what_a_resumed_run_is_compared_by(tmp_path):
    config, other = Config(data=DataConfig(template=GIVEN)), Config(data=DataConfig(template={"date": "2 May"}))
    assert settings(config)["data.template"] == GIVEN
    about = {"ranks": 1, "config": settings(config), "versions": {}}
    _check_fit(tmp_path, about, config, WORLD)
    for changed, now in ((other, '{"date": "2 May"}'), (Config(), "{}")):
        with pytest.raises(CheckpointError, match=f'data.template is {now}, but .* was made with {{"date": "1 May"}}'):
            _check_fit(tmp_path, about, changed, WORLD)
    before = {
        "ranks": 1,
        "config": {k: v for k, v in settings(Config()).items() if k != "data.template"},
        "versions": {},
    }
    _check_fit(tmp_path, before, Config(), WORLD)  # of a run from before there was this setting


def test_a_service_takes_arguments_of_its_models_template(tmp_path, monkeypatch):
    path = tiny.saved(tmp_path, tiny.classifier())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    with pytest.raises(FastPPOError, match=r"--template has dat, which .* did you mean date"):
        serve_reward.serve(path, port=0, template={"dat": 1})
    model, tokenizer = serve_reward.load_reward(path, torch.float32, WORLD.device)
    source = serve_reward.alone(model, tokenizer, 100, WORLD.device, GIVEN)
    packed = source.tokenised(["x", "plain"], [" yes", " no"], [True, False], [USER, None])
    texts = [tokenizer.decode(ids) for ids in packed.tokens.split(packed.lengths.tolist())]
    assert texts == ["[1 May]<user>q<assistant>yes", "plain no"]
