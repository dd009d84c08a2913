"""Tool calls in what the actor writes: found, read and checked against the tools that it was told of.

Two forms are read, as chat templates teach them:

- `hermes` (Hermes, Qwen): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, with text
  before, between and behind them, which is the turn's content.
- `llama3`: `{"name": ..., "parameters": {...}}` as the whole turn, or behind `<|python_tag|>`, before which there may
  be text; several are separated by `;`. A turn that starts with `{` is a call if the object has the key "name", or,
  where it cannot be read, if `"name"` is in it; any other is text. Behind `<|python_tag|>` all is a call.

A thought is no place for calls: they are looked for behind the first `</think>`, and not at all in a turn that starts
with a `<think>` that never ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastppo.config import DataConfig
from fastppo.data import SURROGATE, DataError, decode_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToolForm = Literal["hermes", "llama3"]

OPEN, CLOSE, TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
THOUGHT, THOUGHT_END = "<think>", "</think>"
# What a call is made of, which is a special token in some vocabularies and none in others.
MARKERS: Mapping[ToolForm, tuple[str, ...]] = {
    "hermes": (OPEN, CLOSE, THOUGHT, THOUGHT_END),
    "llama3": (TAG, THOUGHT, THOUGHT_END),
}
ARGUMENTS: Mapping[ToolForm, str] = {"hermes": "arguments", "llama3": "parameters"}  # the key that holds them
SHOWN = 20  # characters of a text that a problem shows


class Call(NamedTuple):
    """A call of a tool, as JSON values."""

    name: str
    arguments: dict[str, Any]


class ToolCalls(NamedTuple):
    """What a turn of the actor consists of. With a problem there are no calls, not even those that could be read."""

    content: str  # the text outside of calls, without white space around it
    calls: tuple[Call, ...] = ()
    problem: str | None = None  # a sentence to the actor: what is wrong with its call


class _Malformed(ValueError):
    """What is wrong with a call, as the end of a sentence."""


def tool_form(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> ToolForm:
    """The form of calls that `data.tool_format` names, or, if it is auto, the one that the chat template teaches.

    Raises DataError for a template that teaches neither.
    """
    if config.tool_format != "auto":
        return config.tool_format
    template = tokenizer.get_chat_template(None, list(config.tools)) if tokenizer.chat_template is not None else ""
    others = "<function=" in template or "<arg_key>" in template  # of Qwen3-Coder and GLM: between <tool_call> too
    if OPEN in template and '"arguments' in template.replace("\\", "") and not others:
        return "hermes"
    if '"parameters' in template.replace("\\", "") and (TAG in template or "ipython" in template) and not others:
        return "llama3"
    raise DataError(
        "data.tool_format is auto, and the tokenizer's chat template shows neither calls between <tool_call> and"
        " </tool_call> (hermes) nor with <|python_tag|> or the role ipython (llama3). Set data.tool_format to the form"
        " in which the actor shall write calls, or use a model whose template has one of them."
    )


def call_texts(
    prompts: Sequence[Sequence[int]],
    turns: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    form: ToolForm,
) -> list[str]:
    """The text of each turn as `parse_calls` reads it: without special tokens, except for those of which calls consist.

    prompts: the tokens before each turn. `<tool_call>` is a special token in some vocabularies, and so is Llama-3's
    `<|python_tag|>`; the token that ends a turn is one in all, and is no part of a call.
    """
    return decode_after(prompts, turns, tokenizer, shown=MARKERS[form])


def parse_calls(text: str, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> ToolCalls:
    """Read the tool calls in the text of a turn, which is from `call_texts`.

    tools: JSON schemas of the functions (`data.tools`). Of a call are checked: the JSON, the tool's name, that the
    arguments are an object, and that those that the schema requires are there; their types are for the environment.
    """
    thought, mark, answer = text.partition(THOUGHT_END)
    if not mark:
        if text.lstrip().startswith(THOUGHT):
            return ToolCalls(text.strip())
        thought, answer = "", text
    required = {tool["function"]["name"]: _required(tool["function"]) for tool in tools}
    read = _hermes if form == "hermes" else _llama3
    outside: list[str] = [thought + mark]
    try:
        calls = read(answer, outside, required)
    except _Malformed as malformed:
        return ToolCalls(text.strip(), (), f"The tool call was not made: {malformed}.")
    return ToolCalls("".join(outside).strip(), calls)


def _required(function: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple((function.get("parameters") or {}).get("required") or ())


def _hermes(text: str, outside: list[str], required: Mapping[str, tuple[str, ...]]) -> tuple[Call, ...]:
    """The calls in a text; `outside` receives what is outside of them."""
    calls: list[Call] = []
    while True:
        before, opened, behind = text.partition(OPEN)
        if CLOSE in before:
            raise _Malformed(f"there is a {CLOSE} without a {OPEN} before it")
        outside.append(before)
        if not opened:
            return tuple(calls)
        if CLOSE not in behind:
            raise _Malformed(f"{OPEN} is not closed; write {CLOSE} after the JSON object")
        value, end = _read(behind, f"a JSON object between {OPEN} and {CLOSE}")
        calls.append(_call(value, "hermes", required))
        rest = behind[end:].lstrip()
        if not rest.startswith(CLOSE):
            raise _Malformed(f"{CLOSE} must follow the JSON object, not {_start_of(rest)}")
        text = rest.removeprefix(CLOSE)


def _llama3(text: str, outside: list[str], required: Mapping[str, tuple[str, ...]]) -> tuple[Call, ...]:
    """The calls in a text; `outside` receives what is outside of them."""
    before, tagged, behind = text.partition(TAG)
    rest = (behind if tagged else before).strip()
    if not tagged and not _looks_like_a_call(rest):
        outside.append(text)
        return ()
    outside.append(before if tagged else "")
    calls: list[Call] = []
    while True:
        value, end = _read(rest, f"a JSON object behind {TAG}" if tagged else "a JSON object")
        calls.append(_call(value, "llama3", required))
        rest = rest[end:].lstrip()
        if not rest:
            return tuple(calls)
        if not rest.startswith(";"):
            raise _Malformed(f"nothing may follow a call but ; and another call, and there is {_start_of(rest)}")
        rest = rest[1:].lstrip()


def _looks_like_a_call(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        value, _ = _read(text, "")
    except _Malformed:
        return '"name"' in text
    return "name" in value


def _read(text: str, wanted: str) -> tuple[dict[str, Any], int]:
    """The JSON object with which a text starts, and the position behind it; wanted: what should stand there."""
    start = len(text) - len(text.lstrip())
    if not text.startswith("{", start):
        raise _Malformed(f"{wanted} is needed, and there is {_start_of(text[start:])}")
    try:
        value, end = DECODER.raw_decode(text, start)
        halves = SURROGATE.search(json.dumps(value, ensure_ascii=False))
    except json.JSONDecodeError as error:
        place = f"at character {error.pos - start + 1}, {_start_of(text[error.pos :])}"
        raise _Malformed(f"its JSON is wrong {place}: {error.msg}") from error
    except RecursionError as error:
        raise _Malformed("its JSON has too many brackets within each other") from error
    except ValueError as error:  # of a number
        raise _Malformed(f"its JSON has a number that cannot be used: {str(error)[:60]}") from error
    if halves:
        raise _Malformed("its JSON has half of a character (a \\ud... without its other half)")
    return value, end


def _call(value: dict[str, Any], form: ToolForm, required: Mapping[str, tuple[str, ...]]) -> Call:
    """The call that a JSON object is; other keys than the two are left alone (Llama-3 likes to write a "type")."""
    key, other = ARGUMENTS[form], next(ARGUMENTS[each] for each in ARGUMENTS if each != form)
    name = value.get("name")
    if not isinstance(name, str):
        raise _Malformed(f'the name of the tool is missing; write {{"name": ..., "{key}": {{...}}}}')
    if name not in required:
        raise _Malformed(f"there is no tool {name[:40]} (the tools are: {', '.join(required)})")
    if key not in value and other in value:
        raise _Malformed(f'the key of the arguments is "{key}", not "{other}"')
    arguments = value.get(key, {})
    if not isinstance(arguments, dict):
        raise _Malformed(f'"{key}" must be a JSON object, {{...}}, not {_start_of(json.dumps(arguments))}')
    if missing := [argument for argument in required[name] if argument not in arguments]:
        raise _Malformed(f"{name} needs {', '.join(missing)} in its {key}")
    return Call(name, arguments)


def _start_of(text: str) -> str:
    """The first characters of a text, for a problem."""
    return repr(text[:SHOWN] + "..." * (len(text) > SHOWN)) if text else "nothing"


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
