"""Prompts: which rows become one, as which tokens, on which side of the split, in which batch."""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastppo.config import DataConfig
from fastppo.config.command_line import SFT, parse
from fastppo.data.paths import locate
from fastppo.data.prompts import PromptSet, _plain_tokens, batches, load_prompts
from fastppo.data.tables import DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE, as SmolLM2's and GPT-2's, learnt from a few words, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["the film was wonderful and the actors were wonderful"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", chat_template=TEMPLATE)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Loads rows, or prompts in the column `prompt`, through a JSONL file; settings are those of DataConfig."""

    def _load(
        rows: list[Any], *, heldout: int = 0, evaluation: list[Any] | None = None, **settings: Any
    ) -> tuple[PromptSet, PromptSet]:
        for name, part in (("path", rows), ("eval_path", evaluation)):
            if part is not None:
                objects = [row if isinstance(row, dict) else {"prompt": row} for row in part]
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
                settings[name] = str(tmp_path / f"{name}.jsonl")
        config = DataConfig(**settings)
        return load_prompts(config, tokenizer, prompts_heldout=heldout, context=None, reserve=0)

    return _load


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_plain_text_is_tokenized_as_it_is(load, tokenizer):
    rows = [{"prompt": "the film", "n": 1}, {"prompt": " was\n<b>", "n": 2}]
    train, heldout = load(rows)
    assert train.texts == ("the film", " was\n<b>")
    assert train.tokens == tuple(tuple(tokenizer(text)["input_ids"]) for text in train.texts)
    assert train.columns == {"prompt": ["the film", " was\n<b>"], "n": [1, 2]}
    assert (len(train), len(heldout)) == (2, 0)


def test_messages_go_through_the_chat_template(load, tokenizer):
    rows = [{"talk": user("the film"), "prompt": 7}]
    train, _ = load(rows, column="talk")
    assert tokenizer.decode(list(train.tokens[0])) == "<s>user: the film\n<s>assistant: "
    assert train.texts == ("<s>user: the film\n<s>assistant: ",)
    assert train.columns == {"talk": [user("the film")], "prompt": [7]}


def test_chat_always_makes_text_one_user_message(load):
    plain, _ = load(["the film"], chat="always")
    assert plain.tokens == load([user("the film")])[0].tokens
    assert plain.columns["prompt"] == ["the film"]


def test_messages_and_texts_may_be_mixed(load):
    train, _ = load(["the film", user("was"), "actors"])
    assert train.texts == ("the film", "<s>user: was\n<s>assistant: ", "actors")


def test_a_suffix_is_added_to_texts_and_to_the_last_message_and_not_to_columns(load, tokenizer):
    talk = [*user("the"), {"role": "assistant", "content": "was"}, *user("film")]
    train, heldout = load(["the film", talk], suffix=" was", evaluation=["actors"], heldout=1)
    assert train.texts == ("the film was", "<s>user: the\n<s>assistant: was\n<s>user: film was\n<s>assistant: ")
    assert [tokenizer.decode(list(ids)) for ids in (*train.tokens, *heldout.tokens)] == [*train.texts, "actors was"]
    assert train.columns["prompt"] == ["the film", talk] and train.messages[1][-1]["content"] == "film was"
    always, _ = load(["the film"], suffix=" was", chat="always")
    assert always.texts == ("<s>user: the film was\n<s>assistant: ",)
    with pytest.raises(DataError, match=r"line 1: the prompt in column prompt is empty"):
        load([user("")], suffix=" was")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (["a", 3], {}, r"line 2: .*column prompt is neither text nor a list of chat messages.*'3' \(int\)"),
        (["a", None], {}, r"line 2: .*neither text nor.*NoneType"),
        (["a", []], {}, r"line 2: .*neither text nor"),
        ([[{"role": "user"}]], {}, r"line 1: .*neither text nor"),
        (["a", " \n"], {}, r"line 2: the prompt in column prompt is empty"),
        ([user("")], {}, r"line 1: the prompt in column prompt is empty"),
        ([user("a")], {"chat": "never"}, r"line 1: .*data.chat is never"),
        ([[*user("a"), {"role": "assistant", "content": "b"}]], {}, r"line 1: .*ends with an assistant's message"),
        ([[{"role": "system", "content": "a"}, *user("b")]], {}, r"line 1: .*refused by .*template: no system role"),
        (["a"], {"column": "text"}, r"no column text. It has prompt"),
        (["a", "the " * 9], {"max_prompt_tokens": 8, "too_long": "error"}, r"line 2: .* tokens, more than.* 8"),
        (["the " * 9], {"max_prompt_tokens": 8}, r"none of its 1 prompts can be used: 1 longer than.* 8"),
        (["a", "b"], {"first_tokens": 4}, r"none of its 2 prompts can be used: 2 shorter than data.first_tokens 4"),
        (["a"], {"heldout": 2}, r"has 1 usable prompts, but eval.prompts asks for 2"),
        (["a", "b"], {"heldout": 2}, r"has 2 usable prompts, and holding out 2 .* leaves none"),
        (["a", "a"], {"heldout": 1}, r"leaves none"),
        (["a"], {"heldout": 2, "evaluation": ["b"]}, r"eval_path.jsonl has 1 usable"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(load, rows, settings, words):
    with pytest.raises(DataError, match=words):
        load(rows, **settings)


def test_a_tokenizer_without_a_template_is_an_error(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        load([user("a")])


def test_long_prompts_are_left_out_and_counted_in_one_line(load, caplog):
    caplog.set_level(logging.INFO, logger="fastppo")
    train, _ = load(["a", "the " * 30, "b", "film " * 30], max_prompt_tokens=8)
    assert train.texts == ("a", "b")
    counted = [record.message for record in caplog.records if "dropped" in record.message]
    assert len(counted) == 1 and "dropped 2 of 4 prompts: 2 longer than data.max_prompt_tokens 8" in counted[0]


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(tokenizer):
    config = DataConfig(path="none.jsonl", max_prompt_tokens=100)
    with pytest.raises(DataError, match=r"100 \+ sampling.max_new_tokens 29 = 129 .* holds 128. Set .* to 99 or less"):
        load_prompts(config, tokenizer, prompts_heldout=0, context=128, reserve=29)
    with pytest.raises(DataError, match="no such file"):  # 128 of 128 is allowed: the file is looked for
        load_prompts(config, tokenizer, prompts_heldout=0, context=128, reserve=28)


words = st.text(alphabet="thefilmwasoderuactn\u00e9", min_size=1, max_size=12)


@example(texts=[" wonderful" * 20])  # 10 characters a token: six of them need more than the start of the text
@given(texts=st.lists(st.lists(words, min_size=1, max_size=60).map(" ".join), min_size=1, max_size=5))
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer, texts):
    whole = [tuple(ids[:6]) for ids in tokenizer(texts)["input_ids"]]
    assert list(_plain_tokens(texts, 6, tokenizer)) == whole


def test_first_tokens_cuts_texts_and_leaves_out_short_ones(load, tokenizer):
    long = "the film was wonderful and the actors were wonderful"
    train, _ = load([long, "the", user("the")], first_tokens=3)
    assert train.tokens[0] == tuple(tokenizer(long)["input_ids"][:3])
    assert train.texts == ("the film was", "<s>user: the\n<s>assistant: ")
    assert train.columns["prompt"] == [long, user("the")]


def test_heldout_prompts_are_never_trained_on_also_if_the_data_repeats_them(load):
    rows = [f"{i % 30}" for i in range(90)]
    train, heldout = load(rows, heldout=9)
    assert len(heldout) == 9
    assert not set(heldout.texts) & set(train.texts)
    assert len(train) == 90 - 3 * len(set(heldout.texts))


def test_the_heldout_choice_depends_on_the_split_seed_alone(load):
    rows = [f"{i}" for i in range(50)]
    chosen = load(rows, heldout=9)[1].texts
    assert load(rows, heldout=9, limit=20)[1].texts == chosen
    assert load(rows, heldout=5)[1].texts == chosen[:5]
    assert load(rows, heldout=9, split_seed=1)[1].texts != chosen
    assert len(set(chosen) & {f"{i}" for i in range(9)}) < 9  # not the first rows, which may be of one kind


def test_heldout_prompts_may_come_from_elsewhere(load):
    train, heldout = load(["a", "b", "c"], heldout=2, evaluation=["b", "d"])
    assert train.texts == ("a", "c")
    assert sorted(heldout.texts) == ["b", "d"]


def test_training_prompts_keep_the_order_of_the_data_and_limit_picks_among_all(load):
    train, heldout = load([f"{i}" for i in range(100)], heldout=10, limit=40)
    numbers = [int(text) for text in train.texts]
    assert (len(train), len(heldout)) == (30, 10)
    assert numbers == sorted(numbers) and max(numbers) > 60


def test_columns_named_as_a_reward_functions_arguments_are_left_out(load, caplog):
    caplog.set_level(logging.INFO, logger="fastppo")
    train, _ = load([{"prompt": "a", "responses": "b", "n": 1}])
    assert set(train.columns) == {"prompt", "n"}
    assert "do not receive the columns responses" in caplog.text


def prompt_set(count: int) -> PromptSet:
    return PromptSet(tuple((i,) for i in range(count)), tuple(map(str, range(count))), {})


def take(count: int, iterator: Iterator[list[int]]) -> list[list[int]]:
    return list(islice(iterator, count))


@given(count=st.integers(1, 20), size=st.integers(1, 50), start=st.integers(0, 30), shuffle=st.booleans())
def test_batches_are_full_cover_every_pass_and_start_anywhere(count, size, start, shuffle):
    prompts = prompt_set(count)
    dealt = take(40, batches(prompts, size=size, seed=3, shuffle=shuffle))
    assert all(len(batch) == size for batch in dealt)
    row = [index for batch in dealt for index in batch]
    passes = [row[i : i + count] for i in range(0, len(row) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    assert take(10, batches(prompts, size=size, seed=3, shuffle=shuffle, start=start)) == dealt[start : start + 10]


def test_each_pass_and_each_seed_has_an_order_of_its_own():
    prompts = prompt_set(50)
    first, second = take(2, batches(prompts, size=50, seed=1, shuffle=True))
    assert first != second and first != list(range(50))
    assert next(batches(prompts, size=50, seed=2, shuffle=True)) != first
    assert first[:5] == [19, 31, 25, 38, 35]  # the same everywhere: a run can be resumed on another machine
    assert take(2, batches(prompts, size=30, seed=1, shuffle=False))[1] == [*range(30, 50), *range(10)]


@pytest.mark.parametrize(("count", "size"), [(0, 3), (3, 0)])
def test_impossible_batches_are_refused(count, size):
    with pytest.raises(DataError, match=f"batches of {size} cannot be made from {count}"):
        next(batches(prompt_set(count), size=size, seed=1, shuffle=True))


@pytest.mark.slow
def test_the_quickstarts_prompts_are_the_starts_of_reviews():
    config, start = parse(["--config", "quickstart"]), parse(["--config", "quickstart-sft"], SFT).model
    smollm2 = AutoTokenizer.from_pretrained(locate(start.path), gguf_file=start.gguf_file)
    train, heldout = load_prompts(config.data, smollm2, prompts_heldout=64, context=8192, reserve=20)
    assert len(heldout) == 64 and len(train) > 32 * config.steps
    assert {len(tokens) for tokens in train.tokens} == {20}
    whole = smollm2(train.columns["text"][:300])["input_ids"]
    assert [tuple(ids[:20]) for ids in whole] == list(train.tokens[:300])
    assert all(review.startswith(text[:40]) for review, text in zip(train.columns["text"], train.texts, strict=True))
