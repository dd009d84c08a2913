"""The checks of arguments that `fastppo.ops` makes before a kernel runs.

Each raises a TypeError for a wrong dtype and a ValueError for a wrong shape, device or value; the message has the
argument, its value and the allowed values. Values of tensors are checked on the CPU only, where this needs no
synchronisation, and not while torch.compile traces, when tensors have no values. Sizes are read from shapes, because
`len` would make a compiled graph valid for one size only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Coefficient = float | Tensor  # a number, or a floating tensor without dimensions
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The bounds below are literals: torch.compile treats a float in a module or a default as a number that may change, and
# compiles twice. Kernels compute in fp32, in which numbers between 1e-36 and 1e36, their inverses and a hundred times
# either are normal. With temperatures and softcaps between 1e-20 and 1e20 the quotient of a logit, or of the kernels'
# substitute for -inf, and one of them neither overflows nor underflows.


def check_kl_kind(kl_kind: str, kl_coef: Coefficient, has_head: bool, has_logprobs: bool) -> None:
    if kl_kind == "k1":
        raise ValueError(
            "kl_kind is 'k1', whose expected gradient is zero; use 'exact', 'k2' or 'k3', or k1 in the reward"
        )
    if kl_kind not in ("exact", "k2", "k3"):
        raise ValueError(f"kl_kind is {kl_kind!r}; it must be 'exact', 'k2' or 'k3'")
    needs, has = ("ref_hidden and ref_weight", has_head) if kl_kind == "exact" else ("ref_logprobs", has_logprobs)
    if not is_off(kl_coef) and not has:
        raise ValueError(f"kl_coef is {kl_coef} and kl_kind {kl_kind!r}, which needs {needs}")


def check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    """Check the head of a reference: all its tensors or none."""
    if ref_hidden is None and ref_weight is None and ref_bias is None:
        return
    if ref_hidden is None or ref_weight is None:
        missing = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(f"{missing} is None; a reference needs both ref_hidden and ref_weight")
    check_head(ref_hidden, ref_weight, ref_bias, "ref_")
    check_precision("ref_hidden", ref_hidden, hidden, "hidden")
    check_shape("ref_hidden", ref_hidden, (hidden.shape[0], ref_weight.shape[1]), "a row for each row of hidden")
    check_shape("ref_weight", ref_weight, (weight.shape[0], ref_weight.shape[1]), "a row for each row of weight")
    check_device("ref_hidden", ref_hidden, hidden, "hidden")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str) -> None:
    """Check a vocabulary projection, hidden (M, H), weight (V, H), bias (V,); prefix: of the names of the arguments."""
    like = f"{prefix}hidden"
    for name, tensor, letter, least in ((like, hidden, "M", 0), (f"{prefix}weight", weight, "V", 1)):
        check_floating(name, tensor)
        if tensor.ndim != 2 or tensor.shape[0] < least:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected two dimensions, ({letter}, H)")
    check_shape(f"{prefix}weight", weight, (weight.shape[0], hidden.shape[1]), f"(V, H) with the H of {like}")
    if bias is not None:
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), f"one number for each row of {prefix}weight")
    for name, part in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if part is None:
            continue
        if part.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {part.dtype} and {like} {hidden.dtype}; they must be the same")
        check_device(name, part, hidden, like)


def check_logits(name: str, logits: Tensor) -> None:
    """(rows, V)"""
    check_floating(name, logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; expected two dimensions, (rows, V) with V >= 1")


def check_targets(targets: Tensor, rows: int, vocabulary: int, like: Tensor, like_name: str) -> None:
    check_int64("targets", targets)
    check_shape("targets", targets, (rows,), f"one token for each row of {like_name}")
    check_device("targets", targets, like, like_name)
    if rows and _may_be_read(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocabulary:
            allowed = f"a vocabulary of {vocabulary} allows [0, {vocabulary - 1}]"
            raise ValueError(f"targets, shape ({rows},), are in [{low}, {high}]; {allowed}")


def check_tokens(name: str, tensor: Tensor, like: Tensor, like_name: str = "") -> None:
    check_floating(name, tensor)
    if tensor.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension, (M,)")
    if tensor is like:
        return
    check_precision(name, tensor, like, like_name)
    check_shape(name, tensor, (like.shape[0],), f"one number for each row of {like_name}")
    check_device(name, tensor, like, like_name)


def check_mask(mask: Tensor | None, like: Tensor, like_name: str) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, True where a token counts")
    check_shape("mask", mask, (like.shape[0],), f"one entry for each row of {like_name}")
    check_device("mask", mask, like, like_name)


def check_cu_seqlens(cu_seqlens: Tensor, rewards: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected torch.int32 or torch.int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (B+1,)")
    check_device("cu_seqlens", cu_seqlens, rewards, "rewards")


def check_starts(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the values of `cu_seqlens` where no kernel does."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(
            f"cu_seqlens runs from {starts[0]} to {starts[-1]}; expected 0 to {tokens}, the length of rewards"
        )
    decrease = next((i for i in range(1, len(starts)) if starts[i] < starts[i - 1]), None)
    if decrease is not None:
        raise ValueError(
            f"cu_seqlens falls from {starts[decrease - 1]} to {starts[decrease]} at index {decrease}; it must never"
            " fall"
        )


def check_policy_options(
    clip_low: Coefficient,
    clip_high: Coefficient,
    dual_clip: Coefficient | None,
    entropy_coef: Coefficient,
    kl_coef: Coefficient,
) -> None:
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, 1e36)
    if dual_clip is not None:
        value = value_of("dual_clip", dual_clip)
        if value is not None and not 1.0 < value <= 1e36:
            raise ValueError(f"dual_clip is {value}; it must be above 1 and at most 1e36, or None")
    for name, coef in (("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        check_range(name, coef, -1e36, 1e36)


def checked_normalizer(normalizer: Tensor | float, like: Tensor, like_name: str) -> Tensor:
    """The token count that a loss is divided by, as () in the dtype of statistics on the device of `like`.

    normalizer: a number, or (), fp32 or fp64.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(normalizer, int | float) and not isinstance(normalizer, bool):
        check_positive("normalizer", normalizer)
        if torch.compiler.is_compiling():  # only with a sum the number does not become a constant of the graph
            return torch.zeros((), dtype=dtype, device=like.device) + normalizer
        return torch.full((), normalizer, dtype=dtype, device=like.device)
    if not isinstance(normalizer, Tensor) or normalizer.dtype not in (torch.float32, torch.float64):
        kind = normalizer.dtype if isinstance(normalizer, Tensor) else type(normalizer).__name__
        raise TypeError(f"normalizer is {kind}; expected a number, or a tensor of torch.float32 without dimensions")
    check_shape("normalizer", normalizer, (), "the token count that the loss is divided by")
    check_device("normalizer", normalizer, like, like_name)
    check_positive("normalizer", normalizer)
    check_constant("normalizer", normalizer)
    return normalizer.to(dtype)


