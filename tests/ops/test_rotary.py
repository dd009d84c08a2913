"""Rotary positions of queries and keys against fp64 truth: C++ at each level, and Triton."""

from dataclasses import dataclass, replace

import pytest
import torch
from csrc_calls import DTYPES, assert_repeats, names
from torch import Tensor
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from fastppo import ops
from fastppo.ops.layers import eager

ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Case:
    name: str
    rows: int = 1
    heads: int = 3
    kv_heads: int = 1
    positions: int = 5
    size: int = 64
    turned: int = 64
    interleaved: bool = False
    shared: bool = True  # positions, by all rows
    tokens_first: bool = True  # in memory, as a model's projections make them
    factors: torch.dtype | None = None  # dtype of cos and sin, if it is another one

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        def heads(count: int) -> Tensor:
            if self.tokens_first:
                return normal(self.rows, self.positions, count, self.size).to(dtype).transpose(1, 2)
            return normal(self.rows, count, self.positions, self.size).to(dtype)

        rows = 1 if self.shared else self.rows
        cos, sin = (normal(rows, self.positions, self.turned).to(self.factors or dtype) for _ in range(2))
        return {"q": heads(self.heads), "k": heads(self.kv_heads), "cos": cos, "sin": sin}


CASES = [
    Case("llama"),
    Case("two rows", rows=2, shared=False),
    Case("two rows at the same positions", rows=2),
    Case("heads first", rows=2, tokens_first=False),
    Case("decode", rows=4, positions=1, shared=False),
    Case("wide", size=128, turned=128),
    Case("phi-3", size=96, turned=96),
    Case("phi-2, a part", size=80, turned=32),
    Case("a small part", size=20, turned=6),
    Case("nothing", size=20, turned=0),
    Case("one pair", size=2, turned=2),
    Case("fp32 factors", factors=torch.float32),
    Case("no tokens", positions=0),
    Case("no keys", kv_heads=0),
]
CASES += [replace(case, name=f"{case.name}, interleaved", interleaved=True) for case in CASES]
# A dtype changes how a number is read and rounded, not where it is: all cases in fp32, and a few in the others.
HALF_CASES = [
    case
    for case in CASES
    if case.name.removesuffix(", interleaved") in ("llama", "two rows", "a small part", "fp32 factors")
]
BY_TRITON = [(case, dtype) for dtype in DTYPES for case in (CASES if dtype == torch.float32 else HALF_CASES)]


def both_passes(module, given: dict[str, Tensor], interleaved: bool) -> list[Tensor]:
    q, k = (given[name].detach().requires_grad_() for name in ("q", "k"))
    outputs = module.rotary(q, k, given["cos"], given["sin"], interleaved=interleaved)
    grads = [x.detach().flip(-1) for x in (q, k)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, [q, k], grads)]


def check(case: Case, dtype: torch.dtype, units: float = 1.01) -> None:
    given = case.build(dtype)
    truth = both_passes(eager, {name: x.double() for name, x in given.items()}, case.interleaved)
    made = both_passes(ops, given, case.interleaved)
    for x, y in zip(made, truth, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=units * ROUNDING[dtype], atol=4 * ROUNDING[torch.float32])
    for x, name in zip(made, ("q", "k"), strict=False):
        assert x.numel() == 0 or case.positions == 1 or x.stride() == given[name].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_truth_rounded_once(case, dtype, level):
    check(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), BY_TRITON, ids=str)
@pytest.mark.usefixtures("triton_on_cpu")
def test_triton_gives_the_truth(case, dtype):
    check(case, dtype, 2.02)  # the interpreter cuts bf16 numbers off


