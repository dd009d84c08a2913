"""The vocabulary head in chunks of rows: matrix products by torch, and one kernel for everything else of a chunk.

No (M, V) tensor is allocated. The logits of a chunk, of the policy and of a reference, fill the workspace. The size of
a chunk does not depend on whether a reference or a gradient is needed, so the same rows give the same logits, bit for
bit, in `linear_logprobs` and in `linear_policy_loss`, and the ratio in the first update is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops.coefficients import overload

# Weight gradients of several chunks are summed in fp32. A product of a few thousand vocabulary rows at a time is
# still in the cache when it is added; a product of the whole vocabulary would be written to memory and read again.
SLICE_ROWS = 2048

STATS, STATS_WITH_REFERENCE = 5, 10  # rows of the result of `vocabulary_forward`


class Head(NamedTuple):
    """A vocabulary projection and its input, or three Nones."""

    hidden: Tensor | None  # (M, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, rows: slice, buffer: Tensor) -> Tensor:
        """The logits of the rows, written to the first rows of the buffer, (at least as many, V)."""
        assert self.hidden is not None and self.weight is not None
        hidden = self.hidden[rows]
        out = buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def chunks(head: Head, ref_head: Head, workspace: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield rows, logits and the reference's logits of each chunk. A chunk overwrites the previous one."""
    assert head.hidden is not None and head.weight is not None
    tokens, vocabulary = len(head.hidden), len(head.weight)
    wide = 16 // head.hidden.element_size()  # rows start at multiples of 16 bytes, for loads of 16 bytes
    stride = -(-vocabulary // wide) * wide
    rows = max(1, workspace // (2 * stride * head.hidden.element_size()))
    rows = -(-tokens // max(1, -(-tokens // rows)))  # chunks of equal size
    buffer = head.hidden.new_empty(rows, stride)[:, :vocabulary]
    ref_buffer = None if ref_head.hidden is None else ref_head.hidden.new_empty(rows, stride)[:, :vocabulary]
    for first in range(0, tokens, max(1, rows)):
        part = slice(first, min(first + rows, tokens))
        yield part, head.logits(part, buffer), None if ref_buffer is None else ref_head.logits(part, ref_buffer)


class Products:
    """d_hidden = dz weight, d_weight = sum of dz^T hidden over chunks, d_bias = sum of dz, as far as wanted."""

    def __init__(self, head: Head, wanted: Sequence[bool], several: bool, *, sums: torch.dtype | None = None) -> None:
        """several: whether there are several chunks. sums: the dtype of d_weight and d_bias in the result; None: that
        of the weight."""
        assert head.hidden is not None and head.weight is not None
        self.hidden, self.weight, self.several, self.sums = head.hidden, head.weight, several, sums
        self.d_hidden = self.hidden.new_empty(self.hidden.shape) if wanted[0] else None
        self.d_weight: Tensor | None = None
        if wanted[1]:  # with one chunk the product is rounded once and not summed
            dtype = torch.float32 if several else sums or self.weight.dtype
            make = torch.zeros_like if several or sums or not len(self.hidden) else torch.empty_like
            self.d_weight = make(self.weight, dtype=dtype, memory_format=torch.contiguous_format)
        self.d_bias = torch.zeros(len(self.weight), device=self.hidden.device) if wanted[2] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        """Add the products of a chunk; dz (rows, V): gradient of the loss by the logits of these rows."""
        if self.d_hidden is not None:
            torch.mm(dz, self.weight, out=self.d_hidden[rows])
        if self.d_weight is not None:
            self._add_to_weight(self.d_weight, dz.t(), self.hidden[rows])
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)

    def _add_to_weight(self, total: Tensor, dz: Tensor, hidden: Tensor) -> None:
        if not self.several and not self.sums:
            torch.mm(dz, hidden, out=total)
        elif total.dtype == hidden.dtype:
            torch.addmm(total, dz, hidden, out=total)
        elif total.device.type == "cuda":
            torch.addmm(total, dz, hidden, out_dtype=torch.float32, out=total)
        else:
            wide = hidden.float() if self.sums else hidden  # a sum over the tokens of a chunk can overflow in fp16
            for first in range(0, len(total), SLICE_ROWS):
                some = slice(first, first + SLICE_ROWS)
                torch.ops.fastppo.accumulate(total[some], dz[some].to(wide.dtype) @ wide)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, in the dtype of their inputs unless `sums` is given; an empty tensor for one not wanted."""
        gradients, dtype = (self.d_hidden, self.d_weight, self.d_bias), self.hidden.dtype
        dtypes = (dtype, self.sums or dtype, self.sums or dtype)
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
    ref_head = Head(ref_hidden, ref_weight, ref_bias)
    stats = hidden.new_empty(STATS if ref_hidden is None else STATS_WITH_REFERENCE, len(hidden), dtype=torch.float32)
    for rows, logits, ref_logits in chunks(Head(hidden, weight, bias), ref_head, workspace):
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
    """Gradients by hidden, weight and bias; computes the logits of each chunk again.

    upstream: (4, M) fp32, the gradients by logprobs, entropy, lse and kl.
    """
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    backward = overload("vocabulary_backward", temperature)
    products: Products | None = None
    for rows, logits, ref_logits in chunks(head, ref_head, workspace):
        products = products or Products(head, wanted, several=rows.stop < len(hidden))
        backward(logits, targets[rows], stats[:, rows], upstream[:, rows], temperature, softcap, ref_logits, logits)
        products.add(rows, logits)
    return (products or Products(head, wanted, several=False)).result()


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

    Three products a chunk, logits, d_hidden and d_weight, and one kernel that overwrites the logits with the gradient
    of the loss by them. Nothing is computed twice; a gradient that is not wanted is an empty tensor and not computed.
    With `gradients_of_sum` the gradients are those of the sum of the losses, with d_weight and d_bias in fp32: fp16 can
    represent the gradient of a mean over 1e5 tokens only if the loss is scaled, and only the backward pass knows the
    scale.
    """
    head, ref_head = Head(hidden, weight, bias), Head(ref_hidden, ref_weight, ref_bias)
    token_stats = hidden.new_empty(8, len(hidden), dtype=torch.float32)
    loss_in_chunk = overload("policy_loss_in_chunk", temperature)
    of_sum = gradients_of_sum(hidden.dtype)
    divisor, sums_in = (torch.ones_like(normalizer), torch.float32) if of_sum else (normalizer, None)
    products: Products | None = None
    for rows, logits, ref_logits in chunks(head, ref_head, workspace):
        products = products or Products(head, wanted, several=rows.stop < len(hidden), sums=sums_in)
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
        products.add(rows, logits)
    loss, sums, ratio_max = overload("sum_tokens", kl_coef)(token_stats, entropy_coef, kl_coef, normalizer)
    return loss, sums, ratio_max, *(products or Products(head, wanted, several=False, sums=sums_in)).result()


def gradients_of_sum(dtype: torch.dtype) -> bool:
    """Whether `linear_policy_loss` does not divide its gradients by the normalizer: in fp16, whose smallest number is
    6e-8."""
    return dtype == torch.float16


# Registered by `fastppo.ops.registration` as fastppo::NAME. The coefficients, annotated as floats for the schema, may
# also be tensors without dimensions: they are only passed on.
OPS = (linear_logprobs, linear_logprobs_backward, linear_policy_loss)
