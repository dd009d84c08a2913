"""The ops without gradients: GAE, sampling, attention of a decode step. Call them through `fastppo.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.ops import eager, registration
from fastppo.ops.arguments import (
    Coefficient,
    check_attention,
    check_coefficients,
    check_cu_seqlens,
    check_device,
    check_floating,
    check_int64,
    check_logits,
    check_mask,
    check_not_expanded,
    check_precision,
    check_range,
    check_scale,
    check_shape,
    check_starts,
    check_tokens,
    check_truncation,
)
from fastppo.ops.backend import by_eager, log_once_unless_compiling
from fastppo.ops.coefficients import numbers, overload

HOST = torch.device("cpu")


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: Coefficient,
    lam: Coefficient,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed sequences (Schulman et al. 2016, eq. 11 and 16).

    rewards, values: (M,) floating; cu_seqlens: (B+1,) int32 or int64, from 0 to M, never falling; gamma, lam in [0, 1];
    bootstrap: (B,) the value after the last token of each sequence, 0 if None; mask: (M,) bool, False skips a token:
    its reward and value are ignored, its outputs are 0, and the recurrence continues from the next unmasked token.
    gamma and lam may be tensors, (), on the CPU, which are read.
    Returns (advantages, returns), (M,) each, not differentiable: inputs are constants.
    """
    check_tokens("rewards", rewards, rewards)
    check_tokens("values", values, rewards, "rewards")
    check_mask(mask, rewards, "rewards")
    check_cu_seqlens(cu_seqlens, rewards)
    check_range("gamma", gamma, 0.0, 1.0)
    check_range("lam", lam, 0.0, 1.0)
    check_coefficients(rewards, "rewards", gamma=gamma, lam=lam)
    if bootstrap is not None:
        check_floating("bootstrap", bootstrap)
        check_precision("bootstrap", bootstrap, rewards, "rewards")
        check_shape("bootstrap", bootstrap, (cu_seqlens.shape[0] - 1,), "one value for each sequence of cu_seqlens")
        check_device("bootstrap", bootstrap, rewards, "rewards")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(
                f"{name} is on {value.device}, but the host must read it; give a number or a tensor on the CPU"
            )
    options = numbers(rewards, device=HOST, gamma=gamma, lam=lam)
    if by_eager(rewards) or rewards.device.type not in registration.GAE_DEVICES:
        log_once_unless_compiling(
            f"gae on {rewards.device} in {rewards.dtype}: reference Python, because fastppo._C has no kernel for that"
        )
        inputs: list[Any] = [None if x is None else x.detach() for x in (rewards, values, cu_seqlens, bootstrap, mask)]
        out = (_gae_by_oracle if torch.compiler.is_compiling() else _run_oracle)(*inputs, **options)
    else:
        dtype = torch.bfloat16 if rewards.dtype == values.dtype == torch.bfloat16 else torch.float32
        out = overload("gae", options["gamma"])(
            _dense(rewards, dtype),
            _dense(values, dtype),
            _dense(cu_seqlens, cu_seqlens.dtype),
            **options,
            bootstrap=None if bootstrap is None else _dense(bootstrap, torch.float32),
            mask=None if mask is None else _dense(mask, torch.bool),
        )
    advantages, returns = out.unbind()
    return advantages, returns


def _run_oracle(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    gamma: Coefficient,
    lam: Coefficient,
) -> Tensor:
    """`eager.gae` as one tensor, (2, M)."""
    check_starts(cu_seqlens, rewards.shape[0])
    discount = {"gamma": float(gamma), "lam": float(lam)}
    return torch.stack(eager.gae(rewards, values, cu_seqlens, **discount, bootstrap=bootstrap, mask=mask))


@torch.library.custom_op("fastppo::gae_by_oracle", mutates_args=())
def _gae_by_oracle(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
) -> Tensor:
    """The oracle as an op: it computes with Python numbers, which torch.compile cannot trace."""
    return _run_oracle(rewards, values, cu_seqlens, bootstrap, mask, gamma, lam)


