"""Small tokenizers of the kinds that language models have, each with `<s>`, `</s>` and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ["Film 50: it is a wonderful film, and the actors were wonderful too.", "the film was; they said: not good"]
SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finished(backend: Tokenizer, bos: bool = True) -> PreTrainedTokenizerBase:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    return made


def byte_level(prefix: bool = False) -> PreTrainedTokenizerBase:
    """GPT-2, SmolLM2, Qwen, Llama-3; with `add_prefix_space` RoBERTa and Falcon's kin."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(WORDS * 4, trainer)
    return finished(backend)


def with_bytes() -> Tokenizer:
    """A BPE on words with their spaces, which falls back to bytes; as yet it puts a space before no text."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(WORDS * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES]))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Tokenizer(models.BPE(learned["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def metaspace(scheme: str, split: bool = True) -> PreTrainedTokenizerBase:
    """Llama's BPE with bytes as transformers writes it today: `always` or `first` a space before a text, or `never`."""
    backend = with_bytes()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return finished(backend)


def legacy() -> PreTrainedTokenizerBase:
    """Llama-2 and Mistral v1 by their tokenizer.json: a normalizer puts the space before every part of a text."""
    backend = with_bytes()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(backend)


def unigram(scheme: str = "always") -> PreTrainedTokenizerBase:
    """T5, ALBERT, XGLM: pieces by likelihood."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({*"".join(WORDS), *'\n"=xq7'} - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet
    )
    backend.train_from_iterator(WORDS * 4, trainer)
    return finished(backend)


def word_piece() -> PreTrainedTokenizerBase:
    """BERT's: no token has the space between two words, and one behind a text ends it."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, initial_alphabet=list("xq7=:;,."))
    backend.train_from_iterator(WORDS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, backend.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    return finished(backend, bos=False)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "byte-level with prefix space": lambda: byte_level(prefix=True),
    "metaspace always": lambda: metaspace("always"),
    "metaspace always, whole": lambda: metaspace("always", split=False),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "legacy": legacy,
    "unigram": unigram,
    "unigram first": lambda: unigram("first"),
    "unigram never": lambda: unigram("never"),
    "WordPiece": word_piece,
}
