"""The ops over the vocabulary in efficient PyTorch: chunks of rows, gradients in closed form, no (M, V) tensor.

The arithmetic is that of `fastppo.reference`, arranged so that a head costs its matrix products and little more.
A chunk of rows is as many as have their logits (the policy's and a reference's) in the workspace; a block is
as many of a chunk as one `vocabulary.Pass` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.philox import uniform
from fastppo.reference import statistics_dtype
from fastppo.stats import PolicyStats, TokenStats
from fastppo.vocabulary import Gradients, Pass, Scale, spans

SAMPLING_BLOCK = 128  # tokens a block of the distribution function holds
TokenLoss = Callable[[slice, Tensor, Tensor, Tensor | None], tuple[Tensor, PolicyStats]]


class Head(NamedTuple):
    """A vocabulary projection and what it is applied to."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Logits of the rows, written to the first rows of `out` (at least that many, V)."""
        hidden = self.hidden[rows]
        out = out[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def token_logprobs(logits: Tensor, targets: Tensor, scale: Scale, ref_logits: Tensor | None) -> TokenStats:
    """`reference.token_logprobs`, block by block."""
    return TokenStats(*TokenLogprobs.apply(logits, targets, ref_logits, scale))  # type: ignore[no-untyped-call]


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ref_logits: Tensor | None, scale: Scale) -> TokenStats:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, ref_logits)
        ctx.scale = scale
        stats = empty_stats(logits, ref_logits is not None)
        vocabulary_pass = Pass(len(logits), logits.shape[1], logits, scale, ref_logits is not None)
        for rows, block, ref_block in vocabulary_pass.blocks(logits, ref_logits):
            store(stats, rows, vocabulary_pass.read(block, targets[rows], ref_block))
        ctx.mark_non_differentiable(*(s for s in stats[3:5] if s is not None))
        return stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, ref_logits = ctx.saved_tensors
        gradients = differentiable(upstream)
        ref_logits = None if gradients.kl is None else ref_logits
        d_logits = torch.empty_like(logits)
        vocabulary_pass = Pass(len(logits), logits.shape[1], logits, ctx.scale, ref_logits is not None)
        for rows, block, ref_block in vocabulary_pass.blocks(logits, ref_logits):
            vocabulary_pass.read(block, targets[rows], ref_block)
            vocabulary_pass.write(block, targets[rows], gradients.rows(rows), d_logits[rows])
        return d_logits, None, None, None


def linear_logprobs(head: Head, targets: Tensor, scale: Scale, ref_head: Head | None, *, workspace: int) -> TokenStats:
    """`reference.linear_logprobs`, chunk by chunk; the backward pass computes each chunk's logits again."""
    outputs = LinearLogprobs.apply(*head, *(ref_head or (None,) * 3), targets, scale, workspace)  # type: ignore[no-untyped-call]
    return TokenStats(*outputs)


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> TokenStats:
        *tensors, scale, workspace = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.workspace = scale, workspace
        head, ref_head, targets = Head(*tensors[:3]), as_head(*tensors[3:6]), tensors[6]
        stats = empty_stats(head.hidden, ref_head is not None)
        for first, logits, ref_logits, vocabulary_pass in chunks(head, ref_head, scale, workspace):
            for rows, block, ref_block in vocabulary_pass.blocks(logits, ref_logits, first):
                store(stats, rows, vocabulary_pass.read(block, targets[rows], ref_block))
        ctx.mark_non_differentiable(*(s for s in stats[3:5] if s is not None))
        return stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        head, targets = Head(*ctx.saved_tensors[:3]), ctx.saved_tensors[6]
        gradients = differentiable(upstream)
        ref_head = None if gradients.kl is None else as_head(*ctx.saved_tensors[3:6])
        products = Products(head, ctx.needs_input_grad[:3])
        for first, logits, ref_logits, vocabulary_pass in chunks(head, ref_head, ctx.scale, ctx.workspace):
            for rows, block, ref_block in vocabulary_pass.blocks(logits, ref_logits, first):
                vocabulary_pass.read(block, targets[rows], ref_block)
                vocabulary_pass.write(block, targets[rows], gradients.rows(rows), out=block)
            products.add(first, logits)
        return (*products.result(), *(None,) * 6)


