"""Pairs and responses: which rows become one, as which tokens, and what is said of those that cannot."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastppo.config import AnswersConfig, PairsConfig
from fastppo.data.examples import Examples, load_answers, load_pairs
from fastppo.data.tables import DataError

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture
def pairs(tmp_path):
    """Loads rows of pairs through a JSONL file; settings are those of PairsConfig."""

    def load(rows: list[dict[str, Any]], heldout: int = 0, **settings: Any) -> tuple[Examples, Examples]:
        config = PairsConfig(path=written(tmp_path, rows), **{"max_tokens": 64} | settings)
        return load_pairs(config, TOKENIZER, heldout=heldout, context=64)

    return load


@pytest.fixture
def answers(tmp_path):
    def load(rows: list[dict[str, Any]], heldout: int = 0, **settings: Any) -> tuple[Examples, Examples]:
        config = AnswersConfig(path=written(tmp_path, rows), **{"max_tokens": 64} | settings)
        return load_answers(config, TOKENIZER, heldout=heldout, context=64)

    return load


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def texts(examples: Examples) -> list[str]:
    return [TOKENIZER.decode(tokens) for tokens in examples.tokens]


def pair(prompt: Any, chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_both_answers_of_a_pair_stand_next_to_each_other_with_their_prompt_and_eos(pairs):
    train, heldout = pairs([pair("p ", "good", "bad")])
    assert texts(train) == ["p good<eos>", "p bad<eos>"]
    assert (len(train), len(heldout)) == (1, 0)
    assert train.lengths.tolist() == [len("p goodp bad") + 2]
    assert train.packed.response_lengths.tolist() == [5, 4]
    assert train.sequences(train.lengths.new_tensor([0])).tolist() == [0, 1]


def test_chat_goes_through_the_template_however_it_is_given(pairs):
    wanted = ["<user>q<assistant>good", "<user>q<assistant>bad"]  # as it stands: this template ends no turn
    assert texts(pairs([pair(user("q"), assistant("good"), assistant("bad"))])[0]) == wanted
    assert texts(pairs([pair(user("q"), "good", "bad")])[0]) == wanted
    assert texts(pairs([pair("q", "good", "bad")], chat="always")[0]) == wanted
    whole = [user("q") + assistant("good"), user("q") + assistant("bad")]
    assert texts(pairs([pair("q", *whole)])[0]) == wanted  # answers that are whole conversations
    assert texts(pairs([pair("q", *whole)], prompt=None)[0]) == wanted


def test_a_chat_is_read_to_the_last_character_of_its_template(pairs, monkeypatch):
    """Reward models are given whole conversations, of which transformers scores the last token."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    rows = [pair(user("q"), assistant("good"), assistant("bad"))]
    train, _ = pairs(rows)
    chats = [user("q") + assistant(answer) for answer in ("good", "bad")]
    assert train.tokens == [TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    assert texts(train) == ["<user>q<eos>\n<assistant>good<eos>\n", "<user>q<eos>\n<assistant>bad<eos>\n"]
    assert texts(pairs(rows, eos=False)[0]) == ["<user>q<eos>\n<assistant>good", "<user>q<eos>\n<assistant>bad"]


def test_columns_have_any_name_and_a_margin_comes_from_one(pairs):
    rows = [{"q": "p", "better": "a", "worse": "b", "by": "1.5"}]
    train, _ = pairs(rows, prompt="q", chosen="better", rejected="worse", margin="by")
    assert texts(train) == ["pa<eos>", "pb<eos>"] and train.margins.tolist() == [1.5]


def test_rated_answers_to_the_same_prompt_become_pairs_and_none_is_used_twice(pairs):
    rows = [{"prompt": p, "response": f"{p}{r}", "score": r} for p in "ab" for r in (3, 1, 2, 2)]
    train, _ = pairs([*rows, {"prompt": "c", "response": "alone", "score": 9}], rating="score")
    found = {tuple(texts(train)[i : i + 2]) for i in range(0, 2 * len(train), 2)}
    assert found == {("aa3<eos>", "aa1<eos>"), ("bb3<eos>", "bb1<eos>")}  # 2 and 2 are no preference


def test_rated_answers_without_a_prompt_are_no_pair(pairs):
    rows = [{"prompt": p, "response": f"{p}{r}", "score": r} for p in ("a", None) for r in (1, 2)]
    assert texts(pairs(rows, rating="score")[0]) == ["aa2<eos>", "aa1<eos>"]


def test_reviews_become_pairs_by_their_label(pairs):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(40)]
    train, heldout = pairs(rows, heldout=5, prompt=None, answer="text", rating="label", eos=False, last_tokens=6)
    assert (len(train), len(heldout)) == (15, 5)
    used = texts(train) + texts(heldout)
    assert len(used) == len({*used}) == 40  # six tokens tell all reviews apart
    assert all("d" in text and "bad" not in text for text in used[0::2]) and all("ad" in text for text in used[1::2])
    assert all(len(tokens) <= 6 and EOS not in tokens for tokens in train.tokens)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([pair("p", "same", "same")], {}, r"the two answers are equal"),
        ([pair("p", "a", " \n")], {}, r"an empty answer"),
        ([pair("p", "", "b")], {}, r"an empty answer"),
        ([pair("p", "a", None)], {}, r"an empty answer"),
        ([pair("p", [], "b")], {}, r"an empty answer"),
        ([pair(None, "a", "b")], {}, r"an empty prompt"),
        ([pair(" ", "a", "b")], {}, r"an empty prompt"),
        ([pair([], assistant("a"), assistant("b"))], {}, r"an empty prompt"),
        ([{"chosen": "a", "rejected": "b"}], {}, r"an empty prompt"),
        ([pair(user("p"), assistant(""), assistant("b"))], {}, r"an empty answer"),
    ],
)
def test_a_pair_that_teaches_nothing_is_dropped_and_counted_or_an_error(pairs, caplog, rows, settings, words):
    train, _ = pairs([*rows, pair("p", "a", "b")], **settings)
    assert len(train) == 1
    assert f"dropped 1 of 2 examples: 1 ({words})" in caplog.text
    rows = [{"prompt": None} | row for row in rows]  # the column is there if another row has it
    with pytest.raises(
        DataError,
        match=rf"line 1, columns prompt, chosen and rejected: {words}. Remove the row, or set data.unusable to drop",
    ):
        pairs(rows, unusable="error", **settings)
    with pytest.raises(DataError, match=rf"no usable example: 1 \({words}\). Correct the rows, or name other"):
        pairs(rows, **settings)


