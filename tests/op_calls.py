"""A call of every op behind the door, of any size and dtype, for tests that walk over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastppo import ops

# Outputs that carry gradients; all others are constants.
DIFFERENTIABLE: dict[str, tuple[int, ...]] = {
    "gae": (),
    "token_logprobs": (0, 1, 2, 5),
    "linear_logprobs": (0, 1, 2, 5),
    "policy_loss": (0,),
    "linear_policy_loss": (0,),
    "value_loss": (0,),
    "sample_tokens": (),
    "attend_cached": (),
    "rms_norm": (0, 1),
    "swiglu": (0,),
    "geglu": (0,),
    "rotary": (0, 1),
}
OPS = tuple(DIFFERENTIABLE)
TRAINED = tuple(op for op, outputs in DIFFERENTIABLE.items() if outputs)
LEAVES = (
    "logits",
    "hidden",
    "weight",
    "bias",
    "logprobs",
    "entropy",
    "kl",
    "values",
    "x",
    "residual",
    "gate",
    "up",
    "q",
    "k",
)
SOFTCAP = {"softcap": 5.0}
CONSTANTS: dict[str, dict[str, Any]] = {  # of a model
    "token_logprobs": SOFTCAP,
    "linear_logprobs": SOFTCAP,
    "linear_policy_loss": SOFTCAP,
    "attend_cached": SOFTCAP | {"scale": 0.25, "window": 3},
    "geglu": {"approximate": "tanh"},
    "rms_norm": {"eps": 1e-5, "offset": 1.0, "round_first": False},
}
CACHES = ("key_cache", "value_cache")
WIDTH, KV_HEADS, ROWS = 17, 20, 30  # no number of tokens below


@dataclass(frozen=True)
class Call:
    op: str
    arguments: dict[str, Any]  # without coefficients
    coefficients: dict[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        if self.op not in TRAINED:
            return {}
        return {name: x for name, x in self.arguments.items() if name in LEAVES}

    def all(self) -> dict[str, Any]:
        """Arguments of the op, caches copied, and leaves that require gradients; strides as they are."""
        return self.plain() | {name: x.detach().requires_grad_() for name, x in self.leaves().items()}

    def plain(self) -> dict[str, Any]:
        """The same, where nothing requires gradients."""
        made = {name: x.detach() if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        made |= {name: copy_of(made[name]) for name in CACHES if name in made}
        return made | self.coefficients


def copy_of(x: Tensor) -> Tensor:
    """With the strides of `x`, whatever they are."""
    room = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return x.new_zeros(room).as_strided(x.shape, x.stride()).copy_(x)


def make(
    op: str, tokens: int, vocabulary: int = 33, dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS
) -> Call:
    random = torch.Generator().manual_seed(1000 * tokens + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    targets = torch.randint(vocabulary, (tokens,), generator=random)
    mask = torch.arange(tokens) % 3 != 1
    per_token = {"normalizer": torch.tensor(float(tokens)), "mask": mask}
    policy = {"old_logprobs": normal(tokens), "advantages": normal(tokens)} | per_token
    head = {"hidden": normal(tokens, WIDTH), "weight": normal(vocabulary, WIDTH), "bias": normal(vocabulary)}
    ref = {"ref_hidden": normal(tokens, WIDTH), "ref_weight": normal(vocabulary, WIDTH), "ref_bias": normal(vocabulary)}
    head |= ref | {"targets": targets} | SOFTCAP
    clips = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.1, "kl_coef": 0.2}
    if op == "gae":
        starts = torch.tensor([0, 1, tokens])
        given = {"rewards": normal(tokens), "values": normal(tokens), "cu_seqlens": starts, "mask": mask}
        return Call(op, given | {"bootstrap": normal(2)}, {"gamma": 0.9, "lam": 0.8})
    if op == "token_logprobs":
        given = {"logits": normal(tokens, vocabulary), "ref_logits": normal(tokens, vocabulary), "targets": targets}
        return Call(op, given | SOFTCAP, {"temperature": 0.7})
    if op == "linear_logprobs":
        return Call(op, head, {"temperature": 0.7})
    if op == "policy_loss":
        given = {"logprobs": normal(tokens), "entropy": normal(tokens), "kl": normal(tokens)}
        return Call(op, given | policy, clips)
    if op == "linear_policy_loss":
        return Call(op, head | policy, clips | {"temperature": 0.7})
    if op == "value_loss":
        given = {"values": normal(tokens), "old_values": normal(tokens), "returns": normal(tokens)}
        return Call(op, given | per_token, {"clip": 0.2})
    if op == "sample_tokens":
        stream = torch.arange(tokens)
        given = {"logits": normal(tokens, vocabulary), "stream": stream, "offset": stream + 3, "seed": 11}
        return Call(op, given, {"temperature": 0.7})
    if op == "rms_norm":
        rows = {name: normal(tokens, 2, WIDTH) for name in ("x", "residual")}
        return Call(op, rows | {"weight": normal(WIDTH)} | CONSTANTS[op], {})
    if op in ("swiglu", "geglu"):
        rows = {name: normal(tokens, vocabulary) for name in ("gate", "up")}
        return Call(op, rows | CONSTANTS.get(op, {}), {})
    if op == "rotary":
        given = {"q": normal(2, 3, tokens, 8), "k": normal(2, 1, tokens, 8)}
        return Call(op, given | {"cos": normal(1, tokens, 6), "sin": normal(1, tokens, 6)}, {})
    assert op == "attend_cached"
    given = {"query": normal(tokens, 2 * kv_heads, 16), "key": normal(tokens, kv_heads, 16)}
    given |= {"value": normal(tokens, kv_heads, 16)}
    given |= {name: normal(ROWS, kv_heads, vocabulary, 16) for name in CACHES}
    given |= {"lengths": torch.arange(ROWS) % vocabulary, "rows": torch.arange(tokens).flip(0)}
    return Call(op, given, dict(CONSTANTS[op]))


def outputs_of(op: str, arguments: dict[str, Any], run: Any = None) -> list[Tensor | None]:
    """Every output in its place; of a named tuple within, its members."""
    made = (run or getattr(ops, op))(**arguments)
    flat: list[Tensor | None] = []
    for x in made if isinstance(made, tuple) else (made,):
        flat.extend(x if isinstance(x, tuple) else (x,))
    return flat


def results(call: Call, run: Any = None, upstream: str = "dense") -> list[Tensor]:
    """Outputs, gradients of the leaves, and caches after the call. `run` is the op with its constants bound, `upstream`
    how incoming gradients lie."""
    arguments = call.all()
    given = (
        arguments
        if run is None
        else {name: x for name, x in arguments.items() if name not in CONSTANTS.get(call.op, ())}
    )
    outputs = outputs_of(call.op, given, run)
    carrying = [x for i in DIFFERENTIABLE[call.op] if (x := outputs[i]) is not None]
    leaves = [arguments[name] for name in call.leaves()]
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        grads = [incoming(x, upstream) for x in carrying]
        gradients = torch.autograd.grad(carrying, leaves, grads, allow_unused=True, materialize_grads=True)
    caches = [arguments[name] for name in CACHES if name in arguments]
    return [*(x.detach() for x in outputs if x is not None), *gradients, *caches]


def incoming(output: Tensor, layout: str) -> Tensor:
    """A gradient like the output: its entries side by side or apart, or all one number that stands once in memory."""
    if layout == "expanded":
        return output.new_full((), 0.3).expand(output.shape)
    made = torch.linspace(-1, 1, max(1, output.numel()), dtype=output.dtype).reshape(output.shape)
    return torch.stack((made, made), -1)[..., 0] if layout == "apart" else made
