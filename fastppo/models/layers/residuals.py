"""Decoder layers whose residual sum and the norm after it are one op.

A layer is taken if its own forward pass is y = x + s attention(norm(x)), y + s feed_forward(norm(y)), with or without a
norm before the attention, and norms after attention and feed-forward; s is 1, or a number of the layer (Granite). That
is seen from what the layer gives to its children, for which stand-ins return random numbers, and the form that is read
off must then give the same to the same stand-ins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastppo.models.layers.classes import is_plain, replace_functions, shell, weighted_children, with_functions
from fastppo.models.layers.norms import is_fused

SHAPE = (3, 5, 8)  # of the random states; three rows, so that no layer takes a tensor for a pair
OTHER = "packed"  # a keyword that is not the layer's own, but the attention's


@dataclass(frozen=True)
class LayerForm:
    """The computation of a layer, by the names of its children."""

    attention: str
    feed_forward: str
    before: str | None  # norm of the layer's input
    after_attention: str | None  # norm of the attention's output
    between: str  # norm of the sum
    after_feed_forward: str | None
    scale: str | None  # the layer's attribute with s; None: 1
    states: str  # the layer's argument for its input
    attention_states: str | None  # the keyword with which the attention gets its own; None: its first argument
    arguments: tuple[str, ...]  # of the layer, after its input
    defaults: tuple[tuple[str, Any], ...]  # of these
    keywords: tuple[tuple[str, str], ...]  # of the attention, and the layer's argument that each one is
    passes_others: bool  # whether the attention gets the layer's further keywords, too
    pairs: tuple[bool, bool]  # whether attention and feed-forward return their output in a tuple


def fuse_residual(layer: nn.Module) -> bool:
    """Let the layer add its residual in the norm after it, if its computation has such a form; returns whether so."""
    form = layer_form(layer)
    if form is not None:
        cast(Any, layer).layer_form = form
        replace_functions(layer, _functions)
    return form is not None


def _functions(own: Any) -> Mapping[str, Callable[..., Any]]:
    def forward(self: Any, *args: Any, **keywords: Any) -> Tensor:
        """The layer's input (..., H), and the arguments of its own forward pass -> (..., H)"""
        form = self.layer_form
        given = dict(form.defaults) | dict(zip((form.states, *form.arguments), args, strict=False)) | keywords
        states: Tensor = given.pop(form.states)
        passed = {key: given[name] for key, name in form.keywords}
        if form.passes_others:
            passed |= {key: value for key, value in given.items() if key not in form.arguments}
        x = states if form.before is None else getattr(self, form.before)(states)
        args = (x,) if form.attention_states is None else ()
        if form.attention_states is not None:
            passed[form.attention_states] = x
        out = getattr(self, form.attention)(*args, **passed)
        out = _addend(self, out[0] if form.pairs[0] else out, form.after_attention)
        x, total = getattr(self, form.between)(out, states)  # as a module: at ZeRO stage 3 its hooks gather the weight
        out = getattr(self, form.feed_forward)(x)
        y: Tensor = total + _addend(self, out[0] if form.pairs[1] else out, form.after_feed_forward)
        return y

    return {"forward": forward}


def _addend(layer: Any, out: Tensor, norm: str | None) -> Tensor:
    """What a part of the layer adds to the residual, from the part's output."""
    normed: Tensor = out if norm is None else getattr(layer, norm)(out)
    scale = layer.layer_form.scale
    return normed if scale is None else normed * getattr(layer, scale)


def layer_form(layer: nn.Module) -> LayerForm | None:
    """The form of the layer's own forward pass; None if it has none."""
    weighted = weighted_children(layer)
    norms = [name for name in weighted if is_fused(getattr(layer, name))]
    if not is_plain(layer) or not norms or len(weighted) != len(norms) + 2:
        return None
    one, two = (name for name in weighted if name not in norms)
    for pairs in ((True, False), (True, True), (False, False)):
        for attention, feed_forward in ((one, two), (two, one)):
            returns = {attention: pairs[0], feed_forward: pairs[1]} | dict.fromkeys(norms, False)
            try:
                probe = _Probe(layer, returns)
                form = next((form for form in probe.forms(attention, pairs) if probe.same(form)), None)
            except Exception:  # the layer's own code may do anything with what the stand-ins return
                continue
            if form is not None:
                return form
    return None