def test_answers_that_are_too_long_are_dropped_cut_or_an_error(pairs, caplog):
    rows = [pair("p", "a" * 20, "b"), pair("p", "c", "d")]
    assert texts(pairs(rows, max_tokens=10)[0]) == ["pc<eos>", "pd<eos>"]
    assert "dropped 1 of 2 examples: 1 (longer than data.max_tokens 10)" in caplog.text
    cut = texts(pairs(rows, max_tokens=10, too_long="cut")[0])
    assert set(cut) == {"p" + "a" * 9, "pb<eos>", "pc<eos>", "pd<eos>"}  # what was cut has no EOS
    assert "cut the answers of 1 examples at data.max_tokens 10" in caplog.text
    with pytest.raises(DataError, match=r"rejected: prompt and answer have 22 tokens, more than data.max_tokens 10"):
        pairs(rows, max_tokens=10, too_long="error")
    with pytest.raises(DataError, match=r"no usable example: .* Raise data.max_tokens"):
        pairs(rows[:1], max_tokens=10)


def test_answers_that_are_equal_once_they_are_cut_are_no_pair(pairs, caplog):
    rows = [pair("p", "a" * 20 + "x", "a" * 20 + "y"), pair("p" * 12, "a", "b"), pair("p", "c", "d")]
    train, _ = pairs(rows, max_tokens=10, too_long="cut")
    assert texts(train) == ["pc<eos>", "pd<eos>"]
    assert "1 (the two answers are equal after cutting at data.max_tokens 10)" in caplog.text
    assert "1 (an empty answer after cutting at data.max_tokens 10)" in caplog.text


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (
            [{"prompt": "p", "chosen": "a"}],
            {},
            r"no column rejected. It has .*; name one with data.rejected",
        ),
        (
            [pair("p", 3, "b")],
            {},
            r"line 1, columns prompt and chosen: '3' \(int\) is neither text nor chat.* name another",
        ),
        ([pair(7, "a", "b")], {}, r"neither text nor chat"),
        ([pair("p", "a", "b", m="wide")], {"margin": "m"}, r"line 1, column m contains 'wide', which is not a number"),
        ([pair("p", "a", "b", m=None)], {"margin": "m"}, r"column m contains None"),
        (
            [pair("p", "a", "b", m=math.nan)],
            {"margin": "m"},
            r"line 1, column m contains nan.* Correct or remove the row",
        ),
        ([{"chosen": "a", "rejected": "b"}], {}, r"no column prompt. It has chosen, rejected; .* or set it to null if"),
        (
            [{"prompt": "p", "response": x, "r": 1} for x in "abc"],
            {"rating": "r"},
            r"contains no pair: .* different ratings in the column r \(1\), over 1 different prompts. Name another",
        ),
        (
            [pair("p", user("a"), assistant("b"))],
            {},
            r"1 \(the last message is not the assistant's\)",
        ),
        ([pair(None, assistant("a"), assistant("b"))], {"prompt": None}, r"1 \(no message before the assistant's\)"),
        ([pair(user("p"), "a", "b")], {"chat": "never"}, r"data.chat is never"),
        ([pair("p", "a", "b")], {"heldout": 2}, r"has 1 usable examples, but eval.examples asks for 2"),
        ([pair("p", "a", "b")], {"heldout": 1}, r"leaves none to train on"),
        ([pair("p", "a", "b")], {"max_tokens": 65}, r"data.max_tokens is 65, but the model's context holds 64"),
    ],
)
def test_pairs_that_cannot_be_read_are_named(pairs, rows, settings, words):
    with pytest.raises(DataError, match=words):
        pairs(rows, **settings)


