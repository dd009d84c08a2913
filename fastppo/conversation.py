"""Prompts with answers, plain or chat, as the tokens that PPO will meet: a prompt, an answer, and the EOS behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastppo.clock import strftime_now
from fastppo.config import ExamplesConfig
from fastppo.table import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


class Answered(NamedTuple):
    """A prompt and an answer to it, or why they cannot be learned from."""

    prompt: tuple[int, ...]  # ends where the answer begins; of chat, with the template's words for that
    answer: tuple[int, ...]  # with the EOS, or of chat the token that ends a turn; empty if the answer has no text
    problem: str | None = None


def unusable(problem: str) -> Answered:
    return Answered((), (), problem)


def answered(
    prompt: Any, answer: Any, config: ExamplesConfig, where: str, tokenizer: PreTrainedTokenizerBase
) -> Answered:
    """The tokens of a prompt (text or messages) and an answer (text or messages); None is a missing value.

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
        return _last_turn([*asked, *_as_messages(answer, "assistant", config, where)], config, where, tokenizer)
    for value in (prompt or "", answer):
        if not isinstance(value, str):
            raise _neither(where, value)
    start = tuple(plain_tokens([prompt or ""], tokenizer)[0])
    text = tokenizer(answer, add_special_tokens=False)["input_ids"][-(config.last_tokens or 0) :]
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


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts in which prompts begin, with the BOS if the tokenizer puts one before a text; none gets a second one."""
    if not texts:  # tokenizers take no empty list
        return []
    encoded, bos = tokenizer(list(texts), return_attention_mask=False)["input_ids"], tokenizer.bos_token_id
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]


def _is_missing(value: Any) -> bool:
    """Whether a table's value is null, or says nothing."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def template_tokens(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, *, to_be_answered: bool
) -> tuple[int, ...]:
    """Messages through the tokenizer's chat template; `to_be_answered`: with its words for where an answer begins."""
    return _tokens(template_text(messages, where, tokenizer, to_be_answered=to_be_answered), tokenizer)


def template_text(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, *, to_be_answered: bool) -> str:
    """What `template_tokens` makes tokens of."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where} is chat, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or"
            " plain text with a chat of auto or never."
        )
    try:
        # What a template is given by name goes before transformers' own function of that name.
        given: Any = {"add_generation_prompt": to_be_answered, "strftime_now": strftime_now}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
    except Exception as error:  # a template may raise what it likes
        raise DataError(f"{where} is refused by the tokenizer's chat template: {error}") from error


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


def _last_turn(messages: Messages, config: ExamplesConfig, where: str, tokenizer: PreTrainedTokenizerBase) -> Answered:
    """The last message as the answer to those before it.

    An answer is what the template adds to the prompt, up to the token that ends the turn: sampling stops there, so the
    line break that many templates write behind it is never seen.
    """
    if messages[-1]["role"] != "assistant":
        return unusable("the last message is not the assistant's")
    if len(messages) == 1:
        return unusable("no message before the assistant's")
    asked = template_text(messages[:-1], where, tokenizer, to_be_answered=True)
    prompt = _tokens(asked, tokenizer)
    if not messages[-1]["content"].strip():
        return Answered(prompt, ())
    whole = template_text(messages, where, tokenizer, to_be_answered=False)
    if not whole.startswith(asked):
        return unusable("the chat template writes the messages before an answer in another way once it is there")
    answer = _ended(_behind(prompt, asked, whole, tokenizer), tokenizer)
    return Answered(prompt, answer if config.eos else answer[:-1])


def _behind(prompt: tuple[int, ...], asked: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of what `whole` adds to `asked`, whose own are `prompt`.

    Tokenizers may join the template's last line break with one that the answer begins with. In sampling that cannot be,
    since the prompt is given: the answer's tokens are its own then.
    """
    tokens = _tokens(whole, tokenizer)
    if tokens[: len(prompt)] == prompt:
        return tokens[len(prompt) :]
    return _tokens(whole.removeprefix(asked), tokenizer)


def _ended(answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
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
