"""The published shapes of the models that presets name, as directories with a config and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

PYTHIA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "vocab_size": 50304,
}
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
QWEN_0_5B = QWEN_1_5B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}

# preset -> (model type, its shape)
ACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "8b-rest": ("llama", LLAMA_8B),
    "tldr-1b": ("gpt_neox", PYTHIA_1B),
    "gsm8k-ppo": ("qwen2", QWEN_0_5B),
    "gsm8k-grpo": ("qwen2", QWEN_1_5B),
    "gsm8k-vapo": ("qwen2", QWEN_1_5B),
    "1.3b": (
        "opt",
        {
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "vocab_size": 50272,
        },
    ),
    "7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "13b": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32000,
        },
    ),
    "34b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 22016,
            "num_hidden_layers": 48,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
    "70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
}

RECIPES = ("tldr-1b", "gsm8k-ppo", "gsm8k-grpo", "gsm8k-vapo")

REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tldr-1b": ("gpt_neox", PYTHIA_1B),
    "1.3b": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
}


def directory(folder: Path, kind: str, shape: dict[str, Any], **more: Any) -> str:
    AutoConfig.for_model(kind, **shape, **more).save_pretrained(folder)
    return str(folder)


def preset(folder: Path, name: str) -> list[str]:
    """The command line of a preset whose models are shapes on this disk, since there is no hub in a test."""
    argv = ["--config", name, "--actor.model", directory(folder / "actor", *ACTORS[name])]
    if name.startswith("gsm8k"):
        return argv
    kind, shape = REWARDS.get(name, ("llama", LLAMA_8B))
    reward = directory(folder / "reward", kind, shape, num_labels=1)
    argv += ["--critic.model", reward] if name == "tldr-1b" else []
    return [*argv, "--rewards", f'[{{"model": "{reward}"}}]']
