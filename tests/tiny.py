"""Tiny models and a tiny tokenizer, made on the spot: random weights, real code paths, milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WIDTH, LAYERS = 32, 3
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {"n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "dropout": 0.1},
    "gpt_neox": {},
}

# Families with experts, which only some tests want.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": FAMILIES["qwen3"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}


def tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte; `<eos>` ends a text. `extra` tokens make a vocabulary of another size."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=CHAT)


def causal(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A random model whose logits spread enough for sampled tokens to differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_settings(family, settings))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    _spread(model)
    return model.eval()


def classifier(
    labels: int = 1, vocabulary: int = 257, seed: int = 1, family: str = "llama", **settings: Any
) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = _settings(family, {"vocab_size": vocabulary} | settings)
    config = AutoConfig.for_model(family, **shape, num_labels=labels)
    config.pad_token_id = 0
    return AutoModelForSequenceClassification.from_config(config).eval()


def saved(folder: Path, model: PreTrainedModel, extra: tuple[str, ...] = ()) -> str:
    """The model and its tokenizer as a directory that `from_pretrained` loads; returns its path."""
    model.save_pretrained(folder)
    tokenizer(extra).save_pretrained(folder)
    return str(folder)


def _settings(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    shape = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family != "opt":
        shape["intermediate_size"] = 64
    if family == "gpt2":
        del shape["intermediate_size"]
    return shape | (FAMILIES | EXPERTS).get(family, {}) | settings


def _spread(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(4.0)
