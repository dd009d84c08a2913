"""Whole weights of a model: the policy that responses are sampled from, the same as a stream, and the state to export.

At ZeRO stage 3 a forward pass gathers every layer from the other ranks. Sampling makes one forward pass for each token:
the gathers would cost far more than the passes, and ranks that finish at different times would block each other. So
the weights are gathered once a batch into a second module that DeepSpeed does not manage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import accumulate, groupby, takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from fastppo.distributed import Residency, World, gathered
from fastppo.models.lora import adapter_weights, merged_weight
from fastppo.models.roles import Policy

BUCKET = 2**28  # bytes of weights that are gathered at a time, beside the copy


class SamplingWeights:
    """The actor with whole weights on every rank. Below ZeRO stage 3 it is the module of the actor itself.

    The copy is made once and its tensors are reused; they are tied where those of the actor are. They take no memory
    before the first `gather`, and so none at all if the rollout engine has weights of its own. The weights of a layer
    follow each other in one storage, so that projections of the same states can be one product (`joined`).
    """

    def __init__(self, actor: Policy, stage: int):
        """actor: not yet passed to DeepSpeed, so that the copy has none of DeepSpeed's hooks."""
        self._actor, self._copy = actor, actor
        self.has_memory = stage < 3  # whether `gather` takes none that was not taken before
        if stage == 3:
            empty, self._storages = _empty_layers(actor)
            self._copy = copy.deepcopy(actor, empty).eval()

    def gather(self) -> Policy:
        """The policy with the current weights. At ZeRO stage 3 all ranks call it; the copy keeps these weights until
        the next call, or until it is moved out of the GPU."""
        if self._copy is not self._actor:
            for storage, size in self._storages:
                if not storage.nbytes():  # the first time
                    storage.resize_(size)
            with torch.no_grad():
                _copy_weights(self._actor, self._copy)
        self.has_memory = True
        return self._copy

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights of the language model, whole, for an engine that has a module of its own.

        Names and shapes are those of a checkpoint that `save_pretrained` writes: LoRA adapters are merged, a tied
        weight comes once, a value head does not come. At ZeRO stage 3 all ranks iterate together, to the end. Whole
        layers are gathered, as many as a bucket holds, at least one: what a checkpoint names otherwise may be made of
        several weights of a layer. A tensor may be the actor's own, so it is copied and not written.
        """
        model = self._actor.model
        for bucket in _buckets(_layers(model)):
            with gathered(parameter for entry in bucket for parameter in entry.parameters):
                state = {entry.name: entry.whole(model) for entry in bucket}
                yield from revert_weight_conversion(model, state).items()
                del state  # before the next ones are gathered

    def states(self) -> list[Tensor]:
        """The tensors that sampling alone uses; their content need not be preserved outside of sampling."""
        return [] if self._copy is self._actor else list(self._copy.parameters())


class SampledModel(Protocol):
    """The model that responses are drawn from, as rollout engines see it. `Roles` is one: its actor."""

    @property
    def policy(self) -> Policy:
        """The module. At ZeRO stage 3 its weights are partitioned; `sampling_weights.gather()` has whole ones."""

    @property
    def sampling_weights(self) -> SamplingWeights: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def residency(self) -> Residency: ...

    @property
    def version(self) -> int:
        """A number that is another one after each change of the weights."""


@torch.no_grad()
def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The state of the model with whole weights; at ZeRO stage 3 on rank 0 only, in host memory. All ranks call it.

    One weight at a time is gathered, so that a model that does not fit on a GPU can be exported.
    """
    state: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}  # by id of the parameter, because tied parameters have several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not hasattr(tensor, "ds_id"):  # not partitioned
            state[name] = tensor.detach()
            continue
        with gathered([tensor]):
            if world.rank == 0:
                if id(tensor) not in whole:
                    whole[id(tensor)] = tensor.detach().to("cpu", copy=True)
                state[name] = whole[id(tensor)]
    return state


