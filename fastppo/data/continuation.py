"""Encoding and decoding of text that continues a prompt.

Tokenizers are made for whole texts. Many add a space before a text and remove it again when they decode
(SentencePiece's dummy prefix: Llama-2, Mistral v1, T5; `add_prefix_space`), and WordPiece has no token for the space
between two words. A response that is encoded or decoded without its prompt gains or loses a space, and is another
continuation than the one that was written. So responses are encoded and decoded after their prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fastppo")

# Texts before a text while it is encoded. Whether one of them leaves the tokens of the text unchanged depends on the
# tokenizer and on the start of the text, so there are several kinds: none, a character that is in hardly any longer
# token, punctuation, letters of rare words, a digit.
STARTS = ("", "\n", ":", '"', "=", "x", "q", "7")
PROBES = ("it", " it", "  it", "\nit", "\n\nit", ".", " (", "7", "\u00e9", "s")


class _Properties(NamedTuple):
    """Properties of a tokenizer."""

    context_free: bool  # the tokens of a text are the same at the start and after a prompt, as with GPT-2's tokenizer
    appended: int  # number of special tokens that it appends to a text


_properties: WeakKeyDictionary[PreTrainedTokenizerBase, _Properties] = WeakKeyDictionary()
_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()  # a warning that they change texts was logged


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode the starts of prompts, with the BOS if the tokenizer adds one; a text that contains BOS gets no second.

    The EOS that some tokenizers append is removed, because a prompt is continued.
    """
    if not texts:  # tokenizers do not accept an empty list
        return []
    encoded, bos = tokenizer(list(texts), return_attention_mask=False)["input_ids"], tokenizer.bos_token_id
    if appended := _properties_of(tokenizer).appended:
        encoded = [ids[:-appended] for ids in encoded]
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]


