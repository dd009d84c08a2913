"""The loss of a batch from the terms that `policy_loss_in_chunk` wrote for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.sums import TOKEN_BLOCK, finish


def sum_tokens(
    token_stats: Tensor, entropy_coef: float | Tensor, kl_coef: float | Tensor, normalizer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens, and the loss (sums[0] - entropy_coef sums[1] + kl_coef sums[2]) / normalizer.

    token_stats: (8, M) fp32, rows as `PolicyStats.sums`, any row stride; normalizer: () fp32, read on the device.
    Returns loss (), sums (8,) and the maximum of row 6, the ratio, (), 0 without tokens; fp32. A term with coefficient
    0 is left out of the loss. Traffic: 32 bytes a token. Results repeat bit for bit.
    """
    if token_stats.ndim != 2 or len(token_stats) != 8 or token_stats.dtype != torch.float32:
        raise ValueError(f"token_stats is {token_stats.dtype} {tuple(token_stats.shape)}; expected fp32 (8, M)")
    tokens = token_stats.shape[1]
    blocks = triton.cdiv(tokens, TOKEN_BLOCK)
    partials = torch.empty(9, blocks, dtype=torch.float32, device=token_stats.device)
    if blocks:
        with torch.cuda.device_of(token_stats):
            sum_tokens_kernel[(blocks,)](
                token_stats,
                partials,
                token_stats.stride(0),
                token_stats.stride(1),
                tokens,
                BLOCK=TOKEN_BLOCK,
                num_warps=8,
            )
    return finish(partials, 8, normalizer, entropy_coef, kl_coef)


@triton.jit(do_not_specialize=["stride", "M"])
def sum_tokens_kernel(token_stats, partials, stride, token_stride, M, BLOCK: tl.constexpr):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for row in tl.static_range(8):
        tokens = tl.load(token_stats + row * stride + i * token_stride, mask=i < M, other=0.0)
        tl.store(partials + row * blocks + block, tl.sum(tokens, axis=0))
        if row == 6:
            tl.store(partials + 8 * blocks + block, tl.max(tokens, axis=0))
