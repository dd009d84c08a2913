"""The tokens that end a response, whichever engine writes it."""

from __future__ import annotations

import difflib
import logging

from transformers import PreTrainedTokenizerBase

from fastppo.config import SamplingConfig
from fastppo.data import decode_after, decode_pieces, encode_behind
from fastppo.errors import FastPPOError
from fastppo.models import Policy

log = logging.getLogger("fastppo")


def stop_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> list[int]:
    """The tokens that end a response: all EOS ids of the generation config and the tokenizer, and `stop_tokens`.

    The log says if there are none.
    """
    if config.ignore_eos:
        longest = config.max_new_tokens
        log.info("sampling.ignore_eos: every response has sampling.max_new_tokens = %d tokens", longest)
        return []
    eos = getattr(policy.model.generation_config, "eos_token_id", None)
    ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *named_stop_ids(tokenizer, config)}
    rows = policy.model.config.get_text_config().vocab_size
    if beyond := sorted(i for i in ids - {None} if i >= rows):
        log.warning("the actor has no embedding of the stop tokens %s, so it never writes one", beyond)
    if not ids - {None, *beyond}:
        log.warning(
            "no token ends a response: neither the actor's tokenizer nor its generation config has an EOS token, and"
            " sampling.stop_tokens is empty. Every response will be cut at sampling.max_new_tokens = %d. Name one with"
            " sampling.stop_tokens.",
            config.max_new_tokens,
        )
    return sorted(ids - {None, *beyond})


def named_stop_ids(tokenizer: PreTrainedTokenizerBase, config: SamplingConfig) -> list[int]:
    """The tokens that `stop_tokens` names, each as the vocabulary spells it or as text. Raises FastPPOError."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[t] if t in vocabulary else _only_token(t, vocabulary, tokenizer) for t in config.stop_tokens]


def _only_token(text: str, vocabulary: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token whose text this is, behind a prompt."""
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    ids = encode_behind([before], [text], tokenizer)[0]
    if len(ids) == 1 and decode_after([before], [ids], tokenizer, special=True) == [text]:
        return ids[0]
    parts = decode_pieces(before, ids, tokenizer)
    alike = [name for name in vocabulary if name.strip("\u2581\u0120 ").lower() == text.strip().lower() != ""]
    named = [token.content for token in tokenizer.added_tokens_decoder.values()]
    near = list(dict.fromkeys(alike + difflib.get_close_matches(text, named, cutoff=0.5)))[:4]
    raise FastPPOError(
        f"sampling.stop_tokens: {text!r} is not one token of the actor's tokenizer, but {len(ids)}: {parts}. A response"
        " ends at single tokens: give one that only stands where it shall end"
        + (f", or one of {', '.join(map(repr, near))}." if near else ".")
    )
