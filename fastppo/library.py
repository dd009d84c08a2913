"""What torch.library is told of each op beyond its kernels: fake kernels, gradients, and the Triton kernels for CUDA.

Schemas and CPU kernels are `fastppo._C`'s (csrc/), the chunked heads `fastppo.linear`'s. An op's arguments are taken as
checked by `fastppo.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import fastppo._C  # registers torch.ops.fastppo.*
from fastppo import linear

# Ops with a Triton kernel, each in the file of its name in kernels/.
TRITON = (
    "vocabulary_forward",
    "vocabulary_backward",
    "policy_loss_in_chunk",
    "policy_loss",
    "sum_tokens",
    "value_loss",
    "sample_tokens",
)

# GAE's CUDA kernels are linked where torch is a CUDA build and nvcc was found.
GAE_DEVICES = ("cpu", "meta", "cuda") if fastppo._C.built()["cuda_archs"] else ("cpu", "meta")

# Rows of vocabulary_forward's stats, as far as they have gradients, in the order of vocabulary_backward's upstream.
LOGPROBS, ENTROPY, LSE, KL = 0, 1, 2, 6


def launcher(op: str) -> Any:
    """The Triton launcher of an op. Triton is imported when CUDA first needs it."""
    return getattr(import_module(f"fastppo.kernels.{op}"), op)


for _op in TRITON:
    torch.library.impl(f"fastppo::{_op}", "CUDA")(lambda *args, _op=_op: launcher(_op)(*args))


# Fake kernels: shapes and dtypes without data


@torch.library.register_fake("fastppo::vocabulary_forward")
def _(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, ref_logits: Tensor | None) -> Tensor:
    rows = linear.STATS if ref_logits is None else linear.STATS_WITH_REFERENCE
    return logits.new_empty(rows, len(logits), dtype=torch.float32)


@torch.library.register_fake("fastppo::vocabulary_backward")
def _(*arguments: Any) -> None: ...


@torch.library.register_fake("fastppo::policy_loss_in_chunk")
def _(*arguments: Any) -> None: ...


@torch.library.register_fake("fastppo::accumulate")
def _(*arguments: Any) -> None: ...


@torch.library.register_fake("fastppo::policy_loss")
def _(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_totals(logprobs), logprobs.new_empty(len(logprobs), dtype=torch.float32)


@torch.library.register_fake("fastppo::sum_tokens")
def _(token_stats: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _totals(token_stats)


@torch.library.register_fake("fastppo::value_loss")
def _(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, _ = _totals(values)
    return loss, loss.new_empty(7), loss.new_empty(len(values))


@torch.library.register_fake("fastppo::sample_tokens")
def _(logits: Tensor, stream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stream), stream.new_empty(len(stream), dtype=torch.float32)


@torch.library.register_fake("fastppo::gae")
def _(rewards: Tensor, *arguments: Any) -> Tensor:
    return rewards.new_empty(2, len(rewards), dtype=torch.float32)


@torch.library.register_fake("fastppo::attend_cached")
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


@linear.linear_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *reference: Any) -> Tensor:
    rows = linear.STATS if reference[0] is None else linear.STATS_WITH_REFERENCE
    return hidden.new_empty(rows, len(hidden), dtype=torch.float32)


@linear.linear_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(hidden, weight, bias, rest[-1])


@linear.linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    made = _gradients_like(hidden, weight, bias, rest[-1])
    if linear.whole_gradients(hidden.dtype):
        made = (made[0], made[1].float(), made[2].float())
    return *_totals(hidden), *made


def _totals(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums and largest ratio of a policy loss."""
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in ((), (8,), ()))  # type: ignore[return-value]


def _gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    made = [hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


# Gradients


def _save_vocabulary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, ctx.temperature, ctx.softcap, ref_logits = inputs
    ctx.save_for_backward(logits, targets, ref_logits, output)


def _vocabulary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, ref_logits, stats = ctx.saved_tensors
    out = torch.empty_like(logits)
    torch.ops.fastppo.vocabulary_backward(
        logits, targets, stats, _upstream(grad), ctx.temperature, ctx.softcap, ref_logits, out
    )
    return out, None, None, None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature, ctx.softcap, ctx.workspace = inputs
    ctx.save_for_backward(*tensors, output)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    made = linear.linear_logprobs_backward(
        *ctx.saved_tensors, _upstream(grad), ctx.temperature, ctx.softcap, ctx.workspace, wanted
    )
    return *(g if want else None for g, want in zip(made, wanted, strict=True)), *(None,) * 7


def _upstream(grad: Tensor) -> Tensor:
    """Of stats' gradient the rows that reach the logits, (4, M)."""
    kl = grad[KL] if len(grad) > linear.STATS else torch.zeros_like(grad[LSE])
    return torch.stack((grad[LOGPROBS], grad[ENTROPY], grad[LSE], kl))


def _save_linear_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.dtype, normalizer = inputs[-1], inputs[0].dtype, inputs[6]
    ctx.save_for_backward(*output[3:], normalizer)


def _linear_policy_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *found, normalizer = ctx.saved_tensors
    made = list(zip(found, ctx.wanted, strict=True))
    if linear.whole_gradients(ctx.dtype):
        upstream = upstream / normalizer
        return *((g.float() * upstream).to(ctx.dtype) if want else None for g, want in made), *(None,) * 19
    # On the CPU a look at a number costs less than a pass over the weight's gradient. A compiler's tensors have none.
    once = type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1.0
    return *((g if once else (g * upstream).to(g.dtype)) if want else None for g, want in made), *(None,) * 19


def _save_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, _, _, entropy, kl, mask, normalizer, *_, ctx.entropy_coef, ctx.kl_coef = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, kl)]
    ctx.save_for_backward(output[3], mask, normalizer)


def _policy_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    d_logprobs, mask, normalizer = ctx.saved_tensors
    each = (upstream / normalizer).expand(len(d_logprobs))
    each = each if mask is None else each * mask
    made = (d_logprobs * upstream, -ctx.entropy_coef * each, ctx.kl_coef * each)
    logprobs, entropy, kl = (
        g.to(dtype) if dtype is not None and needed else None
        for g, dtype, needed in zip(made, ctx.dtypes, (ctx.needs_input_grad[i] for i in (0, 3, 4)), strict=True)
    )
    return logprobs, None, None, entropy, kl, *(None,) * 7


def _save_value_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])


def _value_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (d_values,) = ctx.saved_tensors
    return (d_values * upstream).to(ctx.dtype), *(None,) * 5


for _name, _backward, _save in (
    ("vocabulary_forward", _vocabulary_backward, _save_vocabulary),
    ("linear_logprobs", _linear_backward, _save_linear),
    ("linear_policy_loss", _linear_policy_loss_backward, _save_linear_policy_loss),
    ("policy_loss", _policy_loss_backward, _save_policy_loss),
    ("value_loss", _value_loss_backward, _save_value_loss),
):
    torch.library.register_autograd(f"fastppo::{_name}", _backward, setup_context=_save)


def backend(device: torch.device) -> str:
    """What runs the ops on a device, as the log says it."""
    if device.type == "cpu":
        return f"C++ ({fastppo._C.built()['simd_used']})"
    return "Triton" if device.type == "cuda" else device.type
