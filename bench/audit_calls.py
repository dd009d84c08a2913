"""The launches of the Triton kernels that `bench/audit.py` looks at, and the bytes that each must move at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastppo.kernels.attend_cached import attend_cached
from fastppo.kernels.layers.glu import glu, glu_backward
from fastppo.kernels.layers.rms_norm import rms_norm, rms_norm_backward
from fastppo.kernels.layers.rotary import rotary
from fastppo.kernels.policy_loss import policy_loss
from fastppo.kernels.policy_loss_in_chunk import policy_loss_in_chunk
from fastppo.kernels.sample_tokens import sample_tokens
from fastppo.kernels.scale_gradient import BLOCK, PROGRAMS, scale_gradient
from fastppo.kernels.sum_tokens import sum_tokens
from fastppo.kernels.truncation import passes, truncation
from fastppo.kernels.value_loss import value_loss
from fastppo.kernels.vocabulary_backward import vocabulary_backward
from fastppo.kernels.vocabulary_forward import vocabulary_forward

ROWS, VOCABULARY, TOKENS = 2, 50_257, 8192
POSITIONS, WINDOW = 8192, 4096  # of a row of the cache
LAYER_TOKENS = 256  # on two multiprocessors, as 16,384 tokens are on those of an H100
GLU_TOKENS = ROTARY_TOKENS = 32  # of kernels in which no program knows how many there are
# Queries a kv head and their width, as in SmolLM2-135M, Llama-3 8B, Llama-3 70B, Gemma-2 9B, Phi-2, Qwen3 235B.
HEADS = ((3, 64), (4, 128), (8, 128), (2, 256), (1, 80), (16, 128))
GLU_WIDTH = 1536  # of SmolLM2-135M
# Heads, kv heads, numbers of a head and those that are turned, and whether as neighbours: Llama 1B, Llama-3 8B,
# SmolLM2-135M, Phi-3, Phi-2, GLM-4.
ROTARY = (
    (32, 8, 64, 64, False),
    (32, 8, 128, 128, False),
    (9, 3, 64, 64, False),
    (32, 32, 96, 96, False),
    (32, 32, 80, 32, False),
    (32, 2, 128, 64, True),
)


class Call(NamedTuple):
    """A launch to audit."""

    name: str
    launch: Callable[[], Any]
    least: int  # bytes


def padded_logits(dtype: torch.dtype) -> Tensor:
    width = 16 // dtype.itemsize
    return torch.randn(ROWS, -(-VOCABULARY // width) * width).to(dtype)[:, :VOCABULARY]


def row_calls(dtype: torch.dtype, softcap: float | None = None) -> list[Call]:
    """The kernels over rows of logits. least: the bytes of the necessary reads and writes of whole rows."""
    logits, ref_logits = padded_logits(dtype), padded_logits(dtype)
    targets, numbers, normalizer = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS), torch.ones(())
    row_bytes = ROWS * VOCABULARY * dtype.itemsize

    def forward(ref: Tensor | None) -> Tensor:
        return vocabulary_forward(logits, targets, 0.7, softcap, ref)

    def backward(ref: Tensor | None) -> None:
        stats = torch.zeros(10, ROWS)
        vocabulary_backward(logits, targets, stats, torch.ones(4, ROWS), 0.7, softcap, ref, logits)

    def in_chunk(ref: Tensor | None) -> None:
        scale, clips = (0.7, softcap), (0.2, 0.2, 1.5)
        kl = ("k3", numbers, None) if ref is None else ("exact", None, ref)
        arguments = (logits, targets, numbers, numbers, normalizer, *scale, *clips, 0.1, 0.1, *kl)
        policy_loss_in_chunk(*arguments, numbers == 0, True, torch.empty(8, ROWS))

    kept = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.int64)

    def truncated(name: str, top_k: int, top_p: float) -> Call:
        least = passes(dtype, top_k, top_p) * row_bytes // ROWS  # one row, because the interpreter is slow
        return Call(name, lambda: truncation(logits[:1], 0.7, top_k, top_p), least)

    return [
        Call("forward", lambda: forward(None), row_bytes),
        Call("forward, reference", lambda: forward(ref_logits), 2 * row_bytes),
        Call("backward", lambda: backward(None), 2 * row_bytes),
        Call("backward, reference", lambda: backward(ref_logits), 3 * row_bytes),
        Call("loss in chunk", lambda: in_chunk(None), 3 * row_bytes),
        Call("loss in chunk, exact KL", lambda: in_chunk(ref_logits), 5 * row_bytes),
        Call("sample", lambda: sample_tokens(logits, targets, targets, 0.7, 1), row_bytes),
        Call("sample, truncated", lambda: sample_tokens(logits, targets, targets, 0.7, 1, *kept), row_bytes),
        truncated("top_k", 50, 1.0),
        truncated("top_p", 0, 0.9),
        truncated("top_k, top_p", 50, 0.9),
    ]


def gradient_calls(dtype: torch.dtype) -> list[Call]:
    """The gradient of a small weight times the factor of its loss. least: a read and a write of it; of nothing but the
    factor, by each program, if it is 1."""
    gradient, one = torch.zeros(1001, 33).to(dtype), torch.ones(())
    programs = min(triton.cdiv(gradient.numel(), BLOCK), PROGRAMS)
    return [
        Call("scale", lambda: scale_gradient(gradient, 3 * one), 2 * gradient.numel() * dtype.itemsize),
        Call("scale by 1", lambda: scale_gradient(gradient, one), 4 * programs),
    ]


def token_calls() -> list[Call]:
    """The kernels over tokens. least: the bytes of one read of each input and one write of each output."""
    x, mask, normalizer = torch.zeros(TOKENS), torch.ones(TOKENS, dtype=torch.bool), torch.ones(())
    clips, coefs = (0.2, 0.2, 1.5), (0.1, 0.1)
    token_stats = torch.zeros(8, TOKENS)
    return [
        Call("policy_loss", lambda: policy_loss(x, x, x, x, x, mask, normalizer, *clips, *coefs), 25 * TOKENS),
        Call("value_loss", lambda: value_loss(x, x, x, mask, normalizer, 0.2), 17 * TOKENS),
        Call("sum_tokens", lambda: sum_tokens(token_stats, *coefs, normalizer), 32 * TOKENS),
    ]


def attention_calls(dtype: torch.dtype, softcap: float = 0.0, window: int = 0) -> list[Call]:
    """A step of attention over the cache, one kv head. least: one read of the queries and of the keys and values of the
    positions attended to, and one write of the outputs and of the new position."""
    calls = []
    for group, width in HEADS:
        query, key = torch.randn(1, group, width).to(dtype), torch.randn(1, 1, width).to(dtype)
        caches = torch.zeros(2, 1, 1, POSITIONS, width, dtype=dtype)
        lengths, rows = torch.tensor([POSITIONS - 1]), torch.tensor([0])
        arguments = (query, key, key, *caches, lengths, rows, width**-0.5, window, softcap)
        vectors = 2 * (window or POSITIONS) + 2 * group + 2
        name = f"attention, {group} x {width}"
        calls.append(Call(name, lambda given=arguments: attend_cached(*given), vectors * width * dtype.itemsize))
    return calls


def layer_calls(dtype: torch.dtype, width: int = 2048) -> list[Call]:
    """The kernels over rows of a layer. least: the bytes of one read of each input and one write of each output."""
    x = torch.randn(LAYER_TOKENS, width).to(dtype)
    heads = torch.randn(LAYER_TOKENS, 1, 2 * width).to(dtype)[..., :width].view(LAYER_TOKENS, -1, gcd(width, 128))
    weight, of_head = torch.ones(width, dtype=dtype), torch.ones(heads.shape[-1], dtype=dtype)
    rows, norm = x.nbytes, (1e-6, 0.0)

    def backward(d_total: Tensor | None, weight_wanted: bool) -> Any:
        return rms_norm_backward(x, d_total, x, weight, *norm, weight_wanted)

    return [
        Call("rms_norm, residual", lambda: rms_norm(x, weight, 1e-6, x, 0.0, True), 4 * rows + weight.nbytes),
        Call("rms_norm, heads", lambda: rms_norm(heads, of_head, 1e-6, None, 0.0, True), 2 * rows + of_head.nbytes),
        Call("rms_norm backward, residual", lambda: backward(x, True), 4 * rows + 2 * weight.nbytes),
        Call("rms_norm backward", lambda: backward(None, True), 3 * rows + 2 * weight.nbytes),
        Call("rms_norm backward, residual, frozen", lambda: backward(x, False), 4 * rows + weight.nbytes),
    ]


def glu_calls(dtype: torch.dtype, activations: tuple[str, ...] = ("silu", "gelu", "gelu_tanh")) -> list[Call]:
    """The gated activations, of gate and up apart and joined. least: as of `layer_calls`."""
    gate, up, grad = (torch.randn(GLU_TOKENS, GLU_WIDTH).to(dtype) for _ in range(3))
    joined = torch.randn(GLU_TOKENS, 2 * GLU_WIDTH).to(dtype)
    inputs = {"glu": (gate, up), "glu joined": (joined, None)}
    calls = []
    for activation, (name, given) in itertools.product(activations, inputs.items()):
        forward, backward = partial(glu, *given, activation), partial(glu_backward, grad, *given, activation)
        calls.append(Call(f"{name}, {activation}", forward, 3 * gate.nbytes))
        calls.append(Call(f"{name} backward, {activation}", backward, 5 * gate.nbytes))
    return calls


def rotary_calls(dtype: torch.dtype) -> list[Call]:
    """Rotations of queries and keys, as the layers of a model hold them. least: as of `layer_calls`."""
    calls = []
    for heads, kv_heads, size, turned, interleaved in ROTARY:
        q, k = (torch.randn(1, ROTARY_TOKENS, h, size).to(dtype).transpose(1, 2) for h in (heads, kv_heads))
        cos, sin = (torch.randn(1, ROTARY_TOKENS, turned).to(dtype) for _ in range(2))
        name = f"rotary, {heads}+{kv_heads} x {size}" + ", interleaved" * interleaved
        least = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        for transposed in (False, True):
            run = partial(rotary, q, k, cos, sin, interleaved, transposed)
            calls.append(Call(name + ", transposed" * transposed, run, least))
    return calls
