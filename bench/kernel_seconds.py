"""The time of kernels on an H100, from their bytes and products: a dispatch mode for models on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastppo.ops import chunked_head


class Gpu(NamedTuple):
    """An H100 SXM. Shares are of the peak, as measured for the kernels over the vocabulary and their products."""

    bandwidth: float = 3.35e12  # bytes a second
    bandwidth_share: float = 0.88
    peak: float = 989e12  # of bf16 products
    peak_share: float = 0.73
    attention_share: float = 0.45  # of the peak, of attention forward and backward
    launch: float = 6e-6  # seconds of the host for a kernel; it launches while the GPU computes
    gap: float = 1.5e-6  # seconds between a kernel and the next one
    gap_in_graph: float = 1e-6  # in a CUDA graph, where the host launches nothing
    host: float = 55e9  # bytes a second between GPU and host, pinned
    link: float = 450e9  # bytes a second to other GPUs


# What is read or written of the first argument, an (M, V) matrix, and how often.
PASSES_OVER_LOGITS = {"policy_loss_in_chunk": 3, "vocabulary_forward": 1, "vocabulary_backward": 2, "sample_tokens": 1}
# These read of their first argument only what they return.
GATHERS = ("embedding", "index", "index_select", "gather")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")


class Kernels(TorchDispatchMode):
    """Adds up the time of the kernels that run within it. `length`: tokens of a sequence, which attention needs."""

    def __init__(self, gpu: Gpu, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu, self.length = gpu, length
        self.counts: Counter[str] = Counter()
        self.seconds = self.roofline = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "fastppo" and name in HEADS:  # their own kernels and products
            with self:
                return HEADS[name](*args, **kwargs)
        out = function(*args, **kwargs)
        if self._launches(function, args, kwargs, out):
            self._add(function, name, args, kwargs, out)
        return out

    def _launches(self, function: Any, args: Any, kwargs: Any, out: Any) -> bool:
        given = {x.untyped_storage()._cdata for x in tensors_of((args, kwargs))}
        new = [x for x in tensors_of(out) if x.untyped_storage()._cdata not in given]
        if function.overloadpacket.__name__ in ALLOCATIONS:
            return False
        changed = tensors_of(args) if function._schema.is_mutable else new
        return any(x.numel() for x in changed)

    def _add(self, function: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        gpu, tensors = self.gpu, tensors_of((args, kwargs, out))
        moved = bytes_of(tensors)
        if function._schema.is_mutable:
            moved += bytes_of(tensors_of(args)[:1])
        products, share = 0.0, gpu.peak_share
        if name in PASSES_OVER_LOGITS:
            moved = PASSES_OVER_LOGITS[name] * bytes_of(tensors_of(args)[:1])
        elif name in GATHERS:
            moved = 2 * bytes_of(tensors_of(out))
        elif name == "attend_cached":  # each row attends to a half of the positions that it will have, and the prompt
            query, key = args[0], args[1]
            moved = bytes_of([query, key]) * 2 + 2 * self.length * bytes_of([key])
        elif "varlen_attn" in name:
            query = next(x for x in tensors_of(args) if x.dim() == 3)
            products = 2 * self.length * query.numel() * (2.5 if "backward" in name else 1)  # causal: half of 4 N L d
            share = gpu.attention_share
        elif function.overloadpacket in flop_registry:
            products = flop_registry[function.overloadpacket](*tensors_of(args), out_val=out)
        seconds = max(moved / (gpu.bandwidth * gpu.bandwidth_share), products / (gpu.peak * share))
        self.counts[function.overloadpacket._qualified_op_name] += 1
        self.seconds += seconds
        if products or name in PASSES_OVER_LOGITS or name == "attend_cached":
            self.roofline += seconds


HEADS: dict[str, Callable[..., Any]] = {function.__name__: function for function in chunked_head.OPS}


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def bytes_of(tensors: list[Tensor]) -> int:
    """Of tensors, each once, and of one that is expanded what it is a view of."""
    found = {(x.untyped_storage()._cdata, x.storage_offset(), x.numel()): x for x in tensors}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in found.values())