def test_no_heldout_answer_is_trained_on_also_if_the_data_repeats_it(pairs):
    rows = [pair("p", f"a{i % 20}", f"b{i}") for i in range(60)]
    train, heldout = pairs(rows, heldout=10)
    assert len(heldout) == 10
    assert not set(texts(train)) & set(texts(heldout))


def test_the_heldout_pairs_depend_on_the_split_seed_alone(pairs):
    rows = [pair("p", f"a{i}", f"b{i}") for i in range(40)]
    chosen = texts(pairs(rows, heldout=8)[1])
    assert texts(pairs(rows, heldout=8, limit=20)[1]) == chosen
    assert texts(pairs(rows, heldout=8, split_seed=1)[1]) != chosen


def test_a_limit_is_on_what_is_trained_on_and_not_on_a_heldout_file_of_its_own(pairs, tmp_path):
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", [pair("p", f"c{i}", f"d{i}") for i in range(20)])
    rows = [pair("p", f"a{i}", f"b{i}") for i in range(20)]
    train, heldout = pairs(rows, heldout=15, limit=5, eval_path=other)
    assert (len(train), len(heldout)) == (5, 15)


def test_a_response_is_learned_with_its_prompt_before_it(answers):
    train, _ = answers([{"prompt": "ask ", "response": "tell"}])
    assert texts(train) == ["ask tell<eos>"]
    assert TOKENIZER.decode(train.packed.responses) == "tell<eos>"


def test_each_message_of_the_assistant_is_a_response_to_all_before_it(answers):
    talk = user("one") + assistant("two") + user("three") + assistant("four")
    train, _ = answers([{"talk": talk}], messages="talk")
    assert texts(train) == ["<user>one<assistant>two<eos>", "<user>one<assistant>two<user>three<assistant>four<eos>"]
    assert TOKENIZER.decode(train.packed.responses) == "two<eos>four<eos>"


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_a_conversation_of_plain_text_is_its_messages_one_after_another(answers):
    """A turn before an observation ends as its text does; the last one with an EOS."""
    train, _ = answers([{"talk": turns("1+2+3 ", "1+2=", "3; ", "3+3=6")}], messages="talk", chat="never")
    assert sorted(texts(train)) == ["1+2+3 1+2=", "1+2+3 1+2=3; 3+3=6<eos>"]
    assert sorted(TOKENIZER.decode(train.packed.responses).split("=")) == ["1+2", "3+3", "6<eos>"]
    watched = turns("1+2 ", "1+2=", "3")
    assert texts(answers([{"talk": watched}], messages="talk", chat="never")[0]) == ["1+2 1+2="]
    assert texts(answers([{"talk": turns("p ", "a")}], messages="talk", chat="never", eos=False)[0]) == ["p a"]
    stopped = turns("p ", "a<eos>", "b ", "c")  # a turn that sampling ends with the EOS says so itself
    train, _ = answers([{"talk": stopped}], messages="talk", chat="never")
    assert sorted(texts(train)) == ["p a<eos>", "p a<eos>b c<eos>"]
    assert [tokens.count(EOS) for tokens in sorted(train.tokens, key=len)] == [1, 2]


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        (turns("p", ""), r"1 \(an empty answer\)"),
        ([{"role": "user", "content": "p"}], r"1 \(no message of the assistant\)"),
        ([{"role": "user"}], r"line 1, column talk: .* is neither text nor chat messages"),
        (
            [*turns("p"), {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}],
            r"line 1, column talk has tool calls, .* data.chat is never. Set it to auto, or write the calls as text",
        ),
    ],
)
def test_plain_conversations_that_cannot_be_used_are_named(answers, talk, words):
    with pytest.raises(DataError, match=words):
        answers([{"talk": talk}], messages="talk", chat="never", unusable="error" if "line" in words else "drop")