def encode_after(
    prompts: Sequence[str], starts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens of each text as the continuation of its prompt; starts: tokens of the prompts, from `plain_tokens`.

    Prompt and text are encoded together if the result starts with the tokens of the prompt. Otherwise, for example
    after a prompt that ends with a space that would join the next word, the text is encoded by `encode_behind`.
    """
    if _properties_of(tokenizer).context_free:
        return _encode(texts, tokenizer)
    whole_texts = plain_tokens([prompt + text for prompt, text in zip(prompts, texts, strict=True)], tokenizer)
    pairs = list(zip(starts, whole_texts, strict=True))
    continuations = [whole[len(start) :] for start, whole in pairs]
    others = [i for i, (start, whole) in enumerate(pairs) if whole[: len(start)] != list(start)]
    encoded = encode_behind([starts[i] for i in others], [texts[i] for i in others], tokenizer)
    for i, ids in zip(others, encoded, strict=True):
        continuations[i] = ids
    return continuations


def encode_behind(
    starts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens that decode to each text after the given tokens of a prompt.

    A tokenizer that changes texts (lower case, unknown characters) has no such tokens for some texts. Then the result
    is the tokens that preserve the longest start of the text, and a warning is logged once for the tokenizer.
    """
    if _properties_of(tokenizer).context_free:
        return _encode(texts, tokenizer)
    best: list[list[int]] = [[] for _ in texts]
    preserved = [-1] * len(texts)  # characters of the text that decoding `best` returns; its length + 1 if equal
    for before in STARTS:
        rows = [i for i, text in enumerate(texts) if preserved[i] <= len(text)]
        head = _encode([before], tokenizer)[0] if before else []
        encoded = _encode([before + texts[i] for i in rows], tokenizer)
        candidates = [(i, ids[len(head) :]) for i, ids in zip(rows, encoded, strict=True) if ids[: len(head)] == head]
        decoded = decode_after(
            [starts[i] for i, _ in candidates], [ids for _, ids in candidates], tokenizer, special=True
        )
        for (i, ids), text in zip(candidates, decoded, strict=True):
            equal = len(texts[i]) + 1 if text == texts[i] else _common_prefix(text, texts[i])
            if equal > preserved[i]:
                best[i], preserved[i] = ids, equal
    changed = next((i for i, text in enumerate(texts) if preserved[i] <= len(text)), None)
    if changed is not None and tokenizer not in _warned:
        _warned.add(tokenizer)
        text = decode_after([starts[changed]], [best[changed]], tokenizer, special=True)[0]
        kind, original = type(tokenizer).__name__, texts[changed][:60]
        log.warning("the tokenizer (%s) cannot represent some texts: %r becomes %r", kind, original, text[:60])
    return best


def encode_parts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts that follow each other: the first with the BOS, if the tokenizer adds one."""
    before = ""
    tokens: list[int] = []
    parts: list[list[int]] = []
    for text in texts:
        parts.append(
            encode_after([before], [tokens], [text], tokenizer)[0] if parts else plain_tokens([text], tokenizer)[0]
        )
        before, tokens = before + text, [*tokens, *parts[-1]]
    return parts


def decode_after(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool = False,
    shown: Collection[str] = (),
) -> list[str]:
    """The text of each response as the continuation of its prompt, both given as tokens.

    special: include the text of special tokens; shown: of these only, as the vocabulary has them. A response that
    completes a character whose first bytes are in the prompt is decoded alone, because its text cannot be separated
    from that of the prompt.
    """
    hidden = frozenset() if special else special_ids(tokenizer)
    if shown:
        hidden = frozenset(i for i in hidden if tokenizer.convert_ids_to_tokens(i) not in shown)
    visible = [[token for token in response if token not in hidden] for response in responses]
    contexts, context_texts = _contexts(prompts, tokenizer)
    whole_texts = _decode([[*context, *ids] for context, ids in zip(contexts, visible, strict=True)], tokenizer)
    return [
        text[len(head) :] if text.startswith(head) else _decode([ids], tokenizer)[0]
        for head, text, ids in zip(context_texts, whole_texts, visible, strict=True)
    ]


def decode_pieces(prompt: Sequence[int], tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token after a prompt; joined, they are the text of all tokens, special tokens included.

    If a character consists of several tokens, it belongs to the last of them, and the texts of the others are empty.
    """
    (context,), (head,) = _contexts([prompt], tokenizer)
    if not _decode([[*context, *tokens]], tokenizer)[0].startswith(head):
        context = []
    row = [*context, *tokens]
    texts, start, end = [], 0, len(context)  # row[start:end]: the context of the next text
    for position in range(len(context) + 1, len(row) + 1):
        before, longer = _decode([row[start:end], row[start:position]], tokenizer)
        if longer.endswith("\N{REPLACEMENT CHARACTER}") and position < len(row):
            texts.append("")
        else:
            texts.append(longer[len(before) :])
            start, end = end, position
    return texts


def decode_start(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the first tokens of a text, without BOS, which is added again when the text is encoded."""
    return _decode([tokens[1:] if list(tokens[:1]) == [tokenizer.bos_token_id] else tokens], tokenizer)[0]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that are no text: BOS, EOS, markers of chat."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | {*tokenizer.all_special_ids})


def _contexts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str]]:
    """The part of each prompt that its continuation depends on, as tokens and as text: the last token.

    No token for an empty prompt or after BOS. The whole prompt if its last token is part of a character.
    """
    contexts = [[] if list(prompt[-1:]) == [tokenizer.bos_token_id] else list(prompt[-1:]) for prompt in prompts]
    texts = _decode(contexts, tokenizer)
    for i, prompt in enumerate(prompts):
        if "\N{REPLACEMENT CHARACTER}" in texts[i]:
            contexts[i] = list(prompt)
            texts[i] = _decode([prompt], tokenizer)[0]
    return contexts, texts


def _properties_of(tokenizer: PreTrainedTokenizerBase) -> _Properties:
    if tokenizer not in _properties:
        bare, whole = _encode(["x"], tokenizer)[0], tokenizer("x")["input_ids"]
        before = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
        appended = 0 if before is None else len(whole) - before - len(bare)
        decoded = decode_after([bare] * len(PROBES), _encode(PROBES, tokenizer), tokenizer, special=True)
        _properties[tokenizer] = _Properties(decoded == list(PROBES), appended)
    return _properties[tokenizer]


def _common_prefix(one: str, other: str) -> int:
    """The number of characters with which both start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text without added special tokens."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return encoded


def _decode(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The exact text of each row of tokens: some tokenizers' configs would remove spaces before full stops."""
    if not rows:
        return []
    return [
        str(text)
        for text in tokenizer.batch_decode(
            [list(row) for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    ]
