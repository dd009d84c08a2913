"""RMSNorm: modules that compute it, in the form of `ops.rms_norm`, with the residual added before it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.layers.classes import replace_functions, shell

ROWS = 16  # of the random input
# Of bf16 numbers that are not the module's own in the last bit: 1e-4 where sums round in another order, and a third
# where the quotient is rounded and should not be, or the reverse.
OTHERS = 0.02


@dataclass(frozen=True)
class NormForm:
    """Arguments of `ops.rms_norm` with which it computes what the module does."""

    eps: float
    offset: float
    round_first: bool


def fuse_norm(module: nn.Module) -> bool:
    """Let the module call the op if it is an RMSNorm; returns whether it is."""
    form = norm_form(module)
    if form is not None:
        cast(Any, module).rms_norm_form = form
        replace_functions(module, _functions)
    return form is not None


def is_fused(module: nn.Module) -> bool:
    """Whether the module takes a residual as its second argument, and then returns the sum, too."""
    return hasattr(module, "rms_norm_form")


def norm_form(module: nn.Module) -> NormForm | None:
    """The form in which the module's own forward pass is an RMSNorm over the last dimension; None if it is none."""
    parameters = dict(module.named_parameters(recurse=False))
    alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    if list(parameters) != ["weight"] or not alone or len(inspect.signature(module.forward).parameters) != 1:
        return None
    shape = tuple(getattr(parameters["weight"], "ds_shape", parameters["weight"].shape))
    epsilons = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(shape) != 1 or not epsilons:
        return None
    forms = [NormForm(epsilons[0], offset, first) for offset in (0.0, 1.0) for first in (True, False)]
    try:
        return next((form for form in forms if _computes(module, shape[0], form)), None)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):  # its own code, on an input it refuses
        return None


def _computes(module: nn.Module, width: int, form: NormForm) -> bool:
    """Whether the module's own output is that of the op, in fp32 and in bf16."""
    random = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(ROWS, width, generator=random), torch.randn(width, generator=random)
    rows[ROWS // 2 :] *= form.eps**0.5  # so small that eps matters
    for dtype in (torch.float32, torch.bfloat16):
        x, w = rows.to(dtype), weight.to(dtype)
        with torch.no_grad():
            own = shell(module, {}, [("weight", w.clone())]).forward(x)
            fused = cast(Tensor, ops.rms_norm(x, w, form.eps, offset=form.offset, round_first=form.round_first))
        if not isinstance(own, Tensor) or own.dtype != dtype or own.shape != x.shape:
            return False
        if dtype == torch.float32 and not torch.allclose(own, fused, rtol=1e-5, atol=1e-6):
            return False
        if dtype == torch.bfloat16 and float((own != fused).float().mean()) > OTHERS:
            return False
    return True


def _functions(own: Any) -> Mapping[str, Callable[..., Any]]:
    own_forward = own.forward

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x, or of x + residual and this sum; (..., H) each."""
        form = self.rms_norm_form
        if x.dtype != self.weight.dtype:  # a family that keeps its norms in fp32
            total = x if residual is None else x + residual
            y: Tensor = own_forward(self, total)
            return y if residual is None else (y, total)
        return ops.rms_norm(x, self.weight, form.eps, residual, form.offset, round_first=form.round_first)

    return {"forward": forward}
