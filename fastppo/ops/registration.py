"""Registration of the ops with torch.library: fake kernels, the Triton kernels for CUDA, and overloads.

`fastppo._C` (csrc/) registers schemas and CPU kernels, `fastppo.ops.derivatives` gradients; the chunked heads are in
`fastppo.ops.chunked_head`. `fastppo.ops` has checked the arguments of an op.
Each op with coefficients is registered twice, with the same kernels: `fastppo::NAME` takes coefficients as numbers,
which a compiler would turn into constants, and `fastppo::NAME.tensors` as tensors without dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

import fastppo._C  # registers torch.ops.fastppo.*
from fastppo.ops import chunked_head
from fastppo.ops.coefficients import COEFFICIENTS

# Ops with a Triton kernel, each in the file of the same name in kernels/; the CPU's is in csrc/, in NAME.cpp, but that
# of scale_gradient, which is below.
TRITON = (
    "vocabulary_forward",
    "vocabulary_backward",
    "policy_loss_in_chunk",
    "policy_loss",
    "sum_tokens",
    "scale_gradient",
    "value_loss",
    "truncation",
    "sample_tokens",
    "attend_cached",
)

# The CUDA kernels of GAE are linked if torch is a CUDA build and nvcc was found.
GAE_DEVICES = ("cpu", "meta", "cuda") if fastppo._C.built()["cuda_archs"] else ("cpu", "meta")

_library = torch.library.Library("fastppo", "FRAGMENT")


_library.define("scale_gradient(Tensor(a!) gradient, Tensor factor) -> ()")


def scale_on_cpu(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, () fp32, whose value is read: on the CPU this costs less than a pass over the gradient."""
    if factor.item() != 1.0:
        gradient.mul_(factor)


_library.impl("scale_gradient", scale_on_cpu, "CPU")


def launcher(op: str) -> Any:
    """The Triton launcher of an op. Triton is imported at the first use on CUDA."""
    return getattr(import_module(f"fastppo.kernels.{op}"), op)


def kernel(op: str) -> Any:
    """The op that takes its coefficients as numbers."""
    return getattr(torch.ops.fastppo, op).default


def has_coefficients(op: str) -> bool:
    return any(argument.name in COEFFICIENTS for argument in kernel(op)._schema.arguments)


def overloads(op: str) -> tuple[str, ...]:
    """The names of an op for torch.library: with coefficients as numbers and, if it has any, as tensors."""
    return (op, f"{op}.tensors") if op in WITH_COEFFICIENTS else (op,)


def reading_coefficients(op: str) -> Callable[..., Any]:
    """The kernel of an op for coefficients in tensors on the CPU: it reads their values, without synchronisation."""
    run = kernel(op)
    indices = [i for i, argument in enumerate(run._schema.arguments) if argument.name in COEFFICIENTS]

    def read_and_run(*arguments: Any) -> Any:
        values = list(arguments)
        for i in indices:
            values[i] = None if values[i] is None else values[i].item()
        return run(*values)

    return read_and_run


for _op in chunked_head.OPS:
    _library.define(torch.library.infer_schema(_op, mutates_args=(), op_name=_op.__name__))

# Ops with a kernel for each device, and all ops, that have coefficients.
_WITH_KERNELS = tuple(op for op in (*TRITON, "gae") if has_coefficients(op))
WITH_COEFFICIENTS = (*_WITH_KERNELS, *(op.__name__ for op in chunked_head.OPS))

for _op_name in WITH_COEFFICIENTS:
    _schema = str(kernel(_op_name)._schema).removeprefix(f"fastppo::{_op_name}(")
    _schema = re.sub(rf"\b(?:float|int)(\??) ({'|'.join(COEFFICIENTS)})\b", r"Tensor\1 \2", _schema)
    _library.define(f"{_op_name}.tensors({_schema}")
for _op in chunked_head.OPS:  # written in torch: the same on all devices and for both kinds of coefficients
    for _name in overloads(_op.__name__):
        _library.impl(_name, _disable_dynamo(_op), "CompositeExplicitAutograd")
for _op_name in _WITH_KERNELS:
    _library.impl(f"{_op_name}.tensors", reading_coefficients(_op_name), "CompositeExplicitAutograd")
for _op_name in TRITON:
    for _name in overloads(_op_name):
        _library.impl(_name, lambda *args, _op=_op_name: launcher(_op)(*args), "CUDA")


# Fake kernels: shapes and dtypes without data


def fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Register the fake kernel of an op and of its overload."""

    def register(function: Callable[..., Any]) -> None:
        for name in overloads(op):
            torch.library.register_fake(f"fastppo::{name}", function, lib=_library)

    return register


@fake("vocabulary_forward")
def _(logits: Tensor, *arguments: Any) -> Tensor:
    rows = chunked_head.STATS if arguments[-1] is None else chunked_head.STATS_WITH_REFERENCE
    return logits.new_empty(rows, logits.shape[0], dtype=torch.float32)


@fake("vocabulary_backward")
def _(*arguments: Any) -> None: ...


@fake("policy_loss_in_chunk")
def _(*arguments: Any) -> None: ...


@fake("accumulate")
def _(*arguments: Any) -> None: ...


@fake("scale_gradient")
def _(*arguments: Any) -> None: ...


@fake("policy_loss")
def _(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_totals(logprobs), logprobs.new_empty(logprobs.shape[0], dtype=torch.float32)


@fake("sum_tokens")
def _(token_stats: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _totals(token_stats)


@fake("value_loss")
def _(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, _ = _totals(values)
    return loss, loss.new_empty(7), loss.new_empty(values.shape[0])


@fake("sample_tokens")
def _(logits: Tensor, stream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stream), stream.new_empty(stream.shape[0], dtype=torch.float32)


@fake("truncation")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)


@fake("gae")
def _(rewards: Tensor, *arguments: Any) -> Tensor:
    return rewards.new_empty(2, rewards.shape[0], dtype=torch.float32)


@fake("attend_cached")
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


@fake("linear_logprobs")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *reference: Any) -> Tensor:
    rows = chunked_head.STATS if reference[0] is None else chunked_head.STATS_WITH_REFERENCE
    return hidden.new_empty(rows, hidden.shape[0], dtype=torch.float32)


@fake("linear_logprobs_backward")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(hidden, weight, bias, rest[-1])


@fake("linear_policy_loss")
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    gradients = _gradients_like(hidden, weight, bias, rest[-1])
    if chunked_head.gradients_of_sum(hidden.dtype):
        gradients = (gradients[0], gradients[1].float(), gradients[2].float())
    return *_totals(hidden), *gradients


def _totals(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums and largest ratio of a policy loss."""
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in ((), (8,), ()))  # type: ignore[return-value]


def _gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = [hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]
    return gradients[0], gradients[1], gradients[2]


def backend(device: torch.device) -> str:
    """The implementation of the ops on a device, for the log."""
    if device.type == "cpu":
        return f"C++ ({fastppo._C.built()['simd_used']})"
    return "Triton" if device.type == "cuda" else device.type
