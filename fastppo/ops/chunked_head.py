"""The vocabulary head in blocks of rows: matrix products by torch, and one kernel for everything else of a block.

The logits of a block, of the policy and of a reference, fill the workspace. The blocks do not depend on whether a
reference or a gradient is needed, so the same rows give the same logits, bit for bit, in `linear_logprobs` and in
`linear_policy_loss`, and the ratio in the first update is 1.

A chunk is the rows whose gradients by the logits exist at a time. It is a block, and the weight's gradient is then a
sum over chunks in fp32; or all rows, whose gradients follow each other in one buffer, and then the weight's gradient is
one product, rounded once to the weight's dtype. It is all rows where the buffer takes no more memory than the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops.coefficients import overload

# Weight gradients of several chunks are summed in fp32. A product of a few thousand vocabulary rows at a time is
# still in the cache when it is added; a product of the whole vocabulary would be written to memory and read again.
SLICE_ROWS = 2048
TILE_ROWS = 128  # of a matrix product on a GPU, which computes whole tiles; those of CPUs are parts of it

STATS, STATS_WITH_REFERENCE = 5, 10  # rows of the result of `vocabulary_forward`


class Blocks(NamedTuple):
    """The division of M tokens."""

    rows: list[slice]  # of each block; none for M = 0
    one_chunk: bool  # whether all blocks are one chunk

    @property
    def largest(self) -> int:
        return max((part.stop - part.start for part in self.rows), default=0)

    @property
    def chunk(self) -> int:
        """The rows of the largest chunk."""
        return self.rows[-1].stop if self.rows and self.one_chunk else self.largest


def blocks(tokens: int, vocabulary: int, width: int, size: int, workspace: int, *, summed: bool) -> Blocks:
    """The blocks of `tokens` rows of `vocabulary` logits, of `size` bytes each, from hidden states (tokens, width).

    summed: whether a gradient of the weight is needed that several chunks would sum up in fp32 beside the result.
    """
    row_bytes = stride(vocabulary, size) * size
    rows = divided(tokens, max(1, workspace // (2 * row_bytes)))
    found = Blocks(rows, one_chunk=len(rows) <= 1)
    more, less = (tokens - found.largest) * row_bytes, 4 * vocabulary * width if summed else 0
    return found._replace(one_chunk=more <= less)


def stride(vocabulary: int, size: int) -> int:
    """Elements from one row of logits to the next: rows start at multiples of 16 bytes, for loads of 16 bytes."""
    wide = 16 // size
    return -(-vocabulary // wide) * wide


def divided(tokens: int, most: int) -> list[slice]:
    """The fewest parts of at most `most` rows, of nearly equal size. They meet at the tiles of a product, if there is
    room for that: a tile that two parts share is computed twice."""
    count = -(-tokens // most)

    def meeting_at(tile: int) -> list[slice]:
        tiles = -(-tokens // tile)
        ends = [min(tokens, tiles * i // count * tile) for i in range(count + 1)] if count else []
        return [slice(first, end) for first, end in pairwise(ends)]

    parts = meeting_at(min(TILE_ROWS, 1 << (max(most // 8, 1).bit_length() - 1)))
    return parts if all(part.stop - part.start <= most for part in parts) else meeting_at(1)


class Head(NamedTuple):
    """A vocabulary projection and its input, or three Nones."""

    hidden: Tensor | None  # (M, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Write the logits of the rows to `out`, (rows, V)."""
        assert self.hidden is not None and self.weight is not None
        hidden = self.hidden[rows]
        if hidden.device.type == "cpu":
            hidden = hidden.contiguous()  # see `buffer`: a caller's rows may have NaNs between them
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def buffer(self, rows: int) -> Tensor:
        """Memory for logits, (rows, V), not initialised; zeros between the rows.

        oneDNN's bf16 product with AMX reads a row of its first factor up to a multiple of 32 and multiplies what it
        finds behind the row by zero: a NaN there, which any memory may hold, is then in the whole product.
        """
        assert self.hidden is not None and self.weight is not None
        vocabulary = len(self.weight)
        whole = self.hidden.new_empty(rows, stride(vocabulary, self.hidden.element_size()))
        whole[:, vocabulary:] = 0
        return whole[:, :vocabulary]

    def blocks(self, workspace: int, *, summed: bool = False) -> Blocks:
        assert self.hidden is not None and self.weight is not None
        vocabulary, width = self.weight.shape
        return blocks(len(self.hidden), vocabulary, width, self.hidden.element_size(), workspace, summed=summed)


