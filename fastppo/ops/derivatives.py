"""First-order gradients of the ops in reverse mode. Any other derivative raises an error: it would otherwise be zero.

The formulas use tensors that the kernels saved, which autograd cannot differentiate. So second derivatives, forward
mode and torch.func's transforms raise an error that names the alternative: fp64 inputs run `fastppo.ops.eager`, which
consists of operations of PyTorch and has all derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl  # what torch.library.register_autograd registers
from torch.autograd import forward_ad

from fastppo.ops import chunked_head, registration
from fastppo.ops.coefficients import overload

# The rows of vocabulary_forward's statistics that have gradients, in the order of vocabulary_backward's upstream.
LOGPROBS, ENTROPY, LSE, KL = 0, 1, 2, 6

INSTEAD = "; give fp64 inputs, for which PyTorch's own operations run, or use torch.autograd's reverse mode once"


# Formulas


def _save(ctx: Any, tensors: Iterable[Tensor | None], *coefficients: float | Tensor | None) -> None:
    """Save tensors, and coefficients that are numbers or tensors, for `_saved`."""
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in coefficients]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in coefficients), *tensors)


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """The coefficients and the tensors that `_save` saved."""
    saved, count = ctx.saved_tensors, len(ctx.numbers)
    return [n if x is None else x for n, x in zip(ctx.numbers, saved[:count], strict=True)], list(saved[count:])


def _save_vocabulary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, temperature, ctx.softcap, ref_logits = inputs
    _save(ctx, (logits, targets, ref_logits, output), temperature)


def _vocabulary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (temperature,), (logits, targets, ref_logits, stats) = _saved(ctx)
    out = logits.new_empty(logits.shape)  # dense, for any strides of the logits
    overload("vocabulary_backward", temperature)(
        logits, targets, stats, _upstream(grad), temperature, ctx.softcap, ref_logits, out
    )
    return out, None, None, None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, temperature, ctx.softcap, ctx.workspace = inputs
    _save(ctx, (*tensors, output), temperature)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    (temperature,), tensors = _saved(ctx)
    gradients = overload("linear_logprobs_backward", temperature)(
        *tensors, _upstream(grad), temperature, ctx.softcap, ctx.workspace, wanted
    )
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 7


def _upstream(grad: Tensor) -> Tensor:
    """The rows of the statistics' gradient that contribute to the gradient of the logits, (4, M)."""
    kl = grad[KL] if grad.shape[0] > chunked_head.STATS else torch.zeros_like(grad[LSE])
    return torch.stack((grad[LOGPROBS], grad[ENTROPY], grad[LSE], kl))


def _save_linear_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.dtype, normalizer = inputs[-1], inputs[0].dtype, inputs[6]
    ctx.save_for_backward(*output[3:], normalizer)


def _linear_policy_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *gradients, normalizer = ctx.saved_tensors
    if chunked_head.gradients_of_sum(ctx.dtype):
        upstream = upstream / normalizer
    scaled = _scaled if type(upstream) is Tensor else _scaled_while_tracing
    return *(
        scaled(g, upstream, ctx.dtype) if want else None for g, want in zip(gradients, ctx.wanted, strict=True)
    ), *(None,) * 19


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in the memory of the gradient unless a later backward pass needs it again."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.fastppo.scale_gradient(gradient, factor)
    return gradient.to(dtype)