@pytest.mark.parametrize(("model", "interleaved"), [(modeling_llama, False), (modeling_glm, True)])
def test_it_computes_what_a_model_computes(model, interleaved, backend):
    given = Case("model", rows=2, shared=False).build(torch.float32)
    if interleaved:  # GLM repeats half of the factors
        given |= {name: given[name][..., :32].repeat(1, 1, 2) for name in ("cos", "sin")}
    expected = model.apply_rotary_pos_emb(**given)
    if interleaved:
        given |= {name: given[name][..., :32].repeat_interleave(2, -1) for name in ("cos", "sin")}
    torch.testing.assert_close(ops.rotary(**given, interleaved=interleaved), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_and_positions_do_not_depend_on_their_neighbours_or_on_threads(interleaved, dtype, level):
    given = Case("many", rows=2, heads=9, kv_heads=3, positions=50, size=80, turned=80).build(dtype)
    assert_repeats(lambda: both_passes(ops, given, interleaved))
    q, k, q_grad, k_grad = both_passes(ops, given, interleaved)
    for row, position in ((0, 0), (1, 33), (1, 49)):
        at = {name: x[row : row + 1, 2:3, position : position + 1] for name, x in given.items() if name in "qk"}
        at |= {name: given[name][:, position : position + 1] for name in ("cos", "sin")}
        alone = both_passes(ops, at, interleaved)
        for x, y in zip(alone, (q, k, q_grad, k_grad), strict=True):
            assert torch.equal(x[0, :, 0], y[row, 2:3, position])


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_large_output_that_goes_past_the_caches_is_the_same_as_its_parts(interleaved, dtype, level):
    given = Case("large", heads=36, kv_heads=4, positions=1024).build(dtype)
    whole = both_passes(ops, given, interleaved)
    for start in range(0, 1024, 256):
        at = slice(start, start + 256)
        part = {name: x[:, :, at] if name in "qk" else x[:, at] for name, x in given.items()}
        for x, y in zip(both_passes(ops, part, interleaved), whole, strict=True):
            assert torch.equal(x, y[:, :, at])


def test_queries_and_keys_may_be_parts_of_a_joined_projection(backend):
    """As Phi-3 makes them: heads of q, k and v side by side in each position."""
    joined = torch.randn(1, 5, 6, 64)
    q, k = joined[:, :, :4].transpose(1, 2), joined[:, :, 4:5].transpose(1, 2)
    factors = [torch.randn(1, 5, 64) for _ in range(2)]
    made = ops.rotary(q, k, *factors)
    torch.testing.assert_close(made, eager.rotary(q, k, *factors))
    assert all(x.transpose(1, 2).is_contiguous() for x in made)


def test_nothing_but_cos_and_sin_is_saved():
    saved = []
    given = Case("saved").build(torch.bfloat16)
    q, k = (given[name].requires_grad_() for name in ("q", "k"))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        ops.rotary(q, k, given["cos"], given["sin"])
    assert set(saved) == {given["cos"].data_ptr(), given["sin"].data_ptr()}


WRONG = [
    ("q", lambda x: x[0], ValueError, r"q has shape \(3, 5, 64\); expected \(B, heads, N, D\)"),
    ("k", lambda x: x[..., :32], ValueError, r"k has shape \(1, 1, 5, 32\); expected \(1, kv heads, 5, 64\)"),
    ("k", lambda x: x[:, :, 1:], ValueError, r"k has shape \(1, 1, 4, 64\)"),
    ("k", lambda x: x.half(), TypeError, "k has dtype torch.float16 and q torch.float32"),
    ("k", lambda x: x.to("meta"), ValueError, "k is on meta and q on cpu"),
    ("cos", lambda x: x[0], ValueError, r"cos has shape \(5, 64\); expected \(1 or 1, 5, R\)"),
    ("cos", lambda x: x.expand(3, -1, -1), ValueError, r"cos has shape \(3, 5, 64\)"),
    ("sin", lambda x: x[..., :63], ValueError, r"sin has shape \(1, 5, 63\); its last size must be even"),
    ("cos", lambda x: x.repeat(1, 1, 2), ValueError, r"cos has shape \(1, 5, 128\); .* at most q's, 64"),
    ("sin", lambda x: x[..., :32], ValueError, r"sin has shape \(1, 5, 32\) and cos \(1, 5, 64\)"),
    ("sin", lambda x: x.half(), TypeError, "sin has dtype torch.float16 and cos torch.float32"),
    ("cos", lambda x: x.double(), TypeError, "cos has dtype torch.float64 and q torch.float32"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG)
def test_a_wrong_argument_is_named(name, change, error, message):
    given = Case("wrong").build(torch.float32)
    with pytest.raises(error, match=message):
        ops.rotary(**(given | {name: change(given[name])}))


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, change, *_ in WRONG if name != "k"])
def test_the_kernel_itself_refuses_what_it_cannot_read(name, change):
    given = Case("wrong").build(torch.float32)
    with pytest.raises(ValueError, match=f"{name} has|(cos|sin) has"):
        torch.ops.fastppo.rotary(*(given | {name: change(given[name])}).values(), False, False)
