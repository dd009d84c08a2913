"""Text that goes on from a prompt, as tokens; and tokens that go on from a prompt, as text.

Tokenizers are made for whole texts. Many put a space before a text and take it away again when they decode
(SentencePiece's dummy prefix: Llama-2, Mistral v1, T5; `add_prefix_space`), and WordPiece writes the space between two
words nowhere. A response that is encoded or decoded alone gains or loses a space, and is another continuation of its
prompt than was written. So each is taken where it stands: behind its prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fastppo")

# What may stand before a text while it is encoded: alone, or behind one of these. Which of them leaves the text's own
# tokens as they are depends on the tokenizer and on how the text begins, so they are of every kind: a character that
# hardly any token has beside others, marks, letters of which rare words are made, a digit.
STARTS = ("", "\n", ":", '"', "=", "x", "q", "7")
PROBES = ("it", " it", "  it", "\nit", "\n\nit", ".", " (", "7", "\u00e9", "s")


class _Habits(NamedTuple):
    """What a tokenizer does to texts."""

    alike: bool  # its tokens of a text are the same at the beginning and behind a prompt, as of GPT-2's kind
    behind: int  # special tokens that it puts behind a text


_habits: WeakKeyDictionary[PreTrainedTokenizerBase, _Habits] = WeakKeyDictionary()  # those that have been looked at
_told: WeakSet[PreTrainedTokenizerBase] = WeakSet()  # of whose changes to texts the log has a line


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts in which prompts begin, with the BOS if the tokenizer puts one before a text; none gets a second one.

    Something follows a prompt, so the EOS that some tokenizers put behind a text is left out.
    """
    if not texts:  # tokenizers take no empty list
        return []
    encoded, bos = tokenizer(list(texts), return_attention_mask=False)["input_ids"], tokenizer.bos_token_id
    if behind := _look_at(tokenizer).behind:
        encoded = [ids[:-behind] for ids in encoded]
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]


