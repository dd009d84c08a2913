"""The frozen prefix: the lowest layers of a model, if they do not train.

The output of a frozen prefix is the same in every pass over a batch, so it is computed once: for the old logprobs, for
the reference (which starts from the same weights) and for all epochs. In the quickstart, where 22 of 30 layers are
frozen, this saves two fifths of the layer passes in the phases experience and learning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.data import Packed
from fastppo.models.parallel.group import sequence_group


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module that contains the model's list of layers, and the name of the list; None without such a list."""
    depth = depth_of(model)
    for parent in model.base_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name
    return None


def depth_of(model: PreTrainedModel) -> int:
    """The number of layers."""
    depth: int = model.config.get_text_config().num_hidden_layers
    return depth


def after_layers(parent: nn.Module) -> list[nn.Module]:
    """The modules between the last layer and the heads: a final norm."""
    return [child for name, child in parent.named_children() if "norm" in name or name == "ln_f"]


def prefix_depth(model: PreTrainedModel) -> int:
    """The number of lowest layers that form a frozen prefix; 0 if the embeddings or other lower parameters train."""
    parent_and_name = layers_of(model)
    if parent_and_name is None:
        return 0
    parent, name = parent_and_name
    layers = cast(nn.ModuleList, getattr(parent, name))
    in_layers_or_above = {id(p) for module in [*layers, *after_layers(parent)] for p in module.parameters()}
    if any(p.requires_grad and id(p) not in in_layers_or_above for p in model.base_model.parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return [*trained[:-1], True].index(True)  # the last layer is never part of the prefix


class SkippedLayer(nn.Module):
    """Replaces a layer: returns its input, or `states` if given, and stores its input."""

    def __init__(self, layer: nn.Module, states: Tensor | None):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some models read this attribute of their layers
        self.states = states
        self.received: Tensor | None = None  # the input of the last pass

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.received = states
        return states if self.states is None else self.states


@contextlib.contextmanager
def skipping(model: PreTrainedModel, layers: range, states: Tensor | None = None) -> Iterator[SkippedLayer]:
    """Within this context the given layers compute nothing; the first of them returns `states` if given."""
    parent_and_name = layers_of(model)
    assert parent_and_name is not None
    parent, name = parent_and_name
    model_layers = cast(nn.ModuleList, getattr(parent, name))
    skipped = {i: SkippedLayer(model_layers[i], states if i == layers.start else None) for i in layers}
    setattr(parent, name, nn.ModuleList([skipped.get(i, layer) for i, layer in enumerate(model_layers)]))
    try:
        yield skipped[layers.start]
    finally:
        setattr(parent, name, model_layers)


class PrefixStates:
    """A cache of the outputs of frozen prefixes for one batch, by sequence, as computed by this process."""

    def __init__(self, *, keep: bool = True) -> None:
        """keep: whether the states of a sequence are cached; False: they are computed at each call."""
        self._keep = keep
        self._states: dict[int, dict[int, Tensor]] = {}  # prefix owner -> sequence -> (tokens, H), on the role's device
        # Where rows are split over ranks: prefix owner -> sequences of a row -> (tokens of this rank, H)
        self._parts: dict[int, dict[tuple[int, ...], Tensor]] = {}

    def __call__(self, role: Any, packed: Packed, sequences: Tensor) -> Tensor | None:
        """The states (N, H) of these sequences of the batch; None if the role has no frozen prefix.

        packed: the sequences in this order. All are computed if one of them is not cached. With several ranks this
        happens if a later epoch assigns a sequence to another rank; and if ranks split a row, if it does not pack the
        same sequences, whose tokens are then on other ranks.
        """
        if not role.prefix_depth:
            return None
        if not self._keep:
            with torch.no_grad():
                return cast(Tensor, role.prefix(packed))
        indices = sequences.tolist()
        if sequence_group().size > 1:
            return self._part(role, packed, tuple(indices))
        cached_states = self._states.setdefault(role.prefix_owner, {})
        if any(index not in cached_states for index in indices):
            with torch.no_grad():
                states = role.prefix(packed)
            cached_states.update(zip(indices, states.split(packed.lengths_on_host), strict=True))
        return torch.cat([cached_states[index] for index in indices])

    def _part(self, role: Any, packed: Packed, sequences: tuple[int, ...]) -> Tensor:
        """The states of this rank's tokens of a row. Those of a sequence are cached for one row, the last one."""
        parts = self._parts.setdefault(role.prefix_owner, {})
        if sequences not in parts:
            for row in [row for row in parts if not set(row).isdisjoint(sequences)]:
                del parts[row]
            with torch.no_grad():
                parts[sequences] = role.prefix(packed)
        return parts[sequences]

    def clear(self) -> None:
        """Delete all states, which frees their memory."""
        self._states.clear()
        self._parts.clear()
