"""Every op as torch.library knows it: opcheck, torch.compile without a graph break, and the head that runs them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LinearCase, VocabularyCase
from torch import Tensor, nn

from fastppo import ops
from fastppo.models.roles import FusedHead
from fastppo.ops import registration
from fastppo.ops.coefficients import COEFFICIENTS

M, V, H = 6, 33, 8
ONE = torch.tensor(4.0)
TOKENS = torch.linspace(-1.5, -0.5, M)
CASE = VocabularyCase("library", M, V, reference=True, softcap=5.0)
SCALE = (0.7, 5.0)


def logits(dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return CASE.build(dtype)["logits"].requires_grad_(grad)


def head(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets"""
    made = LinearCase("library", M, V, H, bias=True).build(dtype)
    hidden, weight, bias = (made[name].requires_grad_(grad) for name in ("hidden", "weight", "bias"))
    return hidden, weight, bias, made["targets"]


def stats_of(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.ops.fastppo.vocabulary_forward(logits, targets, *SCALE, None).detach()


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    made = CASE.build(dtype)
    targets, ref = made["targets"], made["ref_logits"]
    hidden, weight, bias, head_targets = head(dtype, grad=True)
    plain = logits(dtype)
    loss_options = (0.2, 0.2, 1.5, 0.1, 0.2)
    mask = torch.arange(M) != 2
    tokens = (TOKENS, TOKENS.flip(0), TOKENS)
    grown = TOKENS.clone().requires_grad_()
    linear_stats = torch.ops.fastppo.linear_logprobs(*head(dtype), None, None, None, *SCALE, 1 << 20)
    no_reference = (None, None, None)
    rows = torch.randn(3, 2, 17).to(dtype).requires_grad_()
    of_column = torch.randn(17).to(dtype).requires_grad_()
    return (
        {
            "vocabulary_forward": (logits(dtype, grad=True), targets, *SCALE, None),
            "vocabulary_forward, reference": (logits(dtype, grad=True), targets, *SCALE, ref),
            "vocabulary_backward": (
                plain,
                targets,
                stats_of(plain, targets),
                torch.ones(4, M),
                *SCALE,
                None,
                plain.clone(),
            ),
            "policy_loss_in_chunk": (
                plain,
                targets,
                *tokens[1:],
                ONE,
                *SCALE,
                *loss_options,
                "k3",
                TOKENS,
                None,
                mask,
                True,
                torch.zeros(8, M),
            ),
            "policy_loss": (
                grown,
                TOKENS,
                TOKENS.flip(0),
                TOKENS.clone().requires_grad_(),
                None,
                mask,
                ONE,
                0.2,
                0.2,
                1.5,
                0.1,
                0.0,
            ),
            "sum_tokens": (torch.rand(8, M), 0.1, 0.2, ONE),
            "scale_gradient": (torch.rand(V, H).to(dtype), ONE),
            "value_loss": (grown, TOKENS.flip(0), TOKENS + 1, mask, ONE, 0.2),
            "truncation": (plain[:2], 0.7, 3, 0.9),  # it reads a row often, which takes the interpreter long
            "sample_tokens": (plain, torch.arange(M), torch.arange(M), 0.7, 11),
            "sample_tokens, truncated": (plain, *[torch.arange(M)] * 2, 0.7, 11, torch.zeros(M), torch.arange(M)),
            "accumulate": (torch.zeros(V, H), weight.detach()),
            "linear_logprobs": (hidden, weight, bias, head_targets, *no_reference, *SCALE, 1 << 20),
            "linear_logprobs_backward": (
                *head(dtype),
                *no_reference,
                linear_stats,
                torch.ones(4, M),
                *SCALE,
                1 << 20,
                [True, True, False],
            ),
            "linear_policy_loss": (
                hidden,
                weight,
                bias,
                head_targets,
                *tokens[1:],
                ONE,
                mask,
                TOKENS,
                *no_reference,
                *SCALE,
                *loss_options,
                "k2",
                1 << 20,
                [True, True, True],
            ),
            "attend_cached": (
                *(torch.randn(2, 4, 16).to(dtype) for _ in range(3)),
                *(torch.randn(3, 4, 9, 16).to(dtype) for _ in range(2)),
                torch.tensor([0, 4, 2]),
                torch.tensor([2, 1]),
                0.25,
            ),
            "rms_norm": (rows, of_column, 1e-5, None, 0.0, True),
            "rms_norm, residual": (rows, of_column, 1e-5, rows.detach(), 1.0, False),
            "rms_norm_backward": (*[rows.detach()] * 3, of_column.detach(), 1e-5, 1.0, True),
            "rms_norm_backward, frozen weight": (
                rows.detach(),
                None,
                rows.detach(),
                of_column.detach(),
                1e-5,
                1.0,
                False,
            ),
        }
        | layer_arguments(dtype)
    )


def layer_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    gate, up, joined = (torch.randn(2, 3, width).to(dtype).requires_grad_() for width in (16, 16, 32))
    grad = torch.randn(2, 3, 16).to(dtype)
    q, k = (torch.randn(2, 5, heads, 8).to(dtype).transpose(1, 2).requires_grad_() for heads in (3, 1))
    cos, sin = torch.randn(2, 1, 5, 6).to(dtype)
    return {
        "swiglu": (gate, up),
        "swiglu, joined": (joined, None),
        "geglu": (gate, up, "tanh"),
        "glu_backward": (grad, gate.detach(), up.detach(), "gelu"),
        "glu_backward, joined": (grad, joined.detach(), None, "silu"),
        "rotary": (q, k, cos, sin, False, False),
        "rotary, transposed": (q, k.detach().contiguous(), cos, sin, True, True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", arguments(torch.float32))
@pytest.mark.usefixtures("backend")
def test_opcheck(op, dtype):
    torch.library.opcheck(getattr(torch.ops.fastppo, op.partition(",")[0]).default, arguments(dtype)[op])


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", [op for op in arguments(torch.float32) if op.partition(",")[0] in registration.WITH_COEFFICIENTS]
)
@pytest.mark.usefixtures("backend")
def test_opcheck_with_coefficients_in_tensors(op):
    overload = getattr(torch.ops.fastppo, op.partition(",")[0]).tensors
    given = [
        torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else torch.int64)
        if argument.name in COEFFICIENTS and x is not None
        else x
        for argument, x in zip(overload._schema.arguments, arguments(torch.float32)[op], strict=False)
    ]
    torch.library.opcheck(overload, tuple(given))


def loss_of(head: FusedHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """A policy update and, so that both are compiled, log probabilities and a value loss."""
    stats = head(hidden, ops.linear_logprobs, targets, temperature=0.7)
    options = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.2, "normalizer": ONE, "entropy_coef": 0.1}
    loss, sums = head(hidden, ops.linear_policy_loss, targets, TOKENS, TOKENS.flip(0), **options)
    token_options = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": ONE}
    token_loss, _ = ops.policy_loss(stats.logprobs, TOKENS, TOKENS, **token_options)
    value_loss, _ = ops.value_loss(stats.entropy, TOKENS, TOKENS, clip=0.2, normalizer=ONE)
    return loss + token_loss + value_loss + 0 * sums.sums.sum()


def head_module(dtype: torch.dtype = torch.float32) -> tuple[FusedHead, Tensor, Tensor]:
    hidden, weight, bias, targets = head(dtype)
    return FusedHead(nn.Parameter(weight), nn.Parameter(bias), softcap=5.0), hidden.requires_grad_(), targets


def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
    module, hidden, targets = head_module()
    loss = run(module, hidden, targets)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, module.weight, module.bias])]


