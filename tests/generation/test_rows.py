"""Scored responses as columns, and the Parquet parts that hold them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import finished_talks
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch

from fastppo.config import PtxConfig
from fastppo.data import DataError, Prompts, PromptSet, Rollout, Scored, load_texts, pack, read_scored
from fastppo.distributed import World
from fastppo.errors import log_once
from fastppo.generation import Parts, columns_left_out, part_schema, scored_rows
from fastppo.generation.lines import Lines

TOKENIZER = tiny.tokenizer()
ALONE = World(0, 1, torch.device("cpu"))
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]
COLUMNS = {"prompt": ["a", "b", "c"], "answer": [1, 2, 3], "score": ["x", "y", "z"]}


def prompt_set(columns: dict[str, list[Any]] | None = None, chat: bool = False) -> PromptSet:
    texts = ("a", "b", "c")
    messages = (None, CHAT, None) if chat else ()
    return PromptSet(
        tuple(tuple(TOKENIZER(t)["input_ids"]) for t in texts), texts, COLUMNS if columns is None else columns, messages
    )


def scored(prompts: Prompts, responses: list[str], sources: int = 1, judge: bool = False) -> Scored:
    ids = [[*TOKENIZER(text)["input_ids"], 0] for text in responses]
    packed = pack([(*p, *r) for p, r in zip(prompts.tokens, ids, strict=True)], [len(r) for r in ids])
    logprobs = -torch.arange(len(packed.responses), dtype=torch.float32) / 3
    ended = torch.tensor([i % 2 == 0 for i in range(len(ids))])
    by_source = torch.arange(len(ids) * sources, dtype=torch.float32).view(len(ids), sources) / 7
    judged = torch.arange(len(ids)).float() if judge else torch.full((len(ids),), torch.nan)
    return Scored(Rollout(packed, logprobs, ended, prompts.sources), by_source, by_source.sum(1), judged)


def batch(data: PromptSet, rows: list[int], samples: int = 2, first: int = 0, **kind: Any) -> dict[str, list[Any]]:
    prompts = Prompts.of(data.tokens, rows, first=first, samples=samples)
    made = scored(prompts, [f"r{i}" for i in range(len(prompts))], **kind)
    return scored_rows(made, prompts, data, TOKENIZER, samples)


def test_a_row_has_the_response_its_scores_and_what_the_data_says_of_its_prompt():
    rows = batch(prompt_set(), [2, 0], first=4, sources=2, judge=True)
    names = ["prompt", "prompt_index", "sample", "response", "tokens", "logprobs", "score", "score/0", "score/1"]
    assert list(rows) == [*names, "judge", "ended", "answer"]
    assert rows["prompt"] == ["c", "c", "a", "a"] and rows["answer"] == [3, 3, 1, 1]
    assert rows["prompt_index"] == [4, 4, 5, 5] and rows["sample"] == [0, 1, 0, 1]
    assert rows["response"] == ["r0", "r1", "r2", "r3"] and rows["ended"] == [True, False, True, False]
    assert [TOKENIZER.decode(ids) for ids in rows["tokens"]] == ["r0<eos>", "r1<eos>", "r2<eos>", "r3<eos>"]
    assert [len(part) for part in rows["logprobs"]] == [3] * 4 and rows["logprobs"][1][0] == -1
    assert rows["score"] == pytest.approx([1 / 7, 5 / 7, 9 / 7, 13 / 7])
    assert rows["score/1"] == pytest.approx([1 / 7, 3 / 7, 5 / 7, 1]) and rows["judge"] == [0, 1, 2, 3]


def test_what_is_not_there_is_no_column():
    assert not {"score/0", "judge"} & set(batch(prompt_set(), [0]))
    assert "score" not in batch(prompt_set(), [0], sources=0)


def test_chats_are_written_as_messages_and_text_as_text():
    assert batch(prompt_set(chat=True), [0, 1], samples=1)["prompt"] == ["a", CHAT]


def test_columns_whose_names_are_taken_are_left_out():
    assert columns_left_out(prompt_set(), "prompt") == ["score"]
    assert columns_left_out(prompt_set(), "score") == ["prompt"]


def test_responses_in_another_order_than_the_prompts_are_no_rows():
    data = prompt_set()
    prompts = Prompts.of(data.tokens, [0, 1])
    with pytest.raises(ValueError, match="order"):
        scored_rows(scored(prompts, ["r", "s"]), Prompts.of(data.tokens, [1, 0]), data, TOKENIZER, 1)


# Parts


def parts(folder: Path, data: PromptSet, sources: int = 1, judge: bool = False) -> Parts:
    return Parts(folder, part_schema(data, sources=sources, judge=judge), ALONE)


@pytest.mark.parametrize("judge", [True, False])
@pytest.mark.parametrize("sources", [1, 2])
def test_parts_are_read_as_they_were_written(tmp_path, sources, judge):
    data, kind = prompt_set(), {"sources": sources, "judge": judge}
    made = parts(tmp_path, data, **kind)
    written = [batch(data, [k], first=k, **kind) for k in range(3)]
    for number, rows in enumerate(written):
        made.write(number, rows)
    assert made.rows() == [2, 2, 2] == parts(tmp_path, data, **kind).rows()
    found = read_scored(tmp_path, leave_out=()).table.columns
    assert found == {name: [x for rows in written for x in rows[name]] for name in written[0]}


def test_types_are_those_of_the_whole_data_and_not_of_the_rows_of_a_part(tmp_path):
    columns = {
        "sometimes": [None, 1.5, 2.0],
        "never": [None, None, None],
        "nested": [[], [{"a": 1}], None],
        "whole": [1, 2, 3],
    }
    data = prompt_set(columns)
    made = parts(tmp_path, data)
    for number in range(3):
        made.write(number, batch(data, [number], samples=1, first=number))
    assert made.rows() == [1, 1, 1]
    schemas = [pyarrow.parquet.read_schema(made.path(number)) for number in range(3)]
    assert schemas[0].equals(schemas[1]) and schemas[0].equals(schemas[2])
    table = read_scored(tmp_path).table.columns
    assert {name: table[name] for name in columns} == columns


def test_values_of_several_types_become_json_and_the_log_says_so(tmp_path, caplog):
    columns = {"mixed": [1, "one", None], "empty": [{}, {}, {}], "large": [10**30, 1, 2]}
    data = prompt_set(columns)
    made = parts(tmp_path, data)
    made.write(0, batch(data, [0, 1, 2], samples=1))
    table = read_scored(tmp_path).table.columns
    assert {n: [x and json.loads(x) for x in table[n]] for n in columns} == columns
    assert [record.args[0] for record in caplog.records] == ["mixed", "empty", "large"]
    assert parts(tmp_path, data).rows() == [3]


def test_prompts_and_values_that_no_column_holds_are_errors():
    with pytest.raises(DataError, match="prompts cannot be one column of Parquet"):
        part_schema(prompt_set(chat=True), sources=1, judge=False)
    with pytest.raises(DataError, match=r"the column odd of the data holds .*neither as Parquet nor as JSON"):
        part_schema(prompt_set({"odd": [1, "a", object()]}), sources=1, judge=False)


def test_parts_are_counted_to_the_first_that_is_missing_and_the_others_removed(tmp_path):
    data = prompt_set()
    made = parts(tmp_path, data)
    for number in (0, 1, 3):
        made.write(number, batch(data, [0], first=number))
    (tmp_path / ".unfinished-part-00002.parquet").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert made.rows() == [2, 2]
    made.remove_from(1)
    assert made.rows() == [2] and sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "part-00000.parquet"]


def test_a_part_that_is_damaged_or_of_another_run_is_named(tmp_path):
    data = prompt_set()
    made = parts(tmp_path, data)
    made.write(0, batch(data, [0]))
    with pytest.raises(DataError, match=r"part-00000.parquet has other columns than this run writes"):
        parts(tmp_path, data, judge=True).rows()
    made.path(0).write_bytes(made.path(0).read_bytes()[:100])
    with pytest.raises(DataError, match=r"part-00000.parquet cannot be read .*Delete it"):
        made.rows()


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_parts_and_no_draft(tmp_path, monkeypatch, where):
    data = prompt_set()
    made = parts(tmp_path, data)
    made.write(0, batch(data, [0]))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __init__(self, file: Any):
            self._file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *raised: object) -> None:
            self._file.close()

        def write(self, content: Any) -> None:
            self._file.write(bytes(content)[:100])
            full()

    with monkeypatch.context() as patch:
        if where == "write":
            opened = Path.open
            patch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
        else:
            patch.setattr(*{"fsync": (os, "fsync", full), "rename": (Path, "rename", full)}[where])
        with pytest.raises(DataError, match=r"part-00001.parquet cannot be written \(No space left on device\).*whole"):
            made.write(1, batch(data, [1], first=1))
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"] and made.rows() == [2]
    made.write(1, batch(data, [1], first=1))
    assert made.rows() == [2, 2]


# Conversations with an environment


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


def asked() -> PromptSet:
    """Prompts of chat, one of whose messages has a key of its own."""
    prompts = finished_talks.PROMPTS
    chats = tuple(
        [{"role": "user", "content": text} | ({"mood": 3} if not i else {})] for i, text in enumerate(prompts)
    )
    return PromptSet(tuple(tuple(TOKENIZER(t)["input_ids"]) for t in prompts), prompts, {}, chats)


def conversations() -> dict[str, list[Any]]:
    """The rows of conversations in one of which the policy calls a tool."""
    data, rollout = asked(), finished_talks.rollout()
    assert rollout.conversations is not None
    for conversation, chat in zip(rollout.conversations, data.messages, strict=True):
        conversation[0] = chat[0]
    rollout.conversations[0][1]["tool_calls"] = [CALL]
    rollout.conversations[0][2] |= {"role": "tool", "hidden": 1}
    sums = rollout.rewards_of_turns.float()
    made = Scored(rollout, sums[:, None], sums, torch.full((3,), torch.nan), torch.zeros(3))
    return scored_rows(made, Prompts.of(data.tokens, range(3)), data, TOKENIZER, 1)


def test_a_row_has_its_conversation_and_the_rewards_of_its_turns():
    rows = conversations()
    assert list(rows)[3:8] == ["response", "tokens", "logprobs", "conversation", "turn_rewards"]
    assert rows["response"] == finished_talks.TEXTS and rows["turn_rewards"] == [*map(list, finished_talks.REWARDS)]
    assert [TOKENIZER.decode(ids) for ids in rows["tokens"]] == ["abcd<eos>", "e<eos>", "fghi"]
    assert [len(part) for part in rows["logprobs"]] == [5, 2, 4] and rows["score"] == [-0.75, 2.0, 0.625]
    assert rows["conversation"][1] == [{"role": "user", "content": "three"}, {"role": "assistant", "content": "e"}]


def write_conversations(folder: Path, form: str) -> Path:
    if form == "jsonl":
        Lines(folder / "responses.jsonl", 1, ALONE).write(0, conversations())
        return folder / "responses.jsonl"
    schema = part_schema(asked(), sources=0, judge=False, environment=True)
    Parts(folder / "parts", schema, ALONE).write(0, conversations())
    return folder / "parts"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_supervised_learning_reads_the_conversations_that_were_written(tmp_path, form):
    path = write_conversations(tmp_path, form)
    assert read_scored(path).scores == [[-0.75], [2.0], [0.625]]
    texts = load_texts(PtxConfig(path=str(path), messages="conversation"), TOKENIZER, context=None)
    learned = [TOKENIZER.decode(part) for part in texts.packed.responses.split(texts.packed.response_lengths.tolist())]
    assert sorted(learned) == [f"{text}<eos>" for text in ("ab", "cd", "e", "f", "g", "hi")]
    wholes = [TOKENIZER.decode(part) for part in texts.packed.tokens.split(texts.packed.lengths.tolist())]
    assert "<user>one<assistant>ab<tool>?<assistant>cd<eos>" in wholes


def test_parquet_keeps_tool_calls_and_keys_of_prompts_and_says_what_it_leaves_out(tmp_path, caplog):
    log_once.cache_clear()
    first = read_scored(write_conversations(tmp_path, "parquet")).table.columns["conversation"][0]
    assert first[0]["mood"] == "3" and first[0]["tool_calls"] is None
    function = {"name": "add", "arguments": '{"a": 1, "b": [2]}'}
    assert first[1]["tool_calls"] == [{"id": None, "type": "function", "function": function}]
    assert "written without hidden of observations" in caplog.text


def test_conversations_that_json_cannot_hold_are_named(tmp_path):
    rows = conversations()
    rows["conversation"][2][2]["when"] = {1, 2}
    with pytest.raises(DataError, match=r"what rollout.environment said cannot be written as JSON"):
        Lines(tmp_path / "responses.jsonl", 1, ALONE).write(0, rows)
    assert not (tmp_path / "responses.jsonl").exists()