class _Entry(NamedTuple):
    """A weight, or a buffer that checkpoints have, and what is merged into it."""

    name: str  # without adapters
    tensor: Tensor
    adapter: tuple[nn.Parameter, nn.Parameter] | None  # A and B

    @property
    def parameters(self) -> list[Tensor]:
        return [x for x in (self.tensor, *(self.adapter or ())) if isinstance(x, nn.Parameter)]

    @property
    def nbytes(self) -> int:
        return int(getattr(self.tensor, "ds_numel", self.tensor.numel())) * self.tensor.element_size()

    def whole(self, model: PreTrainedModel) -> Tensor:
        """Its present value; the parameters are gathered."""
        return self.tensor.detach() if self.adapter is None else merged_weight(model, self.tensor, *self.adapter)


def _layers(model: PreTrainedModel) -> Iterator[list[_Entry]]:
    """What a checkpoint of the model has, in its order: the entries of each layer together, all others alone."""
    adapters, seen = adapter_weights(model), set(model._keys_to_ignore_on_save or ())
    entries: dict[int, _Entry] = {}  # by id of the tensor: a tied one has several names
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = key.replace(".base_layer.", ".") if adapters else key
        if name in seen or id(tensor) in entries or (adapters and ".lora_" in name):
            continue
        entries[id(tensor)] = _Entry(name, tensor, adapters.get(id(tensor)))

    for _, group in groupby(entries.values(), lambda entry: _layer(entry.name)):
        yield list(group)


def _layer(name: str) -> str:
    """The name of the layer that a weight is of: its own name up to the first number, or all of it."""
    parts = name.split(".")
    path = list(takewhile(lambda part: not part.isdigit(), parts))
    return ".".join(parts[: len(path) + 1])


def _buckets(layers: Iterator[list[_Entry]]) -> Iterator[list[_Entry]]:
    """As many layers at a time as `BUCKET` bytes hold, at least one."""
    bucket: list[_Entry] = []
    for entries in layers:
        if bucket and sum(entry.nbytes for entry in (*bucket, *entries)) > BUCKET:
            yield bucket
            bucket = []
        bucket = [*bucket, *entries]
    yield bucket


def _empty_layers(actor: nn.Module) -> tuple[dict[int, nn.Parameter], list[tuple[torch.UntypedStorage, int]]]:
    """For each parameter, by its id, one of the same whole shape; those of a layer share a storage, without memory.

    Also each storage with the bytes that it needs.
    """
    empty: dict[int, nn.Parameter] = {}
    storages = []
    for _, layer in groupby(actor.named_parameters(), lambda named: (_layer(named[0]), named[1].dtype)):
        weights = [parameter for _, parameter in layer]
        shapes = [getattr(p, "ds_shape", p.shape) for p in weights]  # whole, also of a partitioned parameter
        wide = 16 // weights[0].element_size()
        ends = list(accumulate(-(-shape.numel() // wide) * wide for shape in shapes))  # each at a multiple of 16 bytes
        flat = torch.empty(ends[-1], dtype=weights[0].dtype, device=weights[0].device)
        for parameter, shape, start in zip(weights, shapes, [0, *ends], strict=False):
            part = flat[start : start + shape.numel()].view(shape)
            empty[id(parameter)] = nn.Parameter(part, requires_grad=False)
        storages.append((flat.untyped_storage(), flat.nbytes))
        flat.untyped_storage().resize_(0)
    return empty, storages


def _copy_weights(source: Policy, target: Policy) -> None:
    """Copy every weight, a bucket at a time: peak memory is the copy and one bucket, or one weight that is larger."""
    bucket: list[tuple[nn.Parameter, nn.Parameter]] = []  # (source, target)
    size = 0
    for source_weight, target_weight in zip(source.parameters(), target.parameters(), strict=True):
        if bucket and size + target_weight.nbytes > BUCKET:
            _copy_bucket(bucket)
            bucket, size = [], 0
        bucket.append((source_weight, target_weight))
        size += target_weight.nbytes
    _copy_bucket(bucket)


def _copy_bucket(bucket: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    with gathered(source_weight for source_weight, _ in bucket):
        for source_weight, target_weight in bucket:
            target_weight.copy_(source_weight)
