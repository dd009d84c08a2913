"""Small configs of families that ask more of a trainer than Llama: windows, longrope, routers, recurrent layers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

WINDOW, SWITCH = 6, 12
SLIDING = ["sliding_attention", "full_attention"]

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": SWITCH,
}
LONGROPES = {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH}

# name -> (model type, what differs from SHAPE)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"sliding_window": WINDOW, **EXPERTS}),
    "phimoe": ("phimoe", {"sliding_window": WINDOW, **EXPERTS}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "layer_types": SLIDING, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": SLIDING}),
    "phi3": ("phi3", LONGROPES),
    "phi3 in a window": ("phi3", {**LONGROPES, "sliding_window": WINDOW}),
    "phimoe with longrope": (
        "phimoe",
        {
            "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": SWITCH,
            "sliding_window": WINDOW,
            **EXPERTS,
        },
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "opt": (
        "opt",
        {"num_key_value_heads": None, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2, "layerdrop": 0.5},
    ),
    "convolution": ("lfm2", {"layer_types": ["full_attention", "conv"], "conv_L_cache": 3}),
    "linear attention": ("minimax", {"layer_types": ["full_attention", "linear_attention"], **EXPERTS}),
    "sinks": ("gpt_oss", {"layer_types": SLIDING, "sliding_window": WINDOW, **EXPERTS}),
    "ALiBi": ("bloom", {"n_layer": 2, "n_head": 4}),
    "latent attention": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    family, more = KINDS[name]
    return AutoConfig.for_model(family, **{**SHAPE, **more, **changes})