Block = tuple[slice, Tensor, Tensor | None]  # rows, their logits, and those of the reference


def chunks(head: Head, ref_head: Head, parts: Blocks) -> Iterator[tuple[slice, Tensor, Iterator[Block]]]:
    """Yield the rows of each chunk, a buffer (rows, V) and the blocks, which fill the buffer as they are iterated over.

    The next chunk overwrites the buffer, and the next block the logits of the reference.
    """
    buffer = head.buffer(parts.chunk)
    ref_buffer = None if ref_head.hidden is None else ref_head.buffer(parts.largest)

    def filled(some: list[slice]) -> Iterator[Block]:
        first = some[0].start
        for rows in some:
            logits = head.logits(rows, buffer[rows.start - first : rows.stop - first])
            yield rows, logits, None if ref_buffer is None else ref_head.logits(rows, ref_buffer[: len(logits)])

    for some in [parts.rows] * bool(parts.rows) if parts.one_chunk else [[rows] for rows in parts.rows]:
        whole = slice(some[0].start, some[-1].stop)
        yield whole, buffer[: whole.stop - whole.start], filled(some)


class Products:
    """d_hidden = dz weight, d_weight = sum of dz^T hidden over chunks, d_bias = sum of dz, as far as wanted."""

    def __init__(self, head: Head, wanted: Sequence[bool], workspace: int, *, sums: torch.dtype | None = None) -> None:
        """sums: the dtype of d_weight and d_bias in the result; None: that of the weight."""
        assert head.hidden is not None and head.weight is not None
        self.hidden, self.weight = head.hidden, head.weight
        self.sums = sums or self.weight.dtype
        self.blocks = head.blocks(workspace, summed=wanted[1] and self.sums != torch.float32)
        self.d_hidden = self.hidden.new_empty(self.hidden.shape) if wanted[0] else None
        self.d_weight: Tensor | None = None
        if wanted[1]:
            dtype = self.sums if self.blocks.one_chunk else torch.float32
            self.d_weight = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
            if not len(self.hidden):
                self.d_weight.zero_()
        self.d_bias = torch.zeros(len(self.weight), device=self.hidden.device) if wanted[2] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        """Add the products of a chunk; dz (rows, V): gradient of the loss by the logits of these rows."""
        if self.d_hidden is not None:
            torch.mm(dz, self.weight, out=self.d_hidden[rows])
        if self.d_weight is not None:
            self._add_to_weight(self.d_weight, dz.t(), self.hidden[rows], first=rows.start == 0)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)

    def _add_to_weight(self, total: Tensor, dz: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Add dz hidden to `total`, or write it there if it is the first."""
        if total.dtype == hidden.dtype and first:
            torch.mm(dz, hidden, out=total)
        elif total.dtype == hidden.dtype:
            torch.addmm(total, dz, hidden, out=total)
        elif total.device.type != "cpu" and first:
            torch.mm(dz, hidden, out_dtype=torch.float32, out=total)
        elif total.device.type != "cpu":
            torch.addmm(total, dz, hidden, out_dtype=torch.float32, out=total)
        else:
            # In fp16 a sum over the tokens of a chunk can overflow.
            wide_hidden = hidden.float() if hidden.dtype == torch.float16 else hidden
            for start in range(0, len(total), SLICE_ROWS):
                some = slice(start, start + SLICE_ROWS)
                part = dz[some].to(wide_hidden.dtype) @ wide_hidden
                if first:
                    total[some].copy_(part)
                else:
                    torch.ops.fastppo.accumulate(total[some], part)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, in the dtype of their inputs unless `sums` is given; an empty tensor for one not wanted."""
        gradients, dtypes = (self.d_hidden, self.d_weight, self.d_bias), (self.hidden.dtype, self.sums, self.sums)
        hidden, weight, bias = (
            self.hidden.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, dtypes, strict=True)
        )
        return hidden, weight, bias


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace: int,
) -> Tensor:
    """`vocabulary_forward` of the logits of a head: (5, M) or, with a reference, (10, M) fp32."""
    forward = overload("vocabulary_forward", temperature)
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    stats = hidden.new_empty(STATS if ref_hidden is None else STATS_WITH_REFERENCE, len(hidden), dtype=torch.float32)
    for _, _, filled in chunks(head, ref_head, head.blocks(workspace)):
        for rows, logits, ref_logits in filled:
            stats[:, rows] = forward(logits, targets[rows], temperature, softcap, ref_logits)
    return stats


