"""The layout of all batches: packed, without padding.

B sequences (prompt and response) form one row of N tokens. The tokens that the policy wrote form a second, shorter row
of M tokens: all quantities per token of PPO (logprobs, KL, rewards, values, advantages, returns) have the shape `(M,)`.

In a conversation with an environment a response has several turns, and between them the tokens of the environment's
observations. The policy reads these and has not written them, so they are among the N tokens and not among the M: no
loss, mean or count has to leave them out, and no logits are computed for them. What carries from a token to the next,
as an advantage does, goes from the last token of a turn to the first of the next turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from fastppo.distributed import Neighbours, to_device


@dataclass(frozen=True)
class Packed:
    """B sequences end to end, each a prompt followed by its response. In every response the policy wrote a token."""

    tokens: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (B+1,) int32, where each sequence starts in `tokens`; the last entry is N
    response_cu_seqlens: Tensor  # (B+1,) int32, where each response starts in an (M,) tensor; the last entry is M
    mask: Tensor | None = None  # (N,) bool, True where the policy wrote, M times; None: all that is behind the prompts

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> Tensor:  # (B,) int64
        return self.cu_seqlens.diff().long()

    @cached_property
    def response_lengths(self) -> Tensor:  # (B,) int64, the tokens that the policy wrote
        return self.response_cu_seqlens.diff().long()

    @cached_property
    def lengths_on_host(self) -> list[int]:  # B numbers, known without waiting for the device
        return self.lengths.tolist()

    @cached_property
    def response_lengths_on_host(self) -> list[int]:
        return self.response_lengths.tolist()

    @cached_property
    def positions(self) -> Tensor:  # (N,) int64, from 0 in every sequence
        return segment_offsets(self.lengths)

    @cached_property
    def last_rows(self) -> Tensor:  # (B,) int64, the row of each sequence's last token
        return self.cu_seqlens[1:].long() - 1

    def last_rows_without(self, padding: int | None) -> Tensor:
        """(B,) int64, the row of each sequence's last token that is not `padding`; its first row if all tokens are."""
        if padding is None:
            return self.last_rows
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        last_other = torch.where(self.tokens != padding, rows, 0).cummax(0).values[self.last_rows]
        return torch.maximum(last_other, self.cu_seqlens[:-1].long())

    @cached_property
    def predictors(self) -> Tensor:  # (M,) int64, the row whose hidden state predicts each written token
        if self.mask is not None:
            return self.mask.nonzero().flatten() - 1
        first = self.last_rows - self.response_lengths  # the last prompt token predicts the first response token
        return first.repeat_interleave(self.response_lengths) + segment_offsets(self.response_lengths)

    @cached_property
    def predictors_on_host(self) -> Tensor:  # known without waiting for the device
        return self.predictors.cpu()

    @cached_property
    def responses(self) -> Tensor:  # (M,) int64, the written tokens
        return self.tokens[self.predictors + 1]

    @cached_property
    def written(self) -> Tensor:  # (N,) bool, the mask, made if there is none
        if self.mask is not None:
            return self.mask
        return torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device).index_fill(
            0, self.predictors + 1, True
        )

    @cached_property
    def last_response_tokens(self) -> Tensor:  # (B,) int64, where each response ends in an (M,) tensor
        return self.response_cu_seqlens[1:].long() - 1

    @cached_property
    def prompt_lengths(self) -> Tensor:  # (B,) int64
        if self.mask is None:
            return self.lengths - self.response_lengths
        return self.predictors[self.response_cu_seqlens[:-1].long()] + 1 - self.cu_seqlens[:-1].long()

    @cached_property
    def turns(self) -> Tensor:  # (M,) int64, the turn of its sequence that each written token is in, from 0 on
        begins = torch.ones(len(self.predictors), dtype=torch.bool, device=self.tokens.device)
        begins[1:] = self.predictors.diff() != 1
        number = begins.cumsum(0)
        first = number[self.response_cu_seqlens[:-1].long()]
        return number - first.repeat_interleave(self.response_lengths)

    @cached_property
    def turn_counts(self) -> Tensor:  # (B,) int64
        return self.turns[self.last_response_tokens] + 1

    @cached_property
    def turn_lengths(self) -> Tensor:  # (turns of all sequences,) int64, the tokens of each, end to end
        starts = torch.nn.functional.pad(self.turn_counts.cumsum(0), (1, 0))[:-1]
        return (self.turns + starts.repeat_interleave(self.response_lengths)).bincount()

    def to(self, device: torch.device) -> Packed:
        """On the device, with what else takes the lengths on the host to compute: no use of it waits for a GPU."""
        if self.tokens.device == device:
            return self
        moved = replace(
            self, **{f.name: to_device(x, device) for f in fields(self) if (x := getattr(self, f.name)) is not None}
        )
        names = ("lengths_on_host", "response_lengths_on_host", "predictors_on_host")
        on_host = {name: getattr(self, name) for name in names}
        rows = {name: to_device(getattr(self, name), device) for name in ("positions", "predictors")}
        moved.__dict__.update(on_host | rows)  # where `cached_property` looks
        return moved

    def select(self, sequences: Tensor) -> Packed:
        """The given sequences (an int64 tensor of indices), in the given order."""
        rows = segment_rows(self.cu_seqlens, sequences)
        return Packed(
            self.tokens[rows],
            cumulative(self.lengths[sequences]),
            cumulative(self.response_lengths[sequences]),
            None if self.mask is None else self.mask[rows],
        )

    def select_tokens(self, values: Tensor, sequences: Tensor) -> Tensor:
        """The part of an (M,) tensor that belongs to the given sequences."""
        return values[segment_rows(self.response_cu_seqlens, sequences)]