def test_the_head_compiles_without_a_graph_break():
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(loss_of))


def test_sampling_compiles_without_a_graph_break():
    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.sample_tokens(x, seed=1, stream=torch.arange(M), offset=3)

    torch.testing.assert_close(torch.compile(draw, fullgraph=True, backend="aot_eager")(logits()), draw(logits()))


def test_the_head_under_activation_checkpointing_has_the_same_gradients():
    def checkpointed(*inputs: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(loss_of, *inputs, use_reentrant=False)

    torch.testing.assert_close(gradients(checkpointed), gradients(loss_of))


def test_the_head_under_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weight_s():
    module, hidden, targets = head_module()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(module, hidden, targets)
    found = torch.autograd.grad(loss, [hidden, module.weight, module.bias])
    assert all(g.dtype == torch.float32 for g in found)
    half, hidden_half, _ = head_module(torch.bfloat16)
    expected = torch.autograd.grad(loss_of(half, hidden_half, targets), [hidden_half, half.weight, half.bias])
    torch.testing.assert_close(found, [g.float() for g in expected], rtol=2e-2, atol=2e-3)  # hidden sums in fp32


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    embedding = nn.Embedding(V, H)
    module = FusedHead(embedding.weight, None, softcap=None)
    targets = torch.arange(M)
    loss_of(module, embedding(targets), targets).backward()
    hidden = embedding(targets).detach().requires_grad_()
    d_hidden, d_weight = torch.autograd.grad(loss_of(module, hidden, targets), [hidden, module.weight])
    torch.testing.assert_close(embedding.weight.grad, d_weight.index_add(0, targets, d_hidden))


class Tied(nn.Module):
    """An embedding and the head on its weight, called as the trainer calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.head = FusedHead(self.embedding.weight, None, softcap=None)

    def forward(self, tokens: Tensor) -> Tensor:
        return loss_of(self.head, self.embedding(tokens), tokens)


def test_deepspeed_s_hooks_gather_the_head_s_weight_and_reduce_its_gradient():
    """Under ZeRO-3 a weight is there in its module's own passes alone. One SGD step equals torch's."""
    import deepspeed

    from fastppo.distributed.world import start_world

    start_world(1)
    torch.manual_seed(0)
    tokens, plain = torch.arange(M), Tied()
    sharded = copy.deepcopy(plain)
    plain(tokens).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    settings |= {"zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizer, config=settings, dist_init_required=False)
    engine.backward(engine(tokens))
    engine.step()
    with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
        torch.testing.assert_close(sharded.embedding.weight, plain.embedding.weight)