def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    temperature: float,
    softcap: float | None,
    workspace: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; computes the logits of each block again.

    upstream: (4, M) fp32, the gradients by logprobs, entropy, lse and kl.
    """
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    backward = overload("vocabulary_backward", temperature)
    products = Products(head, wanted, workspace)
    for chunk, dz, filled in chunks(head, ref_head, products.blocks):
        for rows, logits, ref_logits in filled:
            backward(logits, targets[rows], stats[:, rows], upstream[:, rows], temperature, softcap, ref_logits, logits)
        products.add(chunk, dz)
    return products.result()


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    normalizer: Tensor,
    mask: Tensor | None,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_kind: str,
    workspace: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (), its sums (8,), the largest ratio (), and the gradients of the loss by hidden, weight and bias.

    Logits by blocks, d_hidden and d_weight by chunks, and one kernel a block that overwrites the logits with the
    gradient of the loss by them. Nothing is computed twice; a gradient that is not wanted is an empty tensor and not
    computed.
    With `gradients_of_sum` the gradients are those of the sum of the losses, with d_weight and d_bias in fp32: fp16 can
    represent the gradient of a mean over 1e5 tokens only if the loss is scaled, and only the backward pass knows the
    scale.
    """
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    token_stats = hidden.new_empty(8, len(hidden), dtype=torch.float32)
    loss_in_chunk = overload("policy_loss_in_chunk", temperature)
    of_sum = gradients_of_sum(hidden.dtype)
    divisor, sums_in = (torch.ones_like(normalizer), torch.float32) if of_sum else (normalizer, None)
    products = Products(head, wanted, workspace, sums=sums_in)
    for chunk, dz, filled in chunks(head, ref_head, products.blocks):
        for rows, logits, ref_logits in filled:
            loss_in_chunk(
                logits,
                targets[rows],
                old_logprobs[rows],
                advantages[rows],
                divisor,
                temperature,
                softcap,
                clip_low,
                clip_high,
                dual_clip,
                entropy_coef,
                kl_coef,
                kl_kind,
                None if ref_logprobs is None else ref_logprobs[rows],
                ref_logits,
                None if mask is None else mask[rows],
                any(wanted),
                token_stats[:, rows],
            )
        products.add(chunk, dz)
    loss, sums, ratio_max = overload("sum_tokens", kl_coef)(token_stats, entropy_coef, kl_coef, normalizer)
    return loss, sums, ratio_max, *products.result()


def gradients_of_sum(dtype: torch.dtype) -> bool:
    """Whether `linear_policy_loss` does not divide its gradients by the normalizer: in fp16, whose smallest number is
    6e-8."""
    return dtype == torch.float16


# Registered by `fastppo.ops.registration` as fastppo::NAME. The coefficients, annotated as floats for the schema, may
# also be tensors without dimensions: they are only passed on.
OPS = (linear_logprobs, linear_logprobs_backward, linear_policy_loss)
CHUNKED: dict[str, Callable[..., Any]] = {function.__name__: function for function in OPS}
