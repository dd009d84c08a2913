"""Encoding of prompts with answers, plain or chat, as in PPO: the tokens of a prompt, of an answer, and an EOS."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from fastppo.config import DataConfig, ExamplesConfig
from fastppo.data.continuation import encode_after, encode_behind, encode_parts, plain_tokens, special_ids
from fastppo.data.tables import DataError
from fastppo.distributed import strftime_now

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

NO_ARGUMENTS: Mapping[str, Any] = {}  # of a chat template
# the variables of a template that fastppo and transformers set
SET_VARIABLES = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
PLAIN_WITH_TOOLS = (
    "this is plain text, and only a chat template tells the model of data.tools. Set data.chat to always, give chat"
    " messages, or leave out data.tools."
)


class Answered(NamedTuple):
    """A prompt and an answer to it as tokens, or the reason why they cannot be used."""

    prompt: tuple[int, ...]  # up to the answer; for chat with the generation prompt of the template
    answer: tuple[int, ...]  # with the EOS, for chat with the token that ends a turn; empty if the answer has no text
    problem: str | None = None


def unusable(problem: str) -> Answered:
    return Answered((), (), problem)


def encode_answer(
    prompt: Any,
    answer: Any,
    config: ExamplesConfig,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    closed: bool = False,
) -> Answered:
    """Encode a prompt (text or messages) and an answer (text or messages); None is a missing value.

    closed: an answer of chat includes all that the template writes after the prompt, as a reward model reads it; False:
    it ends with the token at which sampling stops.

    An answer that is a list of messages has messages of the assistant only, or, if it starts with another role, is the
    whole conversation, and `prompt` is ignored. where: the row and the columns, for messages. Raises `DataError`.
    """
    whole_conversation = are_messages(answer) and answer[0]["role"] != "assistant"
    if _is_missing(prompt) and config.prompt is not None and not whole_conversation:
        return unusable("an empty prompt")
    if _is_missing(answer):
        return unusable("an empty answer")
    prompt = None if whole_conversation else prompt
    if config.chat == "always" or isinstance(prompt, list) or isinstance(answer, list):
        prompt_messages = [] if prompt is None else _as_messages(prompt, "user", config, where)
        messages = [*prompt_messages, *_as_messages(answer, "assistant", config, where)]
        return _last_turn(messages, config, where, tokenizer, closed=closed)
    for value in (prompt or "", answer):
        if not isinstance(value, str):
            raise _type_error(where, value)
    if config.tools:
        raise DataError(f"{where}: {PLAIN_WITH_TOOLS}")
    start = tuple(plain_tokens([prompt or ""], tokenizer)[0])
    text = encode_after([prompt or ""], [start], [answer], tokenizer)[0][-(config.last_tokens or 0) :]
    return Answered(start, (*text, _eos(tokenizer)) if config.eos else tuple(text))


def encode_turns(
    messages: Any, config: ExamplesConfig, where: str, tokenizer: PreTrainedTokenizerBase
) -> list[Answered]:
    """Encode each message of the assistant in a conversation as the answer to all messages before it.

    With `chat: never` the conversation is plain text, the contents of its messages one after another as they are, and
    an EOS ends the last message only: what ends an earlier turn is for its text to say.
    """
    if isinstance(messages, str):
        raise DataError(
            f"{where} contains text and no chat messages ({{role, content}}): {_start_of(messages)}. Name another"
            f" column, or set {config.group}.messages to null and name the columns of prompt and response."
        )
    if _is_missing(messages):
        return [unusable("an empty conversation")]
    if config.chat == "never":
        return _plain_turns(messages, config, where, tokenizer)
    messages = _as_messages(messages, "user", config, where)
    assistant_turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistant_turns:
        return [unusable("no message of the assistant")]
    return [_last_turn(messages[: i + 1], config, where, tokenizer) for i in assistant_turns]


def _plain_turns(value: Any, config: ExamplesConfig, where: str, tokenizer: PreTrainedTokenizerBase) -> list[Answered]:
    if not are_messages(value):
        raise _type_error(where, value)
    if any(calls_tools(message) for message in value):
        raise DataError(
            f"{where} has tool calls, which only a chat template writes, and {config.group}.chat is never. Set it to"
            " auto, or write the calls as text in the messages' content."
        )
    # The first part is empty, so that a conversation may begin with the assistant: it holds the BOS, if there is one.
    parts = encode_parts(["", *(message["content"] for message in value)], tokenizer)
    turns = [i for i, message in enumerate(value, start=1) if message["role"] == "assistant"]
    ends = {len(value): [_eos(tokenizer)]} if config.eos and parts[-1] else {}
    answered = [Answered(tuple(chain(*parts[:i])), (*parts[i], *ends.get(i, []))) for i in turns]
    return answered or [unusable("no message of the assistant")]


def are_messages(value: Any) -> bool:
    """Whether a value is a list of chat messages, each with a role and content that are text.

    The content may be null or missing where the assistant calls tools (`tool_calls`, a list).
    """
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) or (m.get("content") is None and calls_tools(m)) for m in value)
    )


def calls_tools(message: Mapping[str, Any]) -> bool:
    """Whether a message is a tool call of the assistant, perhaps with text."""
    calls = message.get("tool_calls")
    return message["role"] == "assistant" and isinstance(calls, list) and len(calls) > 0


def _is_missing(value: Any) -> bool:
    """Whether a value of a table is null, an empty list, or text without a visible character."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def template_tokens(
    messages: Messages,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_be_answered: bool,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> tuple[int, ...]:
    """Encode messages with the chat template of the tokenizer; to_be_answered: with the generation prompt.

    arguments: further arguments of the template, checked by `check_arguments`. Raises `DataError`.
    """
    text = template_text(messages, where, tokenizer, to_be_answered=to_be_answered, arguments=arguments)
    return rendered_tokens(text, tokenizer)


