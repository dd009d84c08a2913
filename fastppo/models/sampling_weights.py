"""The weights that responses are sampled from, and whole weights to export.

At ZeRO stage 3 a forward pass fetches every layer from the other ranks. In sampling, which makes one for each token,
that would cost far more than the pass itself, and ranks that finish at different times would wait for each other for
ever. So the weights are gathered beforehand into a second module that DeepSpeed knows nothing of.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastppo.distributed import World, gathered
from fastppo.models.roles import Policy

BUCKET = 2**28  # bytes of weights that are gathered at a time, on top of the copy


class SamplingWeights:
    """The actor whole on every rank. Below stage 3 that is the actor's own module, at stage 3 a copy of it.

    The copy's tensors stay the same ones, tied where the actor's are. They take no memory before `gather` is first
    called, and so none ever where the sampler has weights of its own and the actor is exported in another way.
    """

    def __init__(self, actor: Policy, stage: int):
        """actor: before DeepSpeed has it, so that the copy has none of its hooks."""
        self._actor, self._copy = actor, actor
        if stage == 3:
            empty = {id(p): _empty_like(p) for p in actor.parameters()}
            self._copy = copy.deepcopy(actor, empty).eval()

    def gather(self) -> Policy:
        """The policy with the actor's present weights. At stage 3 all ranks call it, and the copy stays as it is until
        it is called again or leaves the GPU."""
        if self._copy is not self._actor:
            with torch.no_grad():
                _fill(self._copy, self._actor)
        return self._copy

    def states(self) -> list[Tensor]:
        """What can leave the GPU when no one samples; it need not be kept."""
        return [] if self._copy is self._actor else list(self._copy.parameters())


@torch.no_grad()
def whole_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The model's state, whole; at ZeRO stage 3 on rank 0 alone, in the host's memory. All ranks call it.

    One weight at a time is gathered, so that a model that fits no GPU can be exported.
    """
    state: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}  # by parameter, as tied ones have several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not hasattr(tensor, "ds_id"):  # it is no part of a whole
            state[name] = tensor.detach()
            continue
        with gathered([tensor]):
            if world.rank == 0:
                if id(tensor) not in whole:
                    whole[id(tensor)] = tensor.detach().to("cpu", copy=True)
                state[name] = whole[id(tensor)]
    return state


def _empty_like(parameter: nn.Parameter) -> nn.Parameter:
    """Of the same shape, on a storage without memory."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # of the whole, if it is split among the ranks already
    empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    empty.untyped_storage().resize_(0)
    return nn.Parameter(empty, requires_grad=False)


def _fill(policy: Policy, source: Policy) -> None:
    """Copy every weight, a bucket at a time: the peak is the copy and one bucket, or one weight that is larger."""
    bucket: list[tuple[nn.Parameter, nn.Parameter]] = []
    size = 0
    for pair in zip(policy.parameters(), source.parameters(), strict=True):
        if not pair[0].untyped_storage().nbytes():  # the first time
            pair[0].untyped_storage().resize_(pair[0].nbytes)
        if bucket and size + pair[0].nbytes > BUCKET:
            _copy(bucket)
            bucket, size = [], 0
        bucket.append(pair)
        size += pair[0].nbytes
    _copy(bucket)


def _copy(bucket: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    with gathered(source for _, source in bucket):
        for copied, source in bucket:
            copied.copy_(source)