def linear_policy_loss(
    head: Head,
    targets: Tensor,
    scale: Scale,
    ref_head: Head | None,
    token_loss: TokenLoss,
    *,
    workspace: int,
) -> tuple[Tensor, PolicyStats]:
    """`reference.linear_policy_loss` with the gradients made in the forward pass, while a chunk's logits exist.

    `token_loss` takes rows and their logprobs, entropy and KL, and returns their part of the loss and its sums. Three
    matrix products a chunk: logits, d_hidden, d_weight; one for an input that needs no gradient is left out.
    """
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head]
    loss, sums, ratio_max = LinearPolicyLoss.apply(  # type: ignore[no-untyped-call]
        *head, targets, scale, ref_head, token_loss, workspace, wanted
    )
    return loss, PolicyStats(sums, ratio_max)


class LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: Scale,
        ref_head: Head | None,
        token_loss: TokenLoss,
        workspace: int,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, bias)
        products = Products(head, wanted)
        loss, (sums, ratio_max) = token_loss(slice(0, 0), *empty_stats(hidden[:0], False)[:2], None)
        for first, logits, ref_logits, vocabulary_pass in chunks(head, ref_head, scale, workspace):
            for rows, block, ref_block in vocabulary_pass.blocks(logits, ref_logits, first):
                stats = vocabulary_pass.read(block, targets[rows], ref_block)
                part, part_stats, gradients = differentiate(token_loss, rows, stats, any(wanted))
                if any(wanted):
                    vocabulary_pass.write(block, targets[rows], gradients, out=block)
                loss, sums = loss + part, sums + part_stats.sums
                ratio_max = torch.maximum(ratio_max, part_stats.ratio_max)
            products.add(first, logits)
        ctx.save_for_backward(*products.result())
        ctx.mark_non_differentiable(sums, ratio_max)
        return loss, sums, ratio_max

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        scaled = upstream.device.type != "cpu" or upstream.item() != 1.0  # on the CPU a look at it costs nothing
        made = ctx.saved_tensors
        return (*((g * upstream).to(g.dtype) if scaled and g is not None else g for g in made), *(None,) * 6)


def differentiate(
    token_loss: TokenLoss, rows: slice, stats: TokenStats, wanted: bool
) -> tuple[Tensor, PolicyStats, Gradients]:
    """A block's part of the loss, and its gradients by the statistics: autograd over (m,) tensors."""
    leaves = [None if s is None else s.requires_grad_(wanted) for s in (stats.logprobs, stats.entropy, stats.kl)]
    with torch.set_grad_enabled(wanted):
        loss, sums = token_loss(rows, leaves[0], leaves[1], leaves[2])  # type: ignore[arg-type]
    if not wanted:
        return loss, sums, Gradients(None, None, None, None)
    made = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], allow_unused=True))
    g_logprob, g_entropy, g_kl = (None if leaf is None else next(made) for leaf in leaves)
    return loss.detach(), sums, Gradients(g_logprob, g_entropy, None, g_kl)


class Products:
    """d_hidden = dz weight, d_weight = sum of dz^T hidden over chunks, d_bias: those of them that are wanted."""

    def __init__(self, head: Head, wanted: Any) -> None:
        self.head, self.wanted = head, wanted
        self.d_hidden = torch.empty_like(head.hidden) if wanted[0] else None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def add(self, first_row: int, d_logits: Tensor) -> None:
        hidden, weight, _ = self.head
        rows = slice(first_row, first_row + len(d_logits))
        if self.d_hidden is not None:
            torch.mm(d_logits, weight, out=self.d_hidden[rows])
        if self.wanted[1]:
            self.d_weight = accumulated(self.d_weight, d_logits.t() @ hidden[rows])
        if self.wanted[2]:
            self.d_bias = accumulated(self.d_bias, d_logits.sum(0, dtype=statistics_dtype(d_logits)))

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight, bias = self.head
        if len(hidden) == 0:  # no chunk came
            self.d_weight = torch.zeros_like(weight) if self.wanted[1] else None
            self.d_bias = torch.zeros_like(bias) if self.wanted[2] and bias is not None else None
        d_weight = None if self.d_weight is None else self.d_weight.to(weight.dtype)
        return self.d_hidden, d_weight, None if self.d_bias is None else self.d_bias.to(weight.dtype)


