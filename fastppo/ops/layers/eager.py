"""The ops of a layer in plain PyTorch, as in their papers: the oracles against which kernels are tested.

Each works in fp32, bf16, fp16 and fp64, computes in fp32 (fp64 for fp64 inputs) and rounds where its docstring says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    *,
    round_first: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * (offset + weight), s = x + residual (Zhang and Sennrich, 2019, eq. 4).

    s is rounded to the dtype of x, as a sum that is stored. round_first: the quotient is rounded to that dtype before
    it is multiplied, as in Llama; else the product alone is, as in Gemma and OLMo-2.
    """
    total = x if residual is None else (_wide(x) + _wide(residual)).to(x.dtype)
    wide = _wide(total)
    quotient = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        quotient = _wide(quotient.to(x.dtype))
    y = (quotient * (offset + _wide(weight))).to(x.dtype)
    return y if residual is None else (y, total)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, silu(g) = g sigmoid(g) (Shazeer, 2020, eq. 6), rounded once."""
    return (functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(gate) up (Shazeer, 2020, eq. 6), rounded once; approximate: `tanh` or `none`, as in torch."""
    return (functional.gelu(_wide(gate), approximate=approximate) * _wide(up)).to(gate.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """x cos + turned(x) sin for q and k (Su et al., 2021, eq. 34), of each head's first numbers, as many as cos has.

    turned(x) = (-x2, x1) of the halves x1, x2 of these numbers; interleaved: (-x[1], x[0], -x[3], x[2], ...), as there.
    Rounded once; the numbers after them are as they were.
    """
    cos, sin = _wide(cos).unsqueeze(1), _wide(sin).unsqueeze(1)

    def rotate(x: Tensor) -> Tensor:
        part, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        wide = _wide(part)
        first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
        turned = torch.stack([-second, first], -1).flatten(-2) if interleaved else torch.cat([-second, first], -1)
        return torch.cat([(wide * cos + turned * sin).to(x.dtype), rest], -1)

    return rotate(q), rotate(k)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
