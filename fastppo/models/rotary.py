"""Rotary frequencies that depend on how long a sequence is (longrope, Ding et al., 2024), for packed rows.

Such a model turns its heads by short factors up to `original_max_position_embeddings` tokens and by long ones beyond.
transformers chooses by the longest sequence of a batch, and a packed row is one batch: a long sequence would choose for
all others. Here each sequence chooses for itself, as in the model's own forward pass over that sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig

from fastppo.errors import FastPPOError

SWITCHES = "longrope"  # the rope_type of transformers that is meant


def ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rope parameters of a config: one set, or one for each type of layer."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    yield from [found] if "rope_type" in found else (each for each in found.values() if isinstance(each, dict))


def switch_of(config: PreTrainedConfig) -> int | None:
    """The most tokens of a sequence that is still turned by short factors; None where nothing depends on the length."""
    switching = [rope for rope in ropes(config) if rope.get("rope_type") == SWITCHES]
    lengths = [rope.get("original_max_position_embeddings") for rope in switching]
    return min((n for n in lengths if n is not None), default=None)


class PerSequence(nn.Module):
    """Stands in for a rotary embedding with longrope."""

    def __init__(self, own: nn.Module, switch: int):
        super().__init__()
        self.own = own
        self.switch = switch  # `switch_of`

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """position_ids (1, N) of a packed row, from 0 in every sequence, or (R, 1) of a decode step.

        x: of the dtype and device wanted. Returns what `own` does, as a rule cos and sin, (1, N, width) each. Raises
        FastPPOError for a decode step beyond the switch: the keys in the cache are turned by other factors.
        """
        of_layers = () if layer_type is None else (layer_type,)
        if isinstance(position_ids, FakeTensor):  # the plan wants shapes and no numbers
            name = "original_inv_freq" if layer_type is None else f"{layer_type}_original_inv_freq"
            width = 2 * len(getattr(self.own, name))
            return tuple(x.new_empty(*position_ids.shape, width) for _ in range(2))
        if int(position_ids.max()) < self.switch:
            return self.own(x, position_ids, *of_layers)
        if position_ids.shape[0] > 1:
            raise FastPPOError(
                f"a sequence cannot be decoded beyond original_max_position_embeddings = {self.switch} tokens: from"
                f" there on the model's rotary frequencies ({SWITCHES}) are others, for all tokens before too"
            )
        sequence = (position_ids[0] == 0).cumsum(0)  # (N,) from 1
        long = (sequence.bincount() > self.switch)[sequence]  # (N,) bool
        groups = [where for where in (long, ~long) if bool(where.any())]
        order = torch.cat([where.nonzero()[:, 0] for where in groups]).argsort()
        parts = [self.own(x, position_ids[:, where], *of_layers) for where in groups]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=1)[:, order]
        return tuple(torch.cat(part, dim=1)[:, order] for part in zip(*parts, strict=True))


def turn_each_sequence(model: nn.Module, config: PreTrainedConfig) -> None:
    """Put a `PerSequence` in the place of each rotary embedding whose frequencies depend on the length."""
    switch = switch_of(config)
    if switch is None:
        return
    for parent in [module for module in model.modules() if not isinstance(module, PerSequence)]:
        for name, child in list(parent.named_children()):
            types = getattr(child, "rope_type", None)
            if types == SWITCHES or (isinstance(types, dict) and SWITCHES in types.values()):
                setattr(parent, name, PerSequence(child, switch))