def accumulated(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part in fp32; the first part of all is taken as it is, and rounds no more than a single product."""
    if total is None:
        return part
    total = total.to(statistics_dtype(part))
    for rows in spans(len(part), 4096):  # adding another dtype makes a copy of it: of few rows at a time
        total[rows] += part[rows]
    return total


def chunks(
    head: Head, ref_head: Head | None, scale: Scale, workspace: int
) -> Iterator[tuple[int, Tensor, Tensor | None, Pass]]:
    """First row, logits and reference's logits of each chunk, and a pass for them. A chunk overwrites the one before.

    The rows of a chunk do not depend on whether there is a reference or a gradient: the same rows give the same logits
    bit for bit in `linear_logprobs` and in `linear_policy_loss`, so that the first update's ratio is 1.
    """
    tokens, vocabulary = len(head.hidden), len(head.weight)
    limit = max(1, workspace // (2 * vocabulary * head.hidden.dtype.itemsize))
    most = max((s.stop - s.start for s in spans(tokens, limit)), default=0)
    buffer = head.hidden.new_empty(most, vocabulary)
    ref_buffer = None if ref_head is None else ref_head.hidden.new_empty(most, vocabulary)
    vocabulary_pass = Pass(most, vocabulary, head.hidden, scale, ref_head is not None)
    for rows in spans(tokens, limit):
        ref_logits = None if ref_head is None or ref_buffer is None else ref_head.logits(rows, ref_buffer)
        yield rows.start, head.logits(rows, buffer), ref_logits, vocabulary_pass


def as_head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Head | None:
    return None if hidden is None or weight is None else Head(hidden, weight, bias)


def differentiable(upstream: tuple[Tensor | None, ...]) -> Gradients:
    logprobs, entropy, lse, _, _, kl = upstream
    return Gradients(logprobs, entropy, lse, kl)


def empty_stats(like: Tensor, with_reference: bool) -> TokenStats:
    made = [like.new_empty(len(like), dtype=statistics_dtype(like)) for _ in range(6 if with_reference else 3)]
    return TokenStats(*made, *(None,) * (6 - len(made)))


def store(stats: TokenStats, rows: slice, block: TokenStats) -> None:
    for whole, part in zip(stats, block, strict=True):
        if whole is not None and part is not None:
            whole[rows] = part


def sample_tokens(
    logits: Tensor, *, temperature: float = 1.0, seed: int, stream: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.sample_tokens` in two steps: the block of the vocabulary that u falls in, then the token in it."""
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // SAMPLING_BLOCK)
    x = logits.new_full((rows, blocks * SAMPLING_BLOCK), -torch.inf, dtype=torch.float32)
    x[:, :vocabulary] = logits
    x -= x.amax(-1, keepdim=True)
    if temperature != 1.0:
        x *= 1.0 / temperature
    e = x.exp().view(rows, blocks, SAMPLING_BLOCK)
    block_cumulative = e.sum(-1).double().cumsum(-1)
    total = block_cumulative[:, -1:]
    threshold = uniform(seed, stream, offset)[:, None] * total
    block = (block_cumulative <= threshold).sum(-1, keepdim=True)  # the first whose sum exceeds it
    before = torch.where(block > 0, block_cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    cumulative = e[torch.arange(rows, device=e.device), block[:, 0]].double().cumsum(-1)
    # A block's fp32 sum may exceed its fp64 one by a rounding: stay below the latter, or no token would be found.
    below = cumulative[:, -1:].nextafter(torch.zeros_like(total))
    inside = (cumulative <= torch.minimum(threshold - before, below)).sum(-1, keepdim=True)
    tokens = block * SAMPLING_BLOCK + inside
    logprobs = x.gather(-1, tokens) - total.log()
    return tokens[:, 0], logprobs[:, 0].float()
