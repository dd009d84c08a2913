"""The vocabulary pass in PyTorch: one read of a block of logits gives every statistic, one more its gradient.

With z the scaled logits, x = z - max z, s = sum e^x and p = e^x / s, one read of a row gives E[x] = sum p x, and with
a reference row y = r - max r also E[y]. From these L = max z + log s, logprob = x_target - log s,
entropy = log s - E[x], KL = (E[x] - log s) - (E[y] - log s_y), and for the upstream gradients of each
dz = g_logprob (1_target - p) + g_lse p + (g_kl - g_entropy) p (x - E[x]) - g_kl p (y - E[y]).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.reference import at_targets, statistics_dtype
from fastppo.stats import TokenStats

CPU_BLOCK_BYTES = 4 << 20  # a block of fp32 rows stays in the cache while it is read, exponentiated and summed
DEVICE_BLOCK_BYTES = 128 << 20  # elsewhere: few launches


class Scale(NamedTuple):
    """From logits to z: softcap tanh(logits / softcap) / temperature."""

    temperature: float
    softcap: float | None


class Gradients(NamedTuple):
    """Upstream gradients of a `TokenStats`, (M,) each; None is zero."""

    logprobs: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    kl: Tensor | None

    def rows(self, rows: slice) -> Gradients:
        return Gradients(*(None if g is None else g[rows] for g in self))


class Pass:
    """The vocabulary pass over blocks of rows. `read` gives a block's statistics, `write` then their gradient."""

    def __init__(self, rows: int, vocabulary: int, like: Tensor, scale: Scale, with_reference: bool) -> None:
        budget = CPU_BLOCK_BYTES if like.device.type == "cpu" else DEVICE_BLOCK_BYTES
        dtype = statistics_dtype(like)
        self.block_rows = min(max(1, budget // (vocabulary * dtype.itemsize)), max(1, rows))
        self.scale = scale
        shape = (2 + with_reference, self.block_rows, vocabulary)  # x, e^x and y
        self.buffers = torch.empty(shape, dtype=dtype, device=like.device)

    def blocks(
        self, logits: Tensor, ref_logits: Tensor | None, first_row: int = 0
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The logits block by block, and which rows each block is, the first of all being `first_row`."""
        for block in spans(len(logits), self.block_rows):
            rows = slice(first_row + block.start, first_row + block.stop)
            yield rows, logits[block], None if ref_logits is None else ref_logits[block]

    def read(self, logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> TokenStats:
        """Statistics of a block: logits (m, V), targets (m,), ref_logits (m, V); m at most `block_rows`."""
        self.x, self.e, *rest = self.buffers[:, : len(logits)]
        peak = self._centre(logits, self.x)
        x_target = at_targets(self.x, targets)
        self.x.clamp_(min=-1000.0)  # e^-1000 = 0 in every dtype, and 0 * -1000 is 0 where 0 * -inf is not
        torch.exp(self.x, out=self.e)
        self.total = self.e.sum(-1)
        self.mean = torch.linalg.vecdot(self.e, self.x) / self.total
        log_total = self.total.log()
        logprobs, entropy, lse = x_target - log_total, log_total - self.mean, peak + log_total
        if ref_logits is None:
            return TokenStats(logprobs, entropy, lse, None, None, None)
        self.y = rest[0]
        ref_peak = self._centre(ref_logits, self.y)
        y_target = at_targets(self.y, targets)
        ref_log_total = self.y.exp().sum(-1).log()  # as above, bit for bit: the KL of equal rows is 0
        self.y.masked_fill_(self.e == 0, 0.0)
        self.ref_mean = torch.linalg.vecdot(self.e, self.y) / self.total
        kl = (self.mean - log_total) - (self.ref_mean - ref_log_total)
        return TokenStats(logprobs, entropy, lse, y_target - ref_log_total, ref_peak + ref_log_total, kl)

    def write(self, logits: Tensor, targets: Tensor, gradients: Gradients, out: Tensor) -> None:
        """The gradient of the block just read, with respect to its logits, into `out` (m, V); `out` may be `logits`."""
        g_logprob, g_entropy, g_lse, g_kl = gradients
        zero = torch.zeros_like(self.total)
        constant = (zero if g_lse is None else g_lse) - (zero if g_logprob is None else g_logprob)
        if g_entropy is None and g_kl is None:
            d = self.e.mul_((constant / self.total)[:, None])
        else:
            slope = -g_entropy if g_entropy is not None else zero
            if g_kl is not None:
                g_kl = g_kl.masked_fill(self.ref_mean.isneginf(), 0.0)  # an infinite KL passes no gradient
                ref_mean = self.ref_mean.masked_fill(self.ref_mean.isneginf(), 0.0)
                slope, constant = slope + g_kl, constant + g_kl * ref_mean
            d = self.x.mul_(slope[:, None]).add_((constant - slope * self.mean)[:, None])
            if g_kl is not None:
                d.addcmul_(self.y.clamp_(min=-1e30), g_kl[:, None], value=-1.0)
            d.mul_(self.e).div_(self.total[:, None])
        if g_logprob is not None:
            d.scatter_add_(-1, targets[:, None], g_logprob[:, None].to(d.dtype))
        if self.scale.softcap is not None:
            spare = self.x if d is self.e else self.e
            slope_of_cap = spare.copy_(logits).div_(self.scale.softcap).tanh_().square_().neg_().add_(1.0)
            d.mul_(slope_of_cap)
        if self.scale.temperature != 1.0:
            d.mul_(1.0 / self.scale.temperature)
        out.copy_(d)

    def _centre(self, logits: Tensor, out: Tensor) -> Tensor:
        """out = z - max z; returns max z, (m,)."""
        out.copy_(logits)
        if self.scale.softcap is not None:
            out.div_(self.scale.softcap).tanh_().mul_(self.scale.softcap)
        peak = out.amax(-1)
        out.sub_(peak[:, None])
        if self.scale.temperature != 1.0:
            out.mul_(1.0 / self.scale.temperature)
        return peak / self.scale.temperature


def spans(total: int, limit: int) -> Iterator[slice]:
    """range(total) in even parts of at most `limit`."""
    parts = -(-total // limit)
    return (slice(total * i // parts, total * (i + 1) // parts) for i in range(parts))
