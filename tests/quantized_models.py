"""Tiny checkpoints with quantised weights, written tensor by tensor as published ones have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from gguf import GGUFWriter
from gguf.quants import GGMLQuantizationType, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def saved_fp8(folder: Path, family: str = "llama", **settings: Any) -> str:
    """A checkpoint as DeepSeek's and Qwen's are: linear layers in float8 by blocks, each with a scale."""
    tiny.saved(folder, tiny.causal(family, **settings))
    file, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        tensors[name], tensors[f"{name}_scale_inv"] = packed(tensor)
    save_file(tensors, file, metadata={"format": "pt"})
    says(folder, FP8)
    return str(folder)


def says(folder: Path, quantization: dict[str, Any] | None) -> None:
    """Let the config.json say so of its weights."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config | ({} if quantization is None else {"quantization_config": quantization})))


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> float8 (N, K) and the scale of each block, (N / BLOCK, K / BLOCK) fp32."""
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).float()  # (N/16, 16, K/16, 16)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn), scales


def saved_mxfp8(folder: Path) -> str:
    """The same in blocks of 32 in a row, whose scales are powers of two, kept as their exponents."""
    tiny.saved(folder, tiny.causal())
    file, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            blocks = tensor.unflatten(1, (-1, 32))  # (N, K/32, 32)
            exponents = (blocks.abs().amax(2) / torch.finfo(torch.float8_e4m3fn).max).log2().ceil()
            tensors[name] = (blocks / exponents.exp2()[..., None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    says(folder, {"quant_method": "mxfp8", "weight_block_size": [1, 32]})
    return str(folder)


def saved_mxfp4(folder: Path) -> str:
    """GPT-OSS's: experts in 4 bits, two to a byte, with the exponent of a scale for each 32 of a row."""
    tiny.saved(folder, tiny.causal("gpt_oss"))
    file, tensors = folder / "model.safetensors", {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in load_file(file).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        count, width, rows = tensor.shape
        shape = (count, rows, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    says(folder, {"quant_method": "mxfp4"})
    return str(folder)


def saved_gguf(folder: Path) -> str:
    """A Llama in 8 bits; returns the name of its file in the folder. The tokenizer stands beside it."""
    folder.mkdir(exist_ok=True)
    tiny.tokenizer().save_pretrained(folder)
    model = tiny.causal(num_hidden_layers=2)
    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    config = model.config
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    short = {"self_attn.": "attn_", "o_proj": "output", "_proj": "", "mlp.": "ffn_", "model.layers": "blk"}
    short |= {"attn_output": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    short |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        for long, other in short.items():
            name = name.replace(long, other)
        kind = GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny.gguf"