def test_without_a_prompt_the_first_token_is_the_prompt(answers):
    train, _ = answers([{"response": "tell"}], prompt=None)
    assert texts(train) == ["tell<eos>"]
    assert TOKENIZER.decode(train.packed.responses) == "ell<eos>"


def test_the_turn_ends_where_the_template_ends_it(answers, monkeypatch):
    """Sampling stops at the token that ends a turn, so nothing behind it is learned."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{{ '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    train, _ = answers([{"talk": user("one") + assistant("two")}], messages="talk")
    assert texts(train) == ["<user>one<assistant>two<eos>"]


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"prompt": "p", "response": ""}], {}, r"an empty answer"),
        (
            [{"talk": "text"}],
            {"messages": "talk"},
            r"column talk contains text and no chat.* set data.messages to null",
        ),
        ([{"talk": user("a")}], {"messages": "talk"}, r"no message of the assistant"),
        ([{"talk": None}], {"messages": "talk"}, r"1 \(an empty conversation\)"),
        ([{"talk": []}], {"messages": "talk"}, r"1 \(an empty conversation\)"),
        ([{"talk": None}], {"messages": "talk", "unusable": "error"}, r"line 1, column talk: an empty conversation. R"),
        ([{"response": None}], {"prompt": None, "unusable": "error"}, r"line 1, column response: an empty answer. Rem"),
        ([{"prompt": "p"}], {}, r"no column response"),
    ],
)
def test_responses_that_cannot_be_used_are_named(answers, rows, settings, words):
    with pytest.raises(DataError, match=words):
        answers(rows, **settings)


def test_a_conversation_that_the_template_rewrites_is_dropped_and_counted_or_an_error(answers, monkeypatch, caplog):
    template = (
        "{% if messages | length > 2 %}{{ messages | length }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    talk = user("one") + assistant("two") + user("three") + assistant("four")
    rows = [{"talk": user("one") + assistant("two")}, {"talk": talk}]
    train, _ = answers(rows, messages="talk")
    assert set(texts(train)) == {"<user>one<assistant>two<eos>"}
    reason = "the chat template writes the messages before an answer differently if the answer follows"
    assert f"dropped 1 of 3 examples: 1 ({reason})" in caplog.text
    with pytest.raises(DataError, match=rf"line 2, column talk: {reason}. Remove the row, or set data.unusable"):
        answers(rows, messages="talk", unusable="error")
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ messages | length }}{{ messages[0].content }}")
    with pytest.raises(DataError, match=rf"{reason}\)\. Use a tokenizer with another chat template, or give plain"):
        answers(rows, messages="talk")


def test_an_answer_keeps_its_own_line_breaks_though_the_tokenizer_would_join_them(tmp_path):
    """In sampling the prompt's tokens are given, the template's last line break among them."""
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "\n": 1, "\n\n": 2, "q": 3, "a": 4}, merges=[("\n", "\n")]))
    template = (
        "{% for m in messages %}q{{ '\\n' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}q{{ '\\n' }}{% endif %}"
    )
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template)
    path = written(tmp_path, [{"talk": user("q") + assistant(answer)} for answer in ("a", "\na", "\n\na")])
    train, _ = load_answers(AnswersConfig(path=path, messages="talk"), joining, heldout=0, context=None)
    assert sorted(train.tokens) == [[3, 1, 3, 3, 1, *answer, 4, 0] for answer in ([1], [2], [])]


def test_nothing_is_said_of_data_that_is_all_used(pairs, caplog):
    caplog.set_level(logging.WARNING, logger="fastppo")
    pairs([pair("p", "a", "b")])
    assert not caplog.records
