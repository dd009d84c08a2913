"""Prompts with answers, plain or chat, as the tokens that PPO will meet: a prompt, an answer, and the EOS behind it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastppo.config import ExamplesConfig
from fastppo.data.continuation import encode_after, encode_behind, plain_tokens, special_ids
from fastppo.data.tables import DataError
from fastppo.distributed import strftime_now

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

NO_ARGUMENTS: Mapping[str, Any] = {}  # of a chat template
OURS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}  # what a template reads from us


class Answered(NamedTuple):
    """A prompt and an answer to it, or why they cannot be learned from."""

    prompt: tuple[int, ...]  # ends where the answer begins; of chat, with the template's words for that
    answer: tuple[int, ...]  # with the EOS, or of chat the token that ends a turn; empty if the answer has no text
    problem: str | None = None


def unusable(problem: str) -> Answered:
    return Answered((), (), problem)


def answered(
    prompt: Any,
    answer: Any,
    config: ExamplesConfig,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    closed: bool = False,
) -> Answered:
    """The tokens of a prompt (text or messages) and an answer (text or messages); None is a missing value.

    closed: an answer of chat is all that the template writes behind the prompt, as a reward model reads it, and not up
    to the token at which sampling stops.

    Messages as an answer are the assistant's, or the whole conversation if they begin with another role; `prompt` is
    not looked at then. where: for errors, the row and the columns. Raises `DataError`.
    """
    whole = are_messages(answer) and answer[0]["role"] != "assistant"
    if _is_missing(prompt) and config.prompt is not None and not whole:
        return unusable("an empty prompt")
    if _is_missing(answer):
        return unusable("an empty answer")
    prompt = None if whole else prompt
    if config.chat == "always" or isinstance(prompt, list) or isinstance(answer, list):
        asked = [] if prompt is None else _as_messages(prompt, "user", config, where)
        messages = [*asked, *_as_messages(answer, "assistant", config, where)]
        return _last_turn(messages, config, where, tokenizer, closed=closed)
    for value in (prompt or "", answer):
        if not isinstance(value, str):
            raise _neither(where, value)
    start = tuple(plain_tokens([prompt or ""], tokenizer)[0])
    text = encode_after([prompt or ""], [start], [answer], tokenizer)[0][-(config.last_tokens or 0) :]
    return Answered(start, (*text, _eos(tokenizer)) if config.eos else tuple(text))


def turns(messages: Any, config: ExamplesConfig, where: str, tokenizer: PreTrainedTokenizerBase) -> list[Answered]:
    """Each message of the assistant in a conversation, as the answer to all that stands before it."""
    if isinstance(messages, str):
        raise DataError(
            f"{where} holds text and no chat messages ({{role, content}}): {_shown(messages)}. Name another column, or"
            f" set {config.group}.messages to null and name those of prompt and response."
        )
    if _is_missing(messages):
        return [unusable("an empty conversation")]
    messages = _as_messages(messages, "user", config, where)
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        return [unusable("no message of the assistant")]
    return [_last_turn(messages[: i + 1], config, where, tokenizer) for i in spoken]


def are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def _is_missing(value: Any) -> bool:
    """Whether a table's value is null, or says nothing."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def template_tokens(
    messages: Messages,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_be_answered: bool,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> tuple[int, ...]:
    """Messages through the tokenizer's chat template; `to_be_answered`: with its words for where an answer begins.

    arguments: further ones of the template, which `check_arguments` has seen. Raises `DataError`.
    """
    text = template_text(messages, where, tokenizer, to_be_answered=to_be_answered, arguments=arguments)
    return _tokens(text, tokenizer)


def template_text(
    messages: Messages,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    to_be_answered: bool,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> str:
    """What `template_tokens` makes tokens of."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where} is chat, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or"
            " plain text with a chat of auto or never."
        )
    try:
        # What a template is given by name goes before transformers' own function of that name.
        given: Any = {"add_generation_prompt": to_be_answered, "strftime_now": strftime_now, **arguments}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
    except Exception as error:  # a template may raise what it likes
        named = f" (given {json.dumps(dict(arguments))})" if arguments else ""
        raise DataError(f"{where} is refused by the tokenizer's chat template{named}: {error}") from error


def check_arguments(setting: str, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for arguments that the tokenizer's chat template does not read; setting: what gives them."""
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
    """The names that the tokenizer's chat template reads and that are the user's to give."""
    from jinja2 import Environment, meta  # which transformers renders templates with

    template = tokenizer.get_chat_template(None, arguments.get("tools"))
    marks = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag, without a meaning for the text
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(marks.sub("", template))
    return set(meta.find_undeclared_variables(parsed)) - OURS


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Of text that has its special tokens already, or is to have none."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_messages(value: Any, role: str, config: ExamplesConfig, where: str) -> Messages:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not are_messages(messages):
        raise _neither(where, value)
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
    """The last message as the answer to those before it.

    An answer is what the template adds to the prompt, up to the token that ends the turn: sampling stops there, so the
    line break that many templates write behind it is never seen. closed: with all that the template writes.
    """
    if messages[-1]["role"] != "assistant":
        return unusable("the last message is not the assistant's")
    if len(messages) == 1:
        return unusable("no message before the assistant's")
    asked = template_text(messages[:-1], where, tokenizer, to_be_answered=True, arguments=config.template)
    prompt = _tokens(asked, tokenizer)
    if not messages[-1]["content"].strip():
        return Answered(prompt, ())
    whole = template_text(messages, where, tokenizer, to_be_answered=False, arguments=config.template)
    if not whole.startswith(asked):
        return unusable("the chat template writes the messages before an answer in another way once it is there")
    if closed and config.eos:
        return _parted(prompt, _tokens(whole, tokenizer))
    answer = _ended(_behind(prompt, asked, whole, tokenizer), tokenizer)
    return Answered(prompt, answer if config.eos else answer[:-1])


def _parted(prompt: Sequence[int], whole: tuple[int, ...]) -> Answered:
    """A conversation as it is read whole, parted where its tokens are no longer the prompt's."""
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return Answered(whole[:shared], whole[shared:])


def _behind(prompt: tuple[int, ...], asked: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of what `whole` adds to `asked`, whose own are `prompt`.

    Tokenizers may join the template's last line break with one that the answer begins with. In sampling that cannot be,
    since the prompt is given: the answer's tokens are its own then.
    """
    tokens = _tokens(whole, tokenizer)
    if tokens[: len(prompt)] == prompt:
        return tokens[len(prompt) :]
    return tuple(encode_behind([prompt], [whole.removeprefix(asked)], tokenizer)[0])


def _ended(answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    special = special_ids(tokenizer)
    last = max((i for i, token in enumerate(answer) if token in special), default=None)
    if last is not None and not str(tokenizer.decode(list(answer[last + 1 :]))).strip():
        return tuple(answer[: last + 1])
    return (*answer, _eos(tokenizer))


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer ({type(tokenizer).__name__}) has no EOS token, with which an answer ends.")
    return int(tokenizer.eos_token_id)


def _neither(where: str, value: Any) -> DataError:
    return DataError(
        f"{where}: {_shown(value)} is neither text nor chat messages ({{role, content}}). Correct or remove the row, or"
        " name another column."
    )


def _shown(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"
