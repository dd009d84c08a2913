"""What a model holds in memory, read off the model itself: built on the meta device, without a weight.

Parameters are counted. Activations are not guessed from a formula: one and two layers of the model run forward and
backward on fake tensors (shapes and dtypes, no data), every storage that comes and goes is counted, and layers and
sequences beyond those are the same again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo.distributed import Neighbours
from fastppo.errors import FastPPOError
from fastppo.models import (
    MINIATURE_ERRORS,
    PLAIN_ATTENTION_MAX,
    Backbone,
    Cache,
    Critic,
    ModelError,
    Policy,
    SequenceLayout,
    Split,
    check_model,
    layers_of,
    miniature,
    prefix_depth,
    raised_by_a_model,
    recompute_layers,
    summary_of,
    width_of,
)

WHOLE = 100_000  # elements: DeepSpeed does not partition parameters with fewer (stage3_param_persistence_threshold)


@dataclass(frozen=True)
class Pass:
    """Bytes of activations of one pass over a microbatch."""

    kept: int  # alive when the forward pass is over, for the backward pass; 0 without gradient
    peak: int  # the most that is alive at any moment of forward and backward


class Footprint:
    """Sizes of one role's model. Counts are parameters, not bytes."""

    def __init__(self, role: Backbone, dtype: torch.dtype, *, cpu: bool):
        """role: on the meta device, with `requires_grad` as in the run. cpu: whether the run is on the CPU."""
        model, config = role.model, role.model.config.get_text_config()
        parameters = list(role.parameters())
        head = model.get_output_embeddings()
        self.dtype, self.bytes = dtype, dtype.itemsize
        self.parameters = sum(p.numel() for p in parameters)
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        # As DeepSpeed counts it: the parameters that one module owns are gathered together at stage 3.
        self.largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in role.modules())
        self.largest_trained = max((p.numel() for p in parameters if p.requires_grad), default=0)
        # Learning rates: a value head on the actor's backbone has its own.
        self.groups = 2 if isinstance(role, Policy) and role.value_head is not None else 1
        self.layers: int = config.num_hidden_layers
        self.width = role.value_head.weight.shape[1] if isinstance(role, Critic) else width_of(model)
        self.vocabulary: int = config.vocab_size
        self.head_trains = head is not None and bool(next(head.parameters()).requires_grad)
        self.prefix = prefix_depth(model)
        self.key_value_heads, head_width = Cache.shape(config)
        self.heads: int = getattr(config, "num_attention_heads", self.key_value_heads)
        self.head_width = head_width
        # At ZeRO stage 3: parameters that are partitioned, as DeepSpeed keeps small ones whole, and modules with some.
        owners = [[p.numel() for p in module.parameters(recurse=False)] for module in role.modules()]
        self.partitioned = sum(n for n in (p.numel() for p in parameters) if n >= WHOLE)
        self.modules = sum(max(sizes, default=0) >= WHOLE for sizes in owners)
        # bytes of keys and values of one token
        self.position = 2 * self.layers * self.key_value_heads * head_width * self.bytes
        # What an engine with weights of its own has of them: no adapters, which are merged, and no value head.
        own = [p for name, p in model.named_parameters() if ".lora_" not in name]
        self.adapters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in own)
        found = layers_of(model)
        layers = [model] if found is None else getattr(*found)
        self.largest_layer = max(self.largest, *(sum(p.numel() for p in layer.parameters()) for layer in layers))
        self._vectors = sum(p.numel() for p in own if p.dim() < 2)
        self._matrices = sum(p.numel() for p in own if p.dim() > 1)
        read = getattr(config, "hidden_size", self.width)
        self._key_value_weights = 2 * self.layers * self.key_value_heads * head_width * read
        self.on_cpu = cpu
        self.can_recompute = model.supports_gradient_checkpointing
        self.model = model
        self._passes = cache(self._measure)

    def part(self, ranks: int) -> int:
        """Parameters on each of so many GPUs, as tensor parallelism of vLLM splits them.

        Matrices are split, embeddings and head by vocabulary; vectors such as those of norms are whole on each GPU. So
        are the weights of at least one head of keys and values, where there are fewer heads than GPUs.
        """
        key_value = self._key_value_weights if ranks > self.key_value_heads else 0
        return -(-(self._matrices - key_value) // ranks) + key_value // self.key_value_heads + self._vectors

    def passes(self, sequences: int, length: int, *, gradient: bool, recomputed: int = 0, split: int = 1) -> Pass:
        """One pass over `sequences` sequences of `length` tokens each.

        split: how many ranks split their tokens; counted is the last of them, which has the most heads. recomputed: how
        many of the layers that the backward pass goes through, from the lowest upwards, keep their input alone.
        Backward, the layers above are done with, and what they kept is free, before one is recomputed.
        """
        depth = layers_in_graph(self.model)
        if not gradient or not recomputed or not depth:
            return self._pass(sequences, length, gradient, False, split)
        every = self._pass(sequences, length, gradient, True, split)
        if recomputed >= depth:
            return every
        none = self._pass(sequences, length, gradient, False, split)
        saved = recomputed * (none.kept - every.kept) // depth
        return Pass(none.kept - saved, max(none.peak - saved, every.peak))

    def _pass(self, sequences: int, length: int, gradient: bool, checkpointing: bool, split: int) -> Pass:
        try:
            return self._from_two_layers(sequences, length, gradient, checkpointing, split)
        except Exception as error:
            if isinstance(error, FastPPOError) or not raised_by_a_model(error):
                raise
        try:  # layers that do not run without the others, as where they share keys
            one, two = (self._passes(self.layers, n, length, gradient, checkpointing, split) for n in (1, 2))
            more = sequences - 1
            return Pass(one.kept + more * (two.kept - one.kept), one.peak + more * (two.peak - one.peak))
        except Exception as error:
            if isinstance(error, FastPPOError) or not raised_by_a_model(error):
                raise
            raise _why_not_counted(self.model, error) from error

    def _from_two_layers(self, sequences: int, length: int, gradient: bool, checkpointing: bool, split: int) -> Pass:
        """The uppermost two layers are run, and those below taken for the same again."""
        depth = layers_in_graph(self.model) if gradient else 1
        if depth == 0:  # nothing trains but a head on detached states
            gradient, depth = False, 1
        one, two = (self._passes(min(depth, 2), n, length, gradient, checkpointing, split) for n in (1, 2))
        least = tuple(self._passes(1, n, length, gradient, checkpointing, split) for n in (1, 2))

        def extended(shallow: tuple[int, int], deep: tuple[int, int], more: int) -> int:
            """Linear in sequences, and in layers beyond two."""
            base = deep[0] + (sequences - 1) * (deep[1] - deep[0])
            layer = (deep[0] - shallow[0]) + (sequences - 1) * ((deep[1] - shallow[1]) - (deep[0] - shallow[0]))
            return base + more * layer

        kept = extended((least[0].kept, least[1].kept), (one.kept, two.kept), max(depth - 2, 0))
        layer_kept = kept - extended((least[0].kept, least[1].kept), (one.kept, two.kept), 0)
        peak = extended((least[0].peak, least[1].peak), (one.peak, two.peak), 0) + layer_kept
        return Pass(kept, max(peak, kept))

    def _measure(
        self, layers: int, sequences: int, length: int, gradient: bool, checkpointing: bool, ranks: int
    ) -> Pass:
        # On a GPU attention is fused for every length; on the CPU short sequences go through plain products.
        length = length if self.on_cpu else max(length, PLAIN_ATTENTION_MAX + 1)
        split = Split.of(sequences * length, _Shapes(ranks - 1, ranks))
        tokens = sequences * length if split is None else max(split.counts[-1], 1)
        model = _top(self.model, layers)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            if checkpointing and gradient:
                recompute_layers(model, layers)
                for module in model.modules():  # not the whole model: OPT's draws a number in train mode and reads it
                    module.training = isinstance(module, GradientCheckpointingLayer)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.register_post_accumulate_grad_hook(_forget)
            ids, positions = (torch.zeros(1, tokens, dtype=torch.int64) for _ in range(2))
            live = _Live(*model.parameters(), *model.buffers())
            with live, nullcontext() if gradient else torch.no_grad():
                spans = SequenceLayout.of([length] * sequences, torch.device("cpu"), split=split)
                output = model(input_ids=ids, position_ids=positions, packed=spans, use_cache=False)
                hidden = output.last_hidden_state
                kept = live.now if gradient else 0
                if gradient and hidden.requires_grad:
                    hidden.backward(torch.zeros_like(hidden))
        return Pass(kept, live.peak)


class _Shapes(Neighbours):
    """A group of ranks as one of them sees it, without the others: what it gets has no data."""

    def exchange(self, parts: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return parts.new_empty(sum(received))


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still alive."""

    def __init__(self, *outside: Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes = {x.untyped_storage()._cdata: 0 for x in outside}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):  # which knows bf16 alone
            out: Any = grouped_product(*args[:3])
        else:
            out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, name: int) -> None:
        self.now -= self._sizes.pop(name)


def grouped_product(one: Tensor, other: Tensor, ends: Tensor | None = None) -> Tensor:
    """The product of experts' rows and weights, as a shape: rows (S, K) x (E, K, N), or (K, S) x (S, N) per expert."""
    groups = [ends.shape[0]] if one.dim() == other.dim() == 2 and ends is not None else []
    if one.dim() == 3:
        groups = [one.shape[0]] if other.dim() == 3 else []
    return one.new_empty([*groups, one.shape[-2], other.shape[-1]])


def _why_not_counted(model: PreTrainedModel, error: Exception) -> FastPPOError:
    """Of a model whose code fails without data: why it is refused, or that it cannot be counted but may be run."""
    small = None
    with suppress(*MINIATURE_ERRORS):  # a model that cannot be cut down is only tried at its own size
        small = miniature(type(model), model.config, torch.float32, torch.device("cpu"))
    if small is not None:
        try:
            check_model(small)
        except FastPPOError as refusal:
            return refusal
    return ModelError(
        f"{type(model).__name__}: what it needs in memory cannot be counted before it is loaded, since its code raises"
        f" {summary_of(error)} without data. --plan off runs it without a plan."
    )


def _forget(parameter: Tensor) -> None:
    """Gradients of parameters are counted with the model states."""
    parameter.grad = None


def layers_in_graph(model: PreTrainedModel) -> int:
    """How many layers the backward pass goes through: those from the lowest that trains, upwards."""
    found = layers_of(model)
    depth: int = model.config.get_text_config().num_hidden_layers
    if found is None:
        return depth
    layers = cast(nn.ModuleList, getattr(*found))
    inside = {id(p) for p in layers.parameters()}
    heads = [head for head in (model.get_output_embeddings(), getattr(model, "score", None)) if head is not None]
    apart = inside | {id(p) for head in heads for p in head.parameters()}
    try:
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    except NotImplementedError:  # the decoder of an encoder-decoder model, which hides them
        return depth
    if any(p.requires_grad and (id(p) not in apart or id(p) in embeddings) and p.dim() > 1 for p in model.parameters()):
        return depth
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return depth - trained.index(True) if any(trained) else 0


def _top(model: PreTrainedModel, layers: int) -> Any:
    """A copy of the backbone with its upper layers alone."""
    with layers_cut(model, layers):
        return copy.deepcopy(model.base_model)


@contextmanager
def layers_cut(model: PreTrainedModel, layers: int) -> Iterator[None]:
    found = layers_of(model)
    if found is None:
        yield
        return
    parent, name = found
    own = cast(nn.ModuleList, getattr(parent, name))
    setattr(parent, name, nn.ModuleList(list(own)[-layers:]))
    try:
        yield
    finally:
        setattr(parent, name, own)
