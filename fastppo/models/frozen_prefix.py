"""The frozen prefix: the lowest layers of a model where they do not train.

What a frozen prefix hands up is the same in every pass over a batch, so it is computed once: for old logprobs, for the
reference (which starts from the same weights) and for all epochs. In the quickstart, where 22 of 30 layers are
frozen, that is two fifths of the layers' passes in experience and learning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.data import Packed


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module that holds the model's list of layers, and the list's name; None if there is no such list."""
    depth = model.config.get_text_config().num_hidden_layers
    for parent in model.base_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name
    return None


def after_layers(parent: nn.Module) -> list[nn.Module]:
    """What stands between the last layer and the heads: a final norm."""
    return [child for name, child in parent.named_children() if "norm" in name or name == "ln_f"]


def prefix_depth(model: PreTrainedModel) -> int:
    """How many of the lowest layers are a frozen prefix: frozen, on frozen embeddings, and handing up one tensor."""
    holder = layers_of(model)
    if holder is None:
        return 0
    parent, name = holder
    layers = cast(nn.ModuleList, getattr(parent, name))
    above = {id(p) for module in [*layers, *after_layers(parent)] for p in module.parameters()}
    if any(p.requires_grad and id(p) not in above for p in model.base_model.parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return [*trained[:-1], True].index(True)  # the last layer is never part of it


class Passing(nn.Module):
    """Stands in for a layer: hands on what it gets, or `states` instead, and keeps what it got."""

    def __init__(self, layer: nn.Module, states: Tensor | None):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some models ask their layers for it
        self.states = states
        self.got: Tensor | None = None

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.got = states
        return states if self.states is None else self.states


@contextlib.contextmanager
def passing(model: PreTrainedModel, layers: range, states: Tensor | None = None) -> Iterator[Passing]:
    """Within this context the given layers compute nothing; the first of them hands on `states` where given."""
    holder = layers_of(model)
    assert holder is not None
    parent, name = holder
    all_layers = cast(nn.ModuleList, getattr(parent, name))
    stand_ins = {i: Passing(all_layers[i], states if i == layers.start else None) for i in layers}
    setattr(parent, name, nn.ModuleList([stand_ins.get(i, layer) for i, layer in enumerate(all_layers)]))
    try:
        yield stand_ins[layers.start]
    finally:
        setattr(parent, name, all_layers)


class PrefixStates:
    """A cache of what prefixes handed up in one batch, sequence by sequence, as far as this process computed it."""

    def __init__(self, *, keep: bool = True) -> None:
        """keep: whether a sequence's states are kept for the next time; else they are computed each time."""
        self._keep = keep
        self._states: dict[int, dict[int, Tensor]] = {}  # prefix -> sequence -> (tokens, H), on the role's device

    def __call__(self, role: Any, packed: Packed, sequences: Tensor) -> Tensor | None:
        """States for these sequences of the batch, `packed` holding them in this order; None where there is no prefix.

        They are computed if one of them is missing. On several ranks that happens where a later epoch brings a
        sequence that another rank had before.
        """
        if not role.prefix_depth:
            return None
        if not self._keep:
            with torch.no_grad():
                return cast(Tensor, role.prefix(packed))
        states_of = self._states.setdefault(role.prefix_owner, {})
        names = sequences.tolist()
        if any(name not in states_of for name in names):
            with torch.no_grad():
                states = role.prefix(packed)
            states_of.update(zip(names, states.split(packed.lengths.tolist()), strict=True))
        return torch.cat([states_of[name] for name in names])

    def clear(self) -> None:
        """Give up all states, and their memory."""
        self._states.clear()