def _scaled_while_tracing(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a compiler, which fuses it and may not write to what was saved."""
    return (gradient.float() * factor).to(dtype)


def _save_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, _, _, entropy, kl, mask, normalizer, *_, entropy_coef, kl_coef = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, kl)]
    _save(ctx, (output[3], mask, normalizer), entropy_coef, kl_coef)


def _policy_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (entropy_coef, kl_coef), (d_logprobs, mask, normalizer) = _saved(ctx)
    token_share = (upstream / normalizer).expand(d_logprobs.shape[0])
    token_share = token_share if mask is None else token_share * mask
    gradients = (d_logprobs * upstream, -entropy_coef * token_share, kl_coef * token_share)
    logprobs, entropy, kl = (
        g.to(dtype) if dtype is not None and needed else None
        for g, dtype, needed in zip(gradients, ctx.dtypes, (ctx.needs_input_grad[i] for i in (0, 3, 4)), strict=True)
    )
    return logprobs, None, None, entropy, kl, *(None,) * 7


def _save_value_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])


def _value_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (d_values,) = ctx.saved_tensors
    return (d_values * upstream).to(ctx.dtype), *(None,) * 5


# Errors for all other derivatives


class _NotDifferentiable(torch.autograd.Function):
    """Returns gradients unchanged; their derivative by any tensor that they depend on raises an error."""

    @staticmethod
    def forward(ctx: Any, name: str, gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:gradients])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"the gradient of ops.{ctx.name} has no derivative of its own{INSTEAD}")


def once_only(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose result raises an error if it is differentiated again (create_graph)."""

    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_tangents(name, upstream)
        if not torch.is_grad_enabled():
            gradients: tuple[Tensor | None, ...] = formula(ctx, *upstream)
            return gradients
        with torch.no_grad():
            gradients = formula(ctx, *upstream)
        tensors = [g for g in gradients if g is not None]
        outputs = iter(_NotDifferentiable.apply(name, len(tensors), *tensors, *upstream, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        return tuple(None if g is None else next(outputs) for g in gradients)

    return backward


def refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Raise NotImplementedError in forward mode, where the tangents of an op without a rule would be zero."""
    if not _in_forward_mode():  # unpack_dual takes 4 us a tensor
        return
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=0).tangent is not None:
            raise NotImplementedError(f"ops.{name} has no derivative of forward mode{INSTEAD}")


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def register(op: str, name: str, formula: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register the gradients of an op and its overload with torch.library; name: of the function in `fastppo.ops`."""
    rules = SimpleNamespace(_backward_fn=once_only(name, formula), _setup_context_fn=save)
    for qualified in registration.overloads(op):
        target = getattr(getattr(torch.ops.fastppo, op), qualified.partition(".")[2] or "default")
        differentiate = make_autograd_impl(target, rules)

        def run(keys: Any, *arguments: Any, differentiate: Any = differentiate) -> Any:
            refuse_tangents(name, arguments)
            if torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*arguments):
                raise NotImplementedError(f"ops.{name} cannot be differentiated by torch.func{INSTEAD}")
            return differentiate(keys, *arguments)

        _library.impl(qualified, run, "Autograd", with_keyset=True)


def register_direct(op: str, name: str, formula: Callable[..., Any], save: Callable[..., None]) -> Callable[..., Any]:
    """Register the gradients of an op as `register` does, and return a function that calls it with less overhead.

    A call through the registered rule spends some 40 us in Python, which an op that runs in each layer cannot afford.
    In eager mode the function returned uses an autograd function, or nothing if no gradient is needed. While
    torch.compile traces, in forward mode and under torch.func it calls the registered op.
    """
    register(op, name, formula, save)
    kernel = getattr(torch.ops.fastppo, op).default
    below_autograd = torch._C._AutoDispatchBelowAutograd

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with below_autograd():
                output = kernel(*arguments)
            save(ctx, arguments, output)
            return output

        backward = staticmethod(once_only(name, formula))

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _in_forward_mode() or torch._C._are_functorch_transforms_active():
            return kernel(*arguments)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return Direct.apply(*arguments)  # type: ignore[no-untyped-call]
        with below_autograd():
            return kernel(*arguments)

    return call


_library = torch.library.Library("fastppo", "IMPL")
register("vocabulary_forward", "token_logprobs", _vocabulary_backward, _save_vocabulary)
register("linear_logprobs", "linear_logprobs", _linear_backward, _save_linear)
register("linear_policy_loss", "linear_policy_loss", _linear_policy_loss_backward, _save_linear_policy_loss)
register("policy_loss", "policy_loss", _policy_loss_backward, _save_policy_loss)
register("value_loss", "value_loss", _value_loss_backward, _save_value_loss)