def check_attention(scale: float, window: int, softcap: float, *, query: Tensor, **others: Tensor) -> None:
    """Check dtypes and numbers of `attend_cached`; its kernels check the shapes."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"query has dtype {query.dtype}; expected torch.float32, torch.bfloat16 or torch.float16")
    for name, tensor in others.items():
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} and query {query.dtype}; they must be the same")
    for name, value in (("scale", scale), ("softcap", softcap)):
        check_number(name, value, "a constant of the model")
    check_range("scale", scale, -1e36, 1e36)
    if softcap != 0.0:
        check_divisor("softcap", softcap)
    if window < 0:
        raise ValueError(f"window is {window}; it must be a number of positions, or 0 for all")


def check_truncation(top_k: int, top_p: float) -> None:
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        check_number(name, value, "a setting")
    if not isinstance(top_k, int):
        raise TypeError(f"top_k is {top_k}; it must be a whole number of tokens, or 0 for all")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be a number of tokens, or 0 for all")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it must be above 0, and at most 1, which keeps all tokens")


def check_scale(temperature: Coefficient, softcap: float | None, logit_scale: float | None = None) -> None:
    check_divisor("temperature", temperature)
    if softcap is not None:
        check_number("softcap", softcap, "a constant of the model")
        check_divisor("softcap", softcap)
    if logit_scale is None:
        return
    check_number("logit_scale", logit_scale, "a constant of the model")
    check_divisor("logit_scale", logit_scale)
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        number = None if value is None else value_of(name, value)
        if number is not None:
            check_divisor(f"{name} / logit_scale", number / logit_scale)


def check_positive(name: str, value: Coefficient) -> None:
    number = value_of(name, value)
    if number is not None and not 0.0 < number < math.inf:
        raise ValueError(f"{name} is {number}; it must be finite and above 0")
    if number is not None and not 1e-36 <= number <= 1e36:
        raise ValueError(f"{name} is {number}; it must be in [1e-36, 1e36], because kernels compute in fp32")


def check_divisor(name: str, value: Coefficient) -> None:
    """Check a divisor of logits: a temperature, a softcap."""
    check_positive(name, value)
    number = value_of(name, value)
    if number is not None and not 1e-20 <= number <= 1e20:
        raise ValueError(f"{name} is {number}; it must be in [1e-20, 1e20], because kernels compute in fp32")


def check_range(name: str, value: Coefficient, low: float, high: float) -> None:
    number = value_of(name, value)
    if number is not None and not low <= number <= high:  # not isfinite: torch.compile cannot trace it
        raise ValueError(f"{name} is {number}; it must be in [{low:g}, {high:g}]")


def check_number(name: str, value: object, what: str) -> None:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor; it is {what} and must be a number")


def check_coefficients(like: Tensor, like_name: str, **coefficients: Coefficient | None) -> None:
    """Check that coefficients that are tensors can be read where the op runs, and require no gradient."""
    for name, value in coefficients.items():
        if not isinstance(value, Tensor):
            continue
        value_of(name, value)
        if value.device.type != "cpu":  # the host can read a CPU tensor, whatever the device of the other tensors
            check_device(name, value, like, like_name)
        check_constant(name, value)


def check_constant(name: str, value: object) -> None:
    """Raise ValueError for an argument that requires a gradient and would silently receive none."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires a gradient, and the op gives it none; give {name}.detach()")


