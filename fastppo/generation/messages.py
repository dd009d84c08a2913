"""Conversations with an environment as a column of Parquet, in which all messages have the same keys.

Messages keep their role and content, their tool calls in OpenAI's form with the arguments as JSON text, and what the
prompts' messages have beside these, as text. What only an observation has is left out, and the log says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastppo.data import Messages, PromptSet
from fastppo.errors import log_once

KEYS = ("role", "content", "name", "tool_call_id")  # of messages, as text
CALLS = "tool_calls"


def conversation_type(data: PromptSet) -> Any:
    """The `pyarrow` type of a conversation whose prompt is one of these."""
    import pyarrow

    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", text)])
    call = pyarrow.struct([("id", text), ("type", text), ("function", function)])
    names = dict.fromkeys([*KEYS, *(name for chat in data.messages for message in chat or () for name in message)])
    keys = [(name, text) for name in names if name != CALLS]
    return pyarrow.list_(pyarrow.struct([*keys, (CALLS, pyarrow.list_(call))]))


def in_columns(conversation: Messages, kind: Any) -> Messages:
    """The messages with the keys of `conversation_type`, null where one has none."""
    names = [field.name for field in kind.value_type]
    if others := sorted({name for message in conversation for name in message if name not in names}):
        log_once(
            f"conversations are written without {', '.join(others)} of observations: a column of Parquet has no"
            " place for keys that no prompt has",
            logging.WARNING,
        )
    return [{name: _value(name, message.get(name)) for name in names} for message in conversation]


def _value(name: str, value: Any) -> Any:
    if name == CALLS:
        return None if value is None else [_call(call) for call in value]
    return value if value is None or isinstance(value, str) else _json(value)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    return {
        "id": call.get("id"),
        "type": call.get("type", "function"),
        "function": {
            "name": function.get("name"),
            "arguments": arguments if isinstance(arguments, str) else _json(arguments),
        },
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
