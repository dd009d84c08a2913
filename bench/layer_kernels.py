"""Kernels of one decoder layer, forward and backward, with and without fused layers (`model.fused`).

    python bench/layer_kernels.py [--each]

Counted on the meta device, so on any machine: a layer of the shape of Llama-3.2-1B on a packed row of bf16 states, with
the attention of a GPU (`varlen_attn`). An op counts as one kernel, and one of fastppo as the kernels that it launches.
Views, allocations and empty tensors do not count. At most 16 kernels forward and 30 backward is the aim; the products
alone are 7 and 14, and attention 1 and 1.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo.models.attention import compute_with
from fastppo.models.backends.varlen import VarlenAttention
from fastppo.models.cache import SequenceLayout
from fastppo.models.layers.fuse import layers_as
from fastppo.models.roles import Policy

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 1,
    "vocab_size": 256,
}
SEQUENCES, LENGTH = 4, 256
META = torch.device("meta")


class Kernels(TorchDispatchMode):
    """Counts the kernels of the ops that run within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        allocates = function.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if any(x.numel() for x in new) and not allocates:
            self.counts[function.overloadpacket._qualified_op_name] += launches(function, args)
        return out

    @property
    def total(self) -> int:
        return self.counts.total()


def launches(function: Any, args: tuple[Any, ...]) -> int:
    """Kernels of one call. A second one adds up the gradient of a norm's weight, from sums of some rows each."""
    weight_trains = bool(args and args[-1] is True)
    return 2 if function.overloadpacket.__name__ == "rms_norm_backward" and weight_trains else 1


def kernels_of_a_layer(family: str = "llama", *, fused: bool, **settings: Any) -> tuple[Kernels, Kernels]:
    """Of a forward and of a backward pass; settings: others than those of `SHAPE`."""
    config = AutoConfig.for_model(family, **SHAPE | settings)
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        width = config.head_dim
        states = torch.empty(1, SEQUENCES * LENGTH, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
        cos, sin = torch.empty(2, 1, SEQUENCES * LENGTH, width, dtype=torch.bfloat16)
    with layers_as(fused=fused):
        Policy(model)
    given = {"attention_mask": None, "packed": SequenceLayout.of([LENGTH] * SEQUENCES, META)}
    layer, states = model.model.layers[0], states.view_as(states)
    compute_with(VarlenAttention(varlen_attn))
    try:
        with Kernels() as forward:
            out = layer(states, position_embeddings=(cos, sin), **given)
        upstream = torch.empty_like(out)
        with Kernels() as backward:
            out.backward(upstream)
    finally:
        compute_with(None)
    return forward, backward


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--each", action="store_true", help="print each op with its kernels")
    given = options.parse_args()
    for fused in (False, True):
        passes = dict(zip(("forward", "backward"), kernels_of_a_layer(fused=fused), strict=True))
        print(json.dumps({"fused": fused} | {name: counted.total for name, counted in passes.items()}))
        if given.each:
            for name, counted in passes.items():
                print(f"  {name}: " + ", ".join(f"{op} {count}" for op, count in counted.counts.most_common()))


if __name__ == "__main__":
    main()
