"""Rotary frequencies that depend on the length of a sequence (longrope, Ding et al., 2024), for packed rows.

Such a model uses short factors for sequences of up to `original_max_position_embeddings` tokens and long factors for
longer ones. transformers chooses the factors by the longest sequence of a batch, and a packed row is one batch: one
long sequence would change the factors of all others. Here the factors are chosen for each sequence, as in the model's
forward pass over that sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig

from fastppo.errors import FastPPOError

LONGROPE = "longrope"  # the rope_type of transformers whose factors depend on the length


def rope_parameters(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rope parameters of a config: one set, or one for each type of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from (
        [parameters] if "rope_type" in parameters else (each for each in parameters.values() if isinstance(each, dict))
    )


def longrope_switch(config: PreTrainedConfig) -> int | None:
    """The largest number of tokens for which short factors are used; None for a model without longrope."""
    longropes = [rope for rope in rope_parameters(config) if rope.get("rope_type") == LONGROPE]
    lengths = [rope.get("original_max_position_embeddings") for rope in longropes]
    return min((n for n in lengths if n is not None), default=None)


_row: tuple[Tensor, slice] | None = None  # positions (N,) of the packed row of which a part is computed, and the part


@contextmanager
def part_of(positions: Tensor, part: slice) -> Iterator[None]:
    """Within this context the models compute a part of a packed row with these positions (N,): factors depend on the
    length of a sequence, of which the part may have a piece only."""
    global _row
    row_before, _row = _row, (positions, part)
    try:
        yield
    finally:
        _row = row_before


class PerSequence(nn.Module):
    """Replaces a rotary embedding with longrope and chooses the factors for each sequence."""

    def __init__(self, embedding: nn.Module, switch: int):
        super().__init__()
        self.embedding = embedding
        self.switch = switch  # `longrope_switch`

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """position_ids (1, N) of a packed row, from 0 in every sequence, or (R, 1) of a decode step.

        x: gives the dtype and the device. Returns the result of `embedding`, usually cos and sin, (1, N, width) each.
        Raises FastPPOError for a decode step beyond the switch: the keys in the cache were rotated by other factors.
        """
        type_argument = () if layer_type is None else (layer_type,)
        if isinstance(position_ids, FakeTensor):  # the memory plan needs shapes only
            name = "original_inv_freq" if layer_type is None else f"{layer_type}_original_inv_freq"
            width = 2 * len(getattr(self.embedding, name))
            return tuple(x.new_empty(*position_ids.shape, width) for _ in range(2))
        if _row is None:
            return self._rotations(x, position_ids, *type_argument)
        positions, part = _row
        whole = self._rotations(x, positions[None], *type_argument)
        return whole[:, part] if isinstance(whole, Tensor) else tuple(each[:, part] for each in whole)

    def _rotations(self, x: Tensor, position_ids: Tensor, *type_argument: str) -> Any:
        if int(position_ids.max()) < self.switch:
            return self.embedding(x, position_ids, *type_argument)
        if position_ids.shape[0] > 1:
            raise FastPPOError(
                f"a sequence cannot be decoded beyond original_max_position_embeddings = {self.switch} tokens: for a"
                f" longer sequence the model uses other rotary frequencies ({LONGROPE}), for the earlier tokens too"
            )
        sequence = (position_ids[0] == 0).cumsum(0)  # (N,) from 1
        is_long = (sequence.bincount() > self.switch)[sequence]  # (N,) bool
        groups = [mask for mask in (is_long, ~is_long) if bool(mask.any())]
        order = torch.cat([mask.nonzero()[:, 0] for mask in groups]).argsort()
        parts = [self.embedding(x, position_ids[:, mask], *type_argument) for mask in groups]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=1)[:, order]
        return tuple(torch.cat(part, dim=1)[:, order] for part in zip(*parts, strict=True))


def rotate_each_sequence(model: nn.Module, config: PreTrainedConfig) -> None:
    """Replace each rotary embedding whose frequencies depend on the length by a `PerSequence`."""
    switch = longrope_switch(config)
    if switch is None:
        return
    for parent in [module for module in model.modules() if not isinstance(module, PerSequence)]:
        for name, child in list(parent.named_children()):
            types = getattr(child, "rope_type", None)
            if types == LONGROPE or (isinstance(types, dict) and LONGROPE in types.values()):
                setattr(parent, name, PerSequence(child, switch))