@dataclass(frozen=True)
class _Call:
    """What a child got, and what it returned."""

    name: str
    states: Tensor  # with the residual added
    states_as: str | None  # the keyword; None: the first argument
    keywords: dict[str, Any]  # all others

    def same(self, other: _Call) -> bool:
        return (
            (self.name, self.states_as) == (other.name, other.states_as)
            and torch.allclose(self.states, other.states, rtol=1e-5, atol=1e-5)
            and self.keywords.keys() == other.keywords.keys()
            and all(value is other.keywords[key] for key, value in self.keywords.items())
        )


class _Child(nn.Module):
    """Stands for a child of a layer: returns random numbers in the shape of its input, and notes its call."""

    def __init__(self, name: str, calls: list[_Call], pair: bool):
        super().__init__()
        self.name, self.calls, self.pair = name, calls, pair

    def forward(self, *args: Any, **keywords: Any) -> Any:
        states_as = None if args else next(name for name, value in keywords.items() if isinstance(value, Tensor))
        states, *residual = args if states_as is None else (keywords.pop(states_as),)
        total = states + residual[0] if residual else states
        out = torch.randn(total.shape, generator=torch.Generator().manual_seed(1 + len(self.calls)))
        self.calls.append(_Call(self.name, total, states_as, keywords))
        if residual:
            return out, total
        return (out, None) if self.pair else out


class _Probe:
    """Passes through a layer with stand-ins for its children, and with values of no meaning for its arguments."""

    def __init__(self, layer: nn.Module, pairs: dict[str, bool]):
        """pairs: the children with weights, and whether each one returns its output in a tuple."""
        self._layer, self._pairs = layer, pairs
        states, *others = inspect.signature(layer.forward).parameters.values()
        self._states = states.name
        named = [p for p in others if p.kind != p.VAR_KEYWORD]
        self._defaults = {p.name: None if p.default is p.empty else p.default for p in named}
        self._given = {name: v if isinstance(v, bool) else object() for name, v in self._defaults.items()}
        self._others = {OTHER: object()} if len(named) < len(others) else {}
        self._own = self._run(None, training=False)

    def _run(self, form: LayerForm | None, *, training: bool) -> tuple[Any, list[_Call]]:
        """The output and the calls of the children, of the layer's own forward pass or in the given form."""
        calls: list[_Call] = []
        other = shell(self._layer, {name: _Child(name, calls, pair) for name, pair in self._pairs.items()})
        if form is not None:
            own: Any = type(self._layer)
            other.__class__ = with_functions(own, _functions)
            other.layer_form = form
        other.training = training
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return other.forward(x, **self._given, **self._others), calls

    def forms(self, attention: str, pairs: tuple[bool, bool]) -> Iterator[LayerForm]:
        """The forms that the order of the calls allows."""
        _, calls = self._own
        names = [call.name for call in calls]
        norms = [name for name in self._pairs if is_fused(getattr(self._layer, name))]
        first, second = (i for i, name in enumerate(names) if name not in norms)
        before, middle, after = names[:first], names[first + 1 : second], names[second + 1 :]
        if sorted(names) != sorted(self._pairs) or names[first] != attention or not middle:
            return
        call = calls[first]
        layer_names = {id(value): name for name, value in self._given.items() if not isinstance(value, bool)}
        flags = {name: name for name in call.keywords if name in self._given}  # a flag keeps its name
        keywords = {key: layer_names.get(id(value), flags.get(key)) for key, value in call.keywords.items()}
        form = LayerForm(
            attention=attention,
            feed_forward=names[second],
            before=before[0] if before else None,
            after_attention=middle[0] if len(middle) == 2 else None,
            between=middle[-1],
            after_feed_forward=after[0] if after else None,
            scale=None,
            states=self._states,
            attention_states=call.states_as,
            arguments=tuple(self._defaults),
            defaults=tuple(self._defaults.items()),
            keywords=tuple((key, name) for key, name in keywords.items() if name is not None),
            passes_others=OTHER in call.keywords,
            pairs=pairs,
        )
        yield form
        numbers = [name for name, value in vars(self._layer).items() if type(value) is float]
        yield from (replace(form, scale=name) for name in numbers)

    def same(self, form: LayerForm) -> bool:
        """Whether the layer in this form calls its children as its own forward pass does, and returns the same."""
        for training in (False, True):
            own, own_calls = self._run(None, training=training)
            out, calls = self._run(form, training=training)
            if not isinstance(own, Tensor) or not torch.allclose(own, out, rtol=1e-5, atol=1e-5):
                return False
            if len(calls) != len(own_calls) or not all(a.same(b) for a, b in zip(own_calls, calls, strict=True)):
                return False
        return True