def template_text(
    messages: Messages,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_be_answered: bool,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> str:
    """The text that `template_tokens` encodes."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where} is chat, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer,"
            " plain text, or, to learn from whole conversations as plain text, a chat of never."
        )
    try:
        # An argument of this name replaces transformers' function of the same name.
        variables: Any = {"add_generation_prompt": to_be_answered, "strftime_now": strftime_now, **arguments}
        return str(tokenizer.apply_chat_template(_as_templates_read(messages), tokenize=False, **variables))
    except Exception as error:  # a template may raise any exception
        others = {name: value for name, value in arguments.items() if name != "tools"}  # which are long
        used = f" (with {json.dumps(others)})" if others else ""
        raise DataError(f"{where} is refused by the tokenizer's chat template{used}: {error}") from error


def template_arguments(config: DataConfig | ExamplesConfig) -> Mapping[str, Any]:
    """The arguments of the chat template beside the messages: `data.template` and `data.tools`."""
    return config.template | ({"tools": list(config.tools)} if config.tools else {})


def check_template(config: DataConfig | ExamplesConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError if the tokenizer's chat template does not read `data.template` or `data.tools`."""
    check_arguments("data.template", config.template, tokenizer)
    given = template_arguments(config)
    if config.tools and (tokenizer.chat_template is None or "tools" not in template_variables(tokenizer, given)):
        names = ", ".join(tool["function"]["name"] for tool in config.tools)
        raise DataError(
            f"data.tools has {names}, but the tokenizer has no chat template that reads tools. Use a model with one, or"
            " describe the tools in the prompts and leave out data.tools."
        )


def _as_templates_read(messages: Messages) -> Messages:
    """The messages without keys that are null, with content, and with the arguments of tool calls as objects.

    Tables give every message the same keys, null where it has none, and a template that asks whether a message has tool
    calls takes that for yes; a message of tool calls may lack content; and arguments as JSON text, as in OpenAI's API,
    would be quoted a second time.
    """
    read = []
    for message in messages:
        kept: dict[str, Any] = {"content": ""} | {k: value for k, value in message.items() if value is not None}
        if kept.get("tool_calls"):
            kept["tool_calls"] = [_with_object(call) for call in kept["tool_calls"]]
        read.append(kept)
    return read


def _with_object(call: Any) -> Any:
    """A tool call with its arguments as an object, if they are the text of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        changed = function | {"arguments": json.loads(arguments)}
    except ValueError:
        return call
    return call | {"function": changed} if "function" in call else changed


def check_arguments(setting: str, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for arguments that the tokenizer's chat template does not read; setting: that gives them."""
    if not arguments:
        return
    if tokenizer.chat_template is None:
        raise DataError(
            f"{setting} is {json.dumps(dict(arguments))}, but the tokenizer has no chat template to read it."
        )
    read = template_variables(tokenizer, arguments)
    for name in arguments:
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1)
            way = f"did you mean {near[0]}?" if near else f"it reads {', '.join(sorted(read)) or 'none'}."
            raise DataError(f"{setting} has {name}, which the tokenizer's chat template does not read; {way}")


