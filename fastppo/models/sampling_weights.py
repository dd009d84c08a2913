"""Whole weights of a model: the policy that responses are sampled from, and the state to export.

At ZeRO stage 3 a forward pass gathers every layer from the other ranks. Sampling makes one forward pass for each token:
the gathers would cost far more than the passes, and ranks that finish at different times would block each other. So
the weights are gathered once a batch into a second module that DeepSpeed does not manage.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastppo.distributed import Residency, World, gathered
from fastppo.models.roles import Policy

BUCKET = 2**28  # bytes of weights that are gathered at a time, beside the copy


class SamplingWeights:
    """The actor with whole weights on every rank. Below ZeRO stage 3 it is the module of the actor itself.

    The copy is made once and its tensors are reused; they are tied where those of the actor are. They take no memory
    before the first `gather`, and so none at all if the rollout engine has weights of its own.
    """

    def __init__(self, actor: Policy, stage: int):
        """actor: not yet passed to DeepSpeed, so that the copy has none of DeepSpeed's hooks."""
        self._actor, self._copy = actor, actor
        self.has_memory = stage < 3  # whether `gather` takes none that was not taken before
        if stage == 3:
            empty = {id(p): _empty_like(p) for p in actor.parameters()}
            self._copy = copy.deepcopy(actor, empty).eval()

    def gather(self) -> Policy:
        """The policy with the current weights. At ZeRO stage 3 all ranks call it; the copy keeps these weights until
        the next call, or until it is moved out of the GPU."""
        if self._copy is not self._actor:
            with torch.no_grad():
                _copy_weights(self._actor, self._copy)
        self.has_memory = True
        return self._copy

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


def _empty_like(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same whole shape, on a storage without memory."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # the whole shape, also of a partitioned parameter
    empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    empty.untyped_storage().resize_(0)
    return nn.Parameter(empty, requires_grad=False)


def _copy_weights(source: Policy, target: Policy) -> None:
    """Copy every weight, a bucket at a time: peak memory is the copy and one bucket, or one weight that is larger."""
    bucket: list[tuple[nn.Parameter, nn.Parameter]] = []  # (source, target)
    size = 0
    for source_weight, target_weight in zip(source.parameters(), target.parameters(), strict=True):
        if not target_weight.untyped_storage().nbytes():  # the first time
            target_weight.untyped_storage().resize_(target_weight.nbytes)
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