@_gae_by_oracle.register_fake
def _(rewards: Tensor, values: Tensor, *arguments: Any) -> Tensor:
    return values.new_empty(2, rewards.shape[0], dtype=eager.statistics_dtype(values))


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Coefficient = 1.0,
    top_k: int = 0,
    top_p: float = 1,  # a default of 1.0 is to torch.compile a number that may change, and compiles twice
    seed: int,
    stream: Tensor,
    offset: Tensor | int,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature), or from what top_k and top_p keep of it.

    logits: (R, V) floating, each row with a finite entry, -inf for excluded tokens; seed: taken modulo 2^64; stream:
    (R,) int64, prompt index * n + sample index; offset: (R,) int64, or one int for all rows: the position of the token.
    The result of a row depends on its logits and (seed, stream, offset) only, bit for bit. The random number is that of
    Philox4x32-10 with key (seed) and counter (offset, stream): see `fastppo.ops.philox.uniform`. temperature may be a
    tensor, (). Returns tokens, (R,) int64, and their log probabilities, (R,) fp32, without gradients: those of the
    distribution that was drawn from.

    top_k: keep the k largest logits, and all that are equal to the k-th; 0 for all. top_p: of these keep the smallest
    set of the largest whose probability, at this temperature and among these, reaches top_p (Holtzman et al. 2020);
    1.0 for all. Of equal logits at its end those with the lowest index are in it, and only as many as are needed; the
    most likely token always is. It is found without a sort, by sums of probabilities in fp64. transformers' processors
    in fp64 keep the same number of tokens, with the same logits, but of equal ones at the end not always the first; at
    a probability that equals top_p up to rounding, either may keep a token more.
    """
    check_logits("logits", logits)
    check_scale(temperature, None)
    check_coefficients(logits, "logits", temperature=temperature)
    check_truncation(top_k, top_p)
    if isinstance(offset, int):
        offset = torch.full_like(stream, offset)
    for name, tensor in (("stream", stream), ("offset", offset)):
        check_int64(name, tensor)
        check_shape(name, tensor, (logits.shape[0],), "one number for each row of logits")
        check_device(name, tensor, logits, "logits")
    arguments: dict[str, Any] = {"logits": logits.detach(), "stream": stream, "offset": offset}
    arguments |= numbers(logits, temperature=temperature)
    if by_eager(logits):
        tokens, logprobs = eager.sample_tokens(**arguments, top_k=top_k, top_p=top_p, seed=seed)
    else:
        if top_k > 0 or top_p < 1.0:
            find = overload("truncation", arguments["temperature"])
            least, last = find(arguments["logits"], arguments["temperature"], top_k, top_p)
            arguments |= {"least": least, "last": last}
        if not -(2**63) <= seed < 2**63:
            seed = (seed + 2**63) % 2**64 - 2**63  # as an int64
        kernel = overload("sample_tokens", arguments["temperature"])
        as_tensor = isinstance(arguments["temperature"], Tensor)
        tokens, logprobs = kernel(**arguments, seed=torch.full((), seed, dtype=torch.int64) if as_tensor else seed)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(logprobs.isfinite().all()):
        row = int((~logprobs.isfinite()).nonzero()[0])
        raise ValueError(f"row {row} of logits contains NaN or +inf, or no finite entry: no token can be sampled")
    return tokens, logprobs


@torch.no_grad()
def accumulate(total: Tensor, part: Tensor) -> None:
    """total += part, with one pass over each although their dtypes may differ: gradients of microbatches in a sum.

    total: fp32, contiguous; part: fp32, bf16 or fp16, of the same shape and on the same device. Any number of
    dimensions. Nothing of it is differentiable.
    """
    check_shape("part", part, tuple(total.shape), "that of total")
    check_device("part", part, total, "total")
    if total.device.type != "cpu" or part.dtype == total.dtype:
        total.add_(part)  # on CUDA the kernel reads part as it is
    else:  # on the CPU it would be copied to the dtype of the sum first
        width = total.shape[-1] if total.ndim else 1
        torch.ops.fastppo.accumulate(total.view(-1, width), part.reshape(-1, width))


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    rows: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Append one position to each active row of a key/value cache, and attend to all positions of that row.

    query: (R, heads, D) fp32, bf16 or fp16; key, value: (R, kv heads, D), where heads is a multiple of kv heads;
    key_cache, value_cache: (rows, kv heads, T, D), written at position `lengths` of each row; lengths: (rows,) int64,
    number of positions, below T, not changed; rows: (R,) int64, index of each active row in the cache; window: number
    of newest positions attended to, 0 for all; softcap: s -> softcap tanh(s / softcap) on scores, 0 for none. Returns
    (R, heads, D), not differentiable. The result of a row does not depend on the other rows or on T, bit for bit. On
    the CPU numbers in lengths and rows that the cache has no place for raise ValueError; on CUDA, where the host does
    not read them, such a row is NaN, and nothing is written.
    """
    check_attention(
        scale, window, softcap, query=query, key=key, value=value, key_cache=key_cache, value_cache=value_cache
    )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_not_expanded(name, cache)
    query, key, value, key_cache, value_cache = (x.detach() for x in (query, key, value, key_cache, value_cache))
    if query.device.type not in ("cpu", "cuda"):
        log_once_unless_compiling(
            f"attend_cached on {query.device}: reference PyTorch, because its kernels are for the CPU and CUDA"
        )
        caches = (key_cache, value_cache)
        return eager.attend_cached(
            query, key, value, *caches, lengths, rows, scale=scale, window=window, softcap=softcap
        )
    query, key, value = (_rows_dense(x) for x in (query, key, value))
    keys, values = _rows_dense(key_cache), _rows_dense(value_cache)
    if keys is not key_cache or values is not value_cache:
        log_once_unless_compiling(
            "attend_cached: the cache is not contiguous in its last dimension, so it is copied to a buffer and back"
        )
    kernel = torch.ops.fastppo.attend_cached
    out: Tensor = kernel(
        query, key, value, keys, values, lengths.contiguous(), rows.contiguous(), scale, window, softcap
    )
    for cache, copy in ((key_cache, keys), (value_cache, values)):
        if copy is not cache:
            cache.copy_(copy)
    return out


def _rows_dense(x: Tensor) -> Tensor:
    """`x`, or a copy if it is not contiguous in its last dimension."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` detached, contiguous and in this dtype, for a kernel that is not differentiable."""
    if x.dtype == dtype and x.is_contiguous() and not x.requires_grad:
        return x  # the three calls below take longer than GAE of a thousand tokens
    return x.detach().to(dtype).contiguous()