def value_of(name: str, value: Coefficient) -> float | None:
    """The value of a coefficient, or None if it must not be read here."""
    if not isinstance(value, Tensor):
        return value
    check_floating(name, value)
    check_shape(name, value, (), "a number, or a tensor without dimensions")
    return value.item() if _may_be_read(value) else None


def is_off(coefficient: Coefficient) -> bool:
    """Whether a term is left out; False for a tensor, which the host must not read."""
    return not isinstance(coefficient, Tensor) and coefficient == 0.0


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:  # float8, which torch calls floating, is not supported
        raise TypeError(
            f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected a floating dtype:"
            " torch.float32, bfloat16, float16 or float64"
        )


def check_precision(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Check that either both tensors are fp64 or none: no kernel computes in fp64, and silent rounding is an error."""
    if (tensor.dtype == torch.float64) != (like.dtype == torch.float64):
        raise TypeError(
            f"{name} has dtype {tensor.dtype} and {like_name} {like.dtype}; floating tensors of a call are all"
            " torch.float64 or none is: convert one of the two"
        )


def check_int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected torch.int64")


def check_not_expanded(name: str, tensor: Tensor) -> None:
    """Check a tensor that is written to."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} is expanded, strides {tensor.stride()}, but entries that are written share memory")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}: {meaning}")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {like_name} on {like.device}; they must be on the same device"
        )


def _may_be_read(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_batchedtensor(tensor)  # under vmap a tensor stands for many values