def encode_after(
    prompts: Sequence[str], starts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens by which each text goes on from its prompt; starts: the prompts' tokens, of `plain_tokens`.

    Those that the two have in one piece, where the prompt's own are among them. Where they are not, as behind a prompt
    that ends with a space which the next word would take, they are what decodes to the text behind the prompt.
    """
    if _look_at(tokenizer).alike:
        return _encode(texts, tokenizer)
    both = plain_tokens([prompt + text for prompt, text in zip(prompts, texts, strict=True)], tokenizer)
    pairs = list(zip(starts, both, strict=True))
    found = [whole[len(start) :] for start, whole in pairs]
    others = [i for i, (start, whole) in enumerate(pairs) if whole[: len(start)] != list(start)]
    behind = encode_behind([starts[i] for i in others], [texts[i] for i in others], tokenizer)
    for i, ids in zip(others, behind, strict=True):
        found[i] = ids
    return found


def encode_behind(
    starts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The tokens of each text that decode to it behind these tokens of a prompt, whatever the prompt's text was.

    A tokenizer that changes texts (lower case, unknown characters) has none for some of them. Then they are those that
    keep most of its beginning, and the log says so once.
    """
    if _look_at(tokenizer).alike:
        return _encode(texts, tokenizer)
    best: list[list[int]] = [[] for _ in texts]
    kept = [-1] * len(texts)  # characters of the text that `best` gives back; more than it has once all of them
    for before in STARTS:
        rows = [i for i, text in enumerate(texts) if kept[i] <= len(text)]
        head = _encode([before], tokenizer)[0] if before else []
        tried = _encode([before + texts[i] for i in rows], tokenizer)
        fitting = [(i, ids[len(head) :]) for i, ids in zip(rows, tried, strict=True) if ids[: len(head)] == head]
        spelled = decode_after([starts[i] for i, _ in fitting], [ids for _, ids in fitting], tokenizer, special=True)
        for (i, ids), back in zip(fitting, spelled, strict=True):
            alike = len(texts[i]) + 1 if back == texts[i] else _shared(back, texts[i])
            if alike > kept[i]:
                best[i], kept[i] = ids, alike
    changed = next((i for i, text in enumerate(texts) if kept[i] <= len(text)), None)
    if changed is not None and tokenizer not in _told:
        _told.add(tokenizer)
        back = decode_after([starts[changed]], [best[changed]], tokenizer, special=True)[0]
        kind, shown = type(tokenizer).__name__, texts[changed][:60]
        log.warning("the tokenizer (%s) has no tokens for some texts: %r comes back as %r", kind, shown, back[:60])
    return best


def decode_after(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool = False,
) -> list[str]:
    """The text by which each response goes on from its prompt, both given as tokens: theirs together is the whole's.

    special: with special tokens as they are written; else without them. A response that completes a character of which
    its prompt has the first bytes is decoded alone, since no text of its own would make the two whole.
    """
    hidden = frozenset() if special else special_ids(tokenizer)
    shown = [[token for token in response if token not in hidden] for response in responses]
    contexts, before = _contexts(prompts, tokenizer)
    whole = _decode([[*context, *ids] for context, ids in zip(contexts, shown, strict=True)], tokenizer)
    return [
        text[len(head) :] if text.startswith(head) else _decode([ids], tokenizer)[0]
        for head, text, ids in zip(before, whole, shown, strict=True)
    ]


def decode_pieces(prompt: Sequence[int], tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token behind a prompt, so that together they are the text of all; special ones are written out.

    A token may be part of a character: the whole character then stands with its last token, and the others are empty.
    """
    (context,), (head,) = _contexts([prompt], tokenizer)
    if not _decode([[*context, *tokens]], tokenizer)[0].startswith(head):
        context = []
    row = [*context, *tokens]
    texts, start, end = [], 0, len(context)  # row[start:end] were decoded whole, with what stood before them in sight
    for at in range(len(context) + 1, len(row) + 1):
        before, now = _decode([row[start:end], row[start:at]], tokenizer)
        if now.endswith("\N{REPLACEMENT CHARACTER}") and at < len(row):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, end = end, at
    return texts


def decode_start(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that begins with these tokens. Its BOS is left out, as whoever tokenizes the text puts one there."""
    return _decode([tokens[1:] if list(tokens[:1]) == [tokenizer.bos_token_id] else tokens], tokenizer)[0]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that stand for no text: BOS, EOS, markers of chat."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | {*tokenizer.all_special_ids})


def _contexts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str]]:
    """What of each prompt tells how it goes on, as tokens and as text: its last token; none where a text begins.

    Of a prompt that ends within bytes, or with the last ones of a character, it is all: they are read in one piece.
    """
    lasts = [[] if list(prompt[-1:]) == [tokenizer.bos_token_id] else list(prompt[-1:]) for prompt in prompts]
    texts = _decode(lasts, tokenizer)
    for i, prompt in enumerate(prompts):
        if "\N{REPLACEMENT CHARACTER}" in texts[i]:
            lasts[i] = list(prompt)
            texts[i] = _decode([prompt], tokenizer)[0]
    return lasts, texts


def _look_at(tokenizer: PreTrainedTokenizerBase) -> _Habits:
    if tokenizer not in _habits:
        bare, whole = _encode(["x"], tokenizer)[0], tokenizer("x")["input_ids"]
        before = next((i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare), None)
        behind = 0 if before is None else len(whole) - before - len(bare)
        spelled = decode_after([bare] * len(PROBES), _encode(PROBES, tokenizer), tokenizer, special=True)
        _habits[tokenizer] = _Habits(spelled == list(PROBES), behind)
    return _habits[tokenizer]


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Without special tokens of the tokenizer's own."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return encoded


def _decode(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """As it stands: some tokenizers' configs ask for spaces before full stops to be taken away."""
    if not rows:
        return []
    return [
        str(text)
        for text in tokenizer.batch_decode(
            [list(row) for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    ]