def template_variables(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> set[str]:
    """The names of the variables in the tokenizer's chat template that the user may set."""
    from jinja2 import Environment, meta  # transformers renders templates with it

    template = tokenizer.get_chat_template(None, arguments.get("tools"))
    marks = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers that does not change the text
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(marks.sub("", template))
    return set(meta.find_undeclared_variables(parsed)) - SET_VARIABLES


def rendered_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a text that contains its special tokens, or should have none."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_messages(value: Any, role: str, config: ExamplesConfig, where: str) -> Messages:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not are_messages(messages):
        raise _type_error(where, value)
    if config.chat == "never":
        raise DataError(
            f"{where} is a list of chat messages, and {config.group}.chat is never. Set it to auto or always."
        )
    return list(messages)


def _last_turn(
    messages: Messages,
    config: ExamplesConfig,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    closed: bool = False,
) -> Answered:
    """Encode the last message as the answer to the messages before it.

    The answer is the text that the template adds to the prompt, up to the token that ends the turn: sampling stops
    there, so the line break that many templates write after it is never sampled. closed: the whole text.
    """
    if messages[-1]["role"] != "assistant":
        return unusable("the last message is not the assistant's")
    if len(messages) == 1:
        return unusable("no message before the assistant's")
    prompt_text = template_text(
        messages[:-1], where, tokenizer, to_be_answered=True, arguments=template_arguments(config)
    )
    prompt = rendered_tokens(prompt_text, tokenizer)
    if not (messages[-1].get("content") or "").strip() and not calls_tools(messages[-1]):
        return Answered(prompt, ())
    whole_text = template_text(messages, where, tokenizer, to_be_answered=False, arguments=template_arguments(config))
    if not whole_text.startswith(prompt_text):
        return unusable("the chat template writes the messages before an answer differently if the answer follows")
    if closed and config.eos:
        return _split(prompt, rendered_tokens(whole_text, tokenizer))
    answer = _up_to_end_of_turn(_answer_tokens(prompt, prompt_text, whole_text, tokenizer), tokenizer)
    return Answered(prompt, answer if config.eos else answer[:-1])


def _split(prompt: Sequence[int], whole: tuple[int, ...]) -> Answered:
    """Split a whole conversation at the first token that differs from the prompt."""
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return Answered(whole[:shared], whole[shared:])


def _answer_tokens(
    prompt: tuple[int, ...], prompt_text: str, whole_text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The tokens of the text that `whole_text` adds to `prompt_text`; prompt: the tokens of the latter.

    A tokenizer may merge the last line break of the template with a line break at the start of the answer. In sampling
    this cannot happen, because the tokens of the prompt are fixed: then the answer is encoded separately.
    """
    tokens = rendered_tokens(whole_text, tokenizer)
    if tokens[: len(prompt)] == prompt:
        return tokens[len(prompt) :]
    return tuple(encode_behind([prompt], [whole_text.removeprefix(prompt_text)], tokenizer)[0])


def _up_to_end_of_turn(answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The answer up to its last special token if only white space follows, else the answer and an EOS."""
    special = special_ids(tokenizer)
    last = max((i for i, token in enumerate(answer) if token in special), default=None)
    if last is not None and not str(tokenizer.decode(list(answer[last + 1 :]))).strip():
        return tuple(answer[: last + 1])
    return (*answer, _eos(tokenizer))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer ({type(tokenizer).__name__}) has no EOS token to end an answer with.")
    return int(tokenizer.eos_token_id)


def _type_error(where: str, value: Any) -> DataError:
    return DataError(
        f"{where}: {_start_of(value)} is neither text nor chat messages ({{role, content}}). Correct or remove the row,"
        " or name another column."
    )


def _start_of(value: Any) -> str:
    """The first characters and the type of a value, for messages."""
    return f"{str(value)[:80]!r} ({type(value).__name__})"
