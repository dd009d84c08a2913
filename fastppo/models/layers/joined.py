"""Projections that read the same states, such as queries, keys and values, or gate and up, as one product.

A decode step has a product for each, and on a few rows they are bound by their launches. Where their weights lie one
after another in memory, one product computes all, without another copy of a weight: in the flat buffers in which
DeepSpeed keeps what it trains at ZeRO stages 1 and 2, and in the copy that is gathered to sample from at stage 3.
Modules keep their names and parameters. Those with a bias, with adapters or of another class than `nn.Linear` (as
quantized ones are) stay as they are, and so do experts, which read what a router chose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastppo.data import pack
from fastppo.errors import log_once
from fastppo.models.layers.classes import own_class
from fastppo.models.layers.products import linear
from fastppo.models.roles import Policy

OBSERVED = pack([(0,) * 16], [1])  # tokens of the pass that shows what reads what

_readers: WeakKeyDictionary[Policy, list[list[nn.Linear]]] = WeakKeyDictionary()


@contextmanager
def joined_projections(policy: Policy) -> Iterator[None]:
    """Within this context the linear modules of a layer that read the same tensor compute one product, where their
    weights are neighbours now. For passes without gradient."""
    if policy not in _readers:
        _readers[policy] = list(_readers_of_the_same(policy))
    products = [_Product(part) for readers in _readers[policy] for part in _neighbours(readers)]
    if products:
        modules = sum(len(product.modules) for product in products)
        log_once(f"sampling: {modules} projections are computed as {len(products)} products", logging.INFO)
    try:
        for product in products:
            product.install()
        yield
    finally:
        for product in products:
            product.remove()


class _Product:
    """Linear modules whose weights are neighbours, and the product that all of them are parts of."""

    def __init__(self, modules: Sequence[nn.Linear]):
        self.modules = modules
        self._rows = [module.out_features for module in modules]
        width = modules[0].in_features
        self._weight = modules[0].weight.detach().as_strided((sum(self._rows), width), (width, 1))
        self._states: Tensor | None = None  # what the parts that have not been asked for were computed from
        self._parts: list[Tensor | None] = [None] * len(modules)

    def install(self) -> None:
        for i, module in enumerate(self.modules):
            module.forward = partial(self._part, i)  # type: ignore[method-assign]

    def remove(self) -> None:
        for module in self.modules:
            del module.forward

    def _part(self, i: int, states: Tensor) -> Tensor:
        """What module i computes from states (..., H): (..., rows of its weight), not contiguous."""
        if self._states is not states or self._parts[i] is None:
            self._states = states
            self._parts = list(linear(states, self._weight).split(self._rows, -1))
        part, self._parts[i] = self._parts[i], None
        if all(other is None for other in self._parts):
            self._states = None  # it is kept no longer than it is needed
        assert part is not None
        return part


@torch.no_grad()
def _readers_of_the_same(policy: Policy) -> Iterator[list[nn.Linear]]:
    """The linear modules of each layer that one pass gives the same tensor, as far as they can be joined."""
    calls: list[tuple[nn.Linear, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            calls.append((module, inputs[0]))

    candidates = [module for name, module in policy.model.named_modules() if _may_be_joined(name, module)]
    hooks = [module.register_forward_pre_hook(record) for module in candidates]
    try:
        policy.hidden(OBSERVED.to(policy.device))
    finally:
        for hook in hooks:
            hook.remove()
    called = [module for module, _ in calls]
    once = [(module, states) for module, states in calls if called.count(module) == 1]
    for _, same in groupby(sorted(once, key=lambda call: id(call[1])), key=lambda call: id(call[1])):
        modules = [module for module, _ in same]
        if len(modules) > 1:
            yield modules


def _may_be_joined(name: str, module: nn.Module) -> bool:
    """Whether it is a plain linear module without bias, and not one of a list within a layer, as experts are."""
    plain = own_class(module) is nn.Linear and getattr(module, "bias", None) is None and "forward" not in vars(module)
    return plain and not module._forward_hooks and sum(part.isdigit() for part in name.split(".")) <= 1


def _neighbours(modules: Sequence[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Those whose weights follow each other without a gap in one storage, at least two."""
    run: list[nn.Linear] = []
    for module in sorted(modules, key=lambda module: module.weight.data_ptr()):
        if run and not _follows(run[-1].weight, module.weight):
            if len(run) > 1:
                yield run
            run = []
        run.append(module)
    if len(run) > 1:
        yield run


def _follows(first: Tensor, second: Tensor) -> bool:
    same_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    dense = first.is_contiguous() and second.is_contiguous() and first.dtype == second.dtype
    next_to = second.data_ptr() == first.data_ptr() + first.nbytes
    return same_memory and dense and next_to and first.shape[1:] == second.shape[1:] and first.numel() > 0