def end_to_end(parts: Sequence[Packed]) -> Packed:
    """Several batches as one. It has a mask if one of them has: the others' is then made from their lengths."""
    has_mask = any(part.mask is not None for part in parts)
    return Packed(
        torch.cat([part.tokens for part in parts]),
        cumulative(torch.cat([part.lengths for part in parts])),
        cumulative(torch.cat([part.response_lengths for part in parts])),
        torch.cat([part.written for part in parts]) if has_mask else None,
    )


def of_group(packed: Packed, group: Neighbours) -> tuple[Packed, slice]:
    """The sequences of all ranks of a group, end to end, and which of them are this rank's. All its ranks call it."""
    if group.size == 1:
        return packed, slice(None)
    parts = group.gather(packed)
    first = sum(map(len, parts[: group.index]))
    return end_to_end(parts), slice(first, first + len(packed))


def cumulative(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B+1,) int32 starts, from 0 to the total."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def written_starts(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where each segment starts once the tokens that mask, (M,) bool, leaves out are gone: (B+1,) int32."""
    return torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens.long()].to(torch.int32)


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the tokens of a mask back to their places, (M,); 0, or False, between them."""
    return x.new_zeros(len(mask)).masked_scatter(mask, x)


def segment_offsets(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (sum,) int64: 0, 1, ... within each segment."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


def segment_rows(cu_seqlens: Tensor, segments: Tensor) -> Tensor:
    """The rows of the given segments of a packed tensor, in the given order; int64."""
    starts = cu_seqlens[:-1].long()[segments]
    lengths = cu_seqlens.diff().long()[segments]
    return starts.repeat_interleave(lengths) + segment_offsets(lengths)


def pack(sequences: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> Packed:
    """Lists of tokens (prompt and response) -> `Packed`, on the CPU."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
    return Packed(tokens, cumulative(lengths), cumulative(torch.tensor(response_lengths, dtype=torch.int64)))


def pack_turns(sequences: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> Packed:
    """Lists of tokens (prompt, turns and observations) -> `Packed`, on the CPU; masks: True where the policy wrote."""
    packed = pack(sequences, [sum(mask) for mask in masks])
    return replace(packed, mask=torch.tensor([bool(x) for mask in masks for x in mask], dtype=torch.bool))
