"""The ops over the vocabulary, beside eager PyTorch, torch.compile and, if installed, Liger-Kernel.

The ceiling of a forward pass is one read of the logits; of a backward pass one more read and a write; of a policy loss
its three matrix products. On a GPU they have the sizes of an 8B Llama.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from op_case import OpCase
from torch import Tensor

from fastppo import ops
from fastppo.ops import philox
from fastppo.ops.eager import restrict


class Sizes(NamedTuple):
    tokens: int
    vocabulary: int
    width: int
    rows: int  # of a decode step


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of SmolLM2's head, or on a GPU of an 8B Llama's with enough rows to fill the card.
SIZES = Sizes(256, 49_152, 576, 32) if DEVICE.type == "cpu" else Sizes(4096, 128_256, 4096, 256)
SMALL = Sizes(8, 512, 32, 4)
BLOCK = 128
TOP_P = 0.95


# Log probability and entropy


def eager_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def fastppo_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    stats = ops.token_logprobs(logits, targets)
    return stats.logprobs, stats.entropy


def both_passes(forward: Callable[..., Any], logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(forward(logits, targets), logits, (grad[0], grad[1]))[0]


def rows(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(sizes.tokens, sizes.vocabulary, device=DEVICE).to(dtype)
    return logits, torch.randint(sizes.vocabulary, (sizes.tokens,), device=DEVICE)


def rows_to_differentiate(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = rows(sizes, dtype)
    return logits.requires_grad_(), targets, torch.randn(2, sizes.tokens, device=DEVICE)


# Sampling


def eager_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Sampling by inverting the distribution function in two steps: the block that u is in, then the token."""
    x = logits.float()
    x = x - x.amax(-1, keepdim=True)
    e = x.exp().view(len(x), -1, BLOCK)
    block_cumulative = e.sum(-1).double().cumsum(-1)
    total = block_cumulative[:, -1:]
    threshold = philox.uniform(1, stream, offset)[:, None] * total
    block = (block_cumulative <= threshold).sum(-1, keepdim=True)
    before = torch.where(block > 0, block_cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    cumulative = e[torch.arange(len(x), device=x.device), block[:, 0]].double().cumsum(-1)
    prefix_states = cumulative[:, -1:].nextafter(torch.zeros_like(total))
    tokens = block * BLOCK + (cumulative <= torch.minimum(threshold - before, prefix_states)).sum(-1, keepdim=True)
    return tokens[:, 0], (x.gather(-1, tokens) - total.log())[:, 0].float()


def fastppo_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sample_tokens(logits, seed=1, stream=stream, offset=offset)


def sorted_nucleus_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The same draw after a sort of the vocabulary and sums of probabilities in fp64."""
    return fastppo_sample(restrict(logits, 1.0, 0, TOP_P), stream, offset)


def fastppo_nucleus_sample(logits: Tensor, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sample_tokens(logits, top_p=TOP_P, seed=1, stream=stream, offset=offset)


def rows_to_draw_from(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(sizes.rows, sizes.vocabulary, device=DEVICE).to(dtype)
    return logits, torch.arange(sizes.rows, device=DEVICE), torch.zeros(sizes.rows, dtype=torch.int64, device=DEVICE)


# The clipped loss from hidden states to their gradients, without a reference


def head_gradients(loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *tokens: Tensor) -> Any:
    return torch.autograd.grad(loss_of(hidden, weight, *tokens), [hidden, weight])


def eager_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    ratio = (log_p.gather(-1, targets[:, None])[:, 0] - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def fastppo_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    options = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2}
    normalizer = torch.tensor(float(len(hidden)), device=hidden.device)
    return ops.linear_policy_loss(hidden, weight, targets, old, advantages, **options, normalizer=normalizer)[0]


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The most similar loss there: GRPO's, with sequences of one token, so that each token has its own advantage."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=len(hidden), loss_type="bnpo")
    mask = torch.ones_like(targets)[:, None]
    return loss(hidden[:, None], weight, targets[:, None], mask, advantages, old_per_token_logps=old[:, None])[0]


def head(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    tokens, vocabulary, width, _ = sizes
    hidden = torch.randn(tokens, width, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(dtype).requires_grad_()
    old = torch.full((tokens,), -11.0, device=DEVICE)
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    return hidden, weight, targets, old, torch.randn(tokens, device=DEVICE)


# The statistics of a custom loss, with gradients


def eager_linear(hidden: Tensor, weight: Tensor, targets: Tensor, *tokens: Tensor) -> Tensor:
    logprobs, entropy = eager_forward(hidden @ weight.t(), targets)
    return (logprobs + entropy).sum()


def fastppo_linear(hidden: Tensor, weight: Tensor, targets: Tensor, *tokens: Tensor) -> Tensor:
    stats = ops.linear_logprobs(hidden, weight, targets)
    return (stats.logprobs + stats.entropy).sum()


LOSSES = {"eager": eager_loss, "compiled": torch.compile(eager_loss, dynamic=False), "fastppo": fastppo_loss}
if find_spec("liger_kernel"):
    LOSSES["liger"] = liger_loss
COMPILED_FORWARD = torch.compile(eager_forward, dynamic=False)
FORWARD = {"eager": eager_forward, "compiled": COMPILED_FORWARD, "fastppo": fastppo_forward}
LINEAR = {"eager": eager_linear, "compiled": torch.compile(eager_linear, dynamic=False), "fastppo": fastppo_linear}
SAMPLE = {"eager": eager_sample, "compiled": torch.compile(eager_sample, dynamic=False), "fastppo": fastppo_sample}
NUCLEUS = {
    "eager": sorted_nucleus_sample,
    "compiled": torch.compile(sorted_nucleus_sample, dynamic=False),
    "fastppo": fastppo_nucleus_sample,
}


def op_cases(*, small: bool = False) -> list[OpCase]:
    """small: only to see that they run."""
    sizes = SMALL if small else SIZES
    tokens, vocabulary, width, drawn = sizes
    row_bytes, products = tokens * vocabulary, 6 * tokens * vocabulary * width
    both = {name: functools.partial(both_passes, forward) for name, forward in FORWARD.items()}
    linear = {name: functools.partial(head_gradients, loss) for name, loss in LINEAR.items()}
    losses = {name: functools.partial(head_gradients, loss) for name, loss in LOSSES.items()}
    logits, to_differentiate, to_draw_from, heads = (
        functools.partial(made, sizes) for made in (rows, rows_to_differentiate, rows_to_draw_from, head)
    )
    return [
        OpCase("token_logprobs", "logprob + entropy, forward", FORWARD, logits, lambda size: row_bytes * size),
        OpCase(
            "token_logprobs", "logprob + entropy, forward and backward", both, to_differentiate,
            lambda size: 3 * row_bytes * size,
        ),
        OpCase(
            "sample_tokens", f"sample_tokens, {drawn} rows", SAMPLE, to_draw_from,
            lambda size: drawn * vocabulary * size,
        ),
        OpCase(
            "sample_tokens", f"sample_tokens with top_p {TOP_P}, {drawn} rows", NUCLEUS, to_draw_from,
            lambda size: drawn * vocabulary * size,
        ),
        OpCase(
            "linear_policy_loss", "linear_policy_loss, forward and backward", losses, heads,
            lambda size: 2 * vocabulary * width * size, products,
        ),
        OpCase(
            "linear_logprobs", "linear_logprobs, forward and backward", linear, heads,
            lambda size: 2 * vocabulary * width * size, products,
        ),
    ]  # fmt: skip
