"""Registration of the ops of a layer with torch.library: their fake kernels, and the Triton kernels for CUDA.

`fastppo._C` (csrc/) registers schemas and CPU kernels; each op's module gives its fake kernel and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fastppo.ops.layers.glu import fake_glu, fake_glu_backward
from fastppo.ops.layers.rms_norm import fake_rms_norm, fake_rms_norm_backward
from fastppo.ops.layers.rotary import fake_rotary


class LayerOp(NamedTuple):
    """An op with a kernel for each device."""

    module: str  # in kernels/layers/, with the Triton launcher, a function of the op's name
    fake: Callable[..., Any]  # shapes and dtypes without data


OPS = {
    "rms_norm": LayerOp("rms_norm", fake_rms_norm),
    "rms_norm_backward": LayerOp("rms_norm", fake_rms_norm_backward),
    "swiglu": LayerOp("glu", fake_glu),
    "geglu": LayerOp("glu", fake_glu),
    "glu_backward": LayerOp("glu", fake_glu_backward),
    "rotary": LayerOp("rotary", fake_rotary),
}

_library = torch.library.Library("fastppo", "FRAGMENT")


def launcher(op: str) -> Any:
    """The Triton launcher of an op. Triton is imported at the first use on CUDA."""
    return getattr(import_module(f"fastppo.kernels.layers.{OPS[op].module}"), op)


for _name, _op in OPS.items():
    torch.library.register_fake(f"fastppo::{_name}", _op.fake, lib=_library)
    _library.impl(_name, lambda *args, _name=_name: launcher(_name)(*args), "CUDA")
