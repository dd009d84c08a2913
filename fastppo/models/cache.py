"""What a forward pass tells every layer's attention: where the sequences of a packed row lie, or the sampler's cache.

Both go to `fastppo.models.attention` as a keyword that transformers passes on unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from fastppo.data import segment_offsets
from fastppo.distributed import to_device
from fastppo.models.parallel.group import Split


@dataclass(frozen=True)
class SequenceLayout:
    """Positions of the sequences in a packed row, computed once for all layers of a forward pass.

    Adjacent sequences of equal length are computed in one call; an attention backend computes all in one.

    If they are to be computed apart, every sequence has a call of its own: on the CPU in fp32 batched products round
    differently by their number, and by where in the batch they are.
    """

    runs: tuple[tuple[int, int, int], ...]  # (first row, number of sequences, their length)
    cu_seqlens: Tensor  # (B+1,) int32, on the device
    longest: int  # number of tokens of the longest sequence
    split: Split | None = None  # of the row over ranks; None: this rank has all of it

    @staticmethod
    def of(
        lengths: Sequence[int], device: torch.device, *, apart: bool = False, split: Split | None = None
    ) -> SequenceLayout:
        runs, start = [], 0
        for length, group in groupby(lengths):
            count = len(list(group))
            runs += [(start + i * length, 1, length) for i in range(count)] if apart else [(start, count, length)]
            start += count * length
        cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()
        return SequenceLayout(tuple(runs), to_device(cu_seqlens, device), max(lengths, default=0), split)


class ActiveRows(NamedTuple):
    """The R rows of a decode step, as each attention backend takes them; made once for all layers, on the device."""

    rows: Tensor  # (R,) int64, ascending
    lengths: Tensor  # (R,) int64, number of positions in each of these rows, so the place of the new one
    rows_int32: Tensor
    lengths_int32: Tensor
    lengths_after: Tensor  # (R,) int32, with the new position
    starts: Tensor  # (R + 1,) int32, where each row begins in `as_tokens`, and the number of its tokens
    queries: Tensor  # (R + 1,) int32, where each row's one query begins: 0 to R


class Extension(NamedTuple):
    """Tokens that a row of the cache is extended by."""

    start: int  # where they begin in the packed row of all that are computed together
    length: int
    row: int
    before: int  # positions that the row has before them


class Cache:
    """Keys and values of R rows; each row has its own length. The buffers never grow; `free` gives up their memory.

    Prefill writes packed prompts into any rows, from position 0 on, whatever those rows held; a row may also begin as a
    copy of another. An extension writes packed tokens behind what rows hold, and they attend to that. Decode appends
    one position to every active row. The model runs with `use_cache=False`: transformers' cache classes are not used.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device):
        heads, width = self.shape(config)
        shape = (config.num_hidden_layers, rows, heads, length, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.longest = length  # the most positions that a row is to take; more are there for another batch
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # number of positions in each row
        self.layout: SequenceLayout | None = None  # of the prompts during prefill, None in decode
        self.extensions: tuple[Extension, ...] = ()  # what rows are being extended by
        self.active: ActiveRows | None = None  # of the step that has begun
        self._counts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._places: tuple[Tensor, Tensor] | None = None  # (N,) int64 each: row and position of each prompt token

    @staticmethod
    def shape(config: PreTrainedConfig) -> tuple[int, int]:
        """Number of key/value heads, and the width of a head."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_width(config)

    def begin_prefill(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Packed prompts of these lengths follow, each for its row. Those beyond the rows are computed and not kept."""
        device = self.lengths.device
        kept, at = torch.tensor(lengths[: len(rows)], dtype=torch.int64), torch.tensor(rows, dtype=torch.int64)
        self.layout = SequenceLayout.of(lengths, device, apart=device.type == "cpu")
        places = at.repeat_interleave(kept), segment_offsets(kept)
        self._places = to_device(places[0], device), to_device(places[1], device)
        self.lengths[to_device(at, device)] = to_device(kept, device)

    def begin_extension(
        self, lengths: Sequence[int], rows: Sequence[int], before: Sequence[int], kept: int | None = None
    ) -> None:
        """Packed tokens follow, `lengths` of them for each of these rows, which have `before` positions: so many count,
        whatever was decoded behind them. kept: those beyond the first so many are computed and not kept."""
        device = self.lengths.device
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.extensions = tuple(Extension(*one) for one in zip(starts, lengths, rows, before, strict=True))
        count, at, held = (torch.tensor(x[:kept], dtype=torch.int64) for x in (lengths, rows, before))
        places = at.repeat_interleave(count), held.repeat_interleave(count) + segment_offsets(count)
        self._places = to_device(places[0], device), to_device(places[1], device)
        self.lengths[to_device(at, device)] = to_device(held + count, device)

    def fill(self, layer: int | None, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values of the packed prompts, (1, kv heads, N, width) each."""
        assert layer is not None and self._places is not None  # begin_prefill or begin_extension has been called
        rows, positions = self._places
        for buffer, new in ((self.keys, key), (self.values, value)):
            buffer[layer].transpose(1, 2)[rows, positions] = new[0, :, : len(rows)].transpose(0, 1)

    def begin_decode(self) -> None:
        self.layout, self.extensions = None, ()

    def copy_row(self, source: int, targets: Sequence[int], length: int) -> None:
        """Let the rows `targets` hold the first `length` positions of row `source`, and no more."""
        device, others = self.lengths.device, [row for row in targets if row != source]
        if others:
            at = to_device(torch.tensor(others), device)
            for buffer in (self.keys, self.values):
                part = buffer[:, :, :, :length]
                part.index_copy_(1, at, part[:, source : source + 1].expand(-1, len(others), -1, -1, -1))
        self.lengths.index_fill_(0, to_device(torch.tensor(targets), device), length)

    def begin_step(self, rows: Tensor) -> None:
        """Select the rows (active,) int64, ascending, whose next position is decoded."""
        lengths = self.lengths[rows]
        _, count, heads, length, _ = self.keys.shape
        starts = F.pad(rows * (heads * length), (0, 1), value=((count - 1) * heads + 1) * length)
        self.active = ActiveRows(
            rows=rows,
            lengths=lengths,
            rows_int32=rows.int(),
            lengths_int32=lengths.int(),
            lengths_after=(lengths + 1).int(),
            starts=starts.int(),
            queries=self._counts[: len(rows) + 1],
        )

    def end_step(self, kept: Tensor | None = None) -> None:
        """kept (active,) bool: rows that keep the position; the others decode it once more. None: all do."""
        assert self.active is not None  # begin_step has been called
        self.lengths[self.active.rows] += 1 if kept is None else kept
        self.active = None

    def states(self) -> list[Tensor]:
        """What takes the memory."""
        return [self.keys, self.values]

    def free(self) -> None:
        """Give the memory of keys and values up, until `restore`."""
        for buffer in self.states():
            buffer.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take memory again if it was given up, perhaps in another place; all rows are then empty."""
        for buffer in self.states():
            if not buffer.untyped_storage().nbytes():
                buffer.untyped_storage().resize_(buffer.nbytes)
                buffer.zero_()  # what is there may be NaN, which a weight of 0 in attention does not silence
        self.lengths.zero_()


def as_tokens(buffer: Tensor) -> Tensor:
    """The keys or values of a layer (rows, heads, length, width) as tokens (T, heads, width), a view to read from.

    Row r begins at token r * heads * length; the tokens between the rows are other heads' and mean nothing.
    """
    rows, heads, length, width = buffer.shape
    return buffer.as_strided((((rows - 1) * heads + 1) * length, heads, width), (width, length * width, 1))


def head_width(config: PreTrainedConfig) -> int:
    """The width of an attention head; config: of the language model (`get_text_config`)."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
