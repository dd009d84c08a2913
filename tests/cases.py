"""The cases that every backend of an op is held to, and the rule by which.

A case builds its inputs in any dtype from fixed random numbers, so that the same numbers, rounded to that dtype, can be
given to the op under test, to `fastppo.ops.eager` in that dtype, and to `fastppo.ops.eager` in fp64: the truth.
The rule: an op's error is at most the reference's own in that dtype, plus a small tolerance.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# What may be added to a gradient, relative to its largest entry: in half precision two roundings of half a unit, since
# a gradient that is made in the forward pass is rounded before and after it is multiplied by the upstream one.
GRADIENT_ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True)
class VocabularyCase:
    """Logits, targets and perhaps a reference's logits: what the vocabulary pass reads."""

    name: str
    rows: int
    vocabulary: int
    values: str = "normal"  # what the logits are, see `logits`
    temperature: float = 1.0
    softcap: float | None = None
    reference: bool = False
    targets: str = "random"  # first, last: the first or the last column

    def __str__(self) -> str:
        return self.name

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def build(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `token_logprobs`."""
        random = self.generator()
        logits = self.logits(random)
        made: dict[str, Any] = {"targets": self.target_tokens(logits, random), "temperature": self.temperature}
        made |= {"logits": logits.to(dtype), "softcap": self.softcap}
        if self.reference:
            noise = torch.randn(logits.shape, generator=random, dtype=torch.float64)
            made["ref_logits"] = (logits + noise).to(dtype)  # -inf stays -inf
        return made

    def logits(self, random: torch.Generator) -> Tensor:  # (M, V) fp64
        shape = (self.rows, self.vocabulary)
        normal = 3.0 * torch.randn(shape, generator=random, dtype=torch.float64)
        if self.values in ("normal", "certain"):
            return normal
        if self.values == "negative":
            return normal - 50.0
        if self.values == "equal":
            return torch.full(shape, 2.5, dtype=torch.float64)
        if self.values == "huge":
            return 1e4 * normal.sign() + normal
        if self.values == "holes":  # a third of each row is -inf, the first and the last column are not
            holes = torch.rand(shape, generator=random, dtype=torch.float64) < 1 / 3
            holes[:, [0, -1]] = False
            return normal.masked_fill(holes, -torch.inf)
        assert self.values == "one finite"
        kept = torch.randint(self.vocabulary, (self.rows, 1), generator=random)
        return torch.full(shape, -torch.inf, dtype=torch.float64).scatter_(1, kept, normal.gather(1, kept))

    def target_tokens(self, logits: Tensor, random: torch.Generator) -> Tensor:  # (M,) int64, where p > 0
        if self.targets == "first":
            return torch.zeros(self.rows, dtype=torch.int64)
        if self.targets == "last":
            return torch.full((self.rows,), self.vocabulary - 1)
        if self.values in ("holes", "one finite"):
            return logits.argmax(-1)
        return torch.randint(self.vocabulary, (self.rows,), generator=random)

    def upstream(self, names: Iterable[str], stride0: bool = False) -> dict[str, Tensor]:
        """Gradients of the named outputs, (M,) fp64 each; `stride0` makes them one number, expanded."""
        random = torch.Generator().manual_seed(7)
        if stride0:
            return {name: torch.randn((), generator=random, dtype=torch.float64).expand(self.rows) for name in names}
        return {name: torch.randn(self.rows, generator=random, dtype=torch.float64) for name in names}


VOCABULARY_CASES = [
    VocabularyCase("no rows", 0, 127),
    VocabularyCase("no rows, reference", 0, 127, reference=True),
    VocabularyCase("one row, one token", 1, 1, reference=True),
    VocabularyCase("two tokens", 7, 2, reference=True),
    VocabularyCase("odd vocabulary", 255, 127, reference=True),
    VocabularyCase("GPT-2's vocabulary", 7, 50257, reference=True),
    VocabularyCase("Qwen's vocabulary", 2, 151936),
    VocabularyCase("one finite entry", 7, 127, values="one finite", reference=True),
    VocabularyCase("holes of -inf", 7, 127, values="holes", temperature=0.7, reference=True),
    VocabularyCase("all negative", 7, 127, values="negative", reference=True),
    VocabularyCase("all equal", 7, 127, values="equal"),
    VocabularyCase("first column", 7, 127, targets="first"),
    VocabularyCase("last column", 7, 50257, targets="last"),
    VocabularyCase("huge logits", 7, 127, values="huge", reference=True),
    VocabularyCase("softcap", 7, 127, softcap=5.0, temperature=1.3, reference=True),
    VocabularyCase("softcap, holes", 7, 127, values="holes", softcap=30.0, reference=True),
    VocabularyCase("cold", 255, 127, temperature=0.3, reference=True),
    VocabularyCase("hot", 7, 50257, temperature=2.0),
]


# Rows whose target has probability 1: at temperature t what is off by one in a logit's last bit is off by 1/t^2 here.
CERTAIN_CASES = [
    VocabularyCase(f"vocabulary {size}, softcap {cap}, temperature {t}", 9, size, "certain", t, cap)
    for size in (1, 127, 5000)
    for cap in (None, 30.0)
    for t in (0.3, 1e-3)
]


def certain(case: VocabularyCase) -> dict[str, Any]:
    """The case in fp32, its targets so far above the rest that all of the probability is theirs."""
    made = case.build(torch.float32)
    made["logits"] = made["logits"].scatter(1, made["targets"][:, None], made["logits"].amax(-1, keepdim=True) + 40)
    return made


@dataclass(frozen=True)
class LinearCase:
    """A head, and what a policy loss needs beside it."""

    name: str
    rows: int
    vocabulary: int
    hidden: int
    temperature: float = 1.0
    softcap: float | None = None
    bias: bool = False
    transposed: bool = False  # weights are a transposed view of (H, V)
    reference: str = ""  # own: another head; shared: another hidden state under the same weight
    mask: str = ""  # some, all dropped
    loss: tuple[tuple[str, Any], ...] = ()  # options of linear_policy_loss

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of `linear_logprobs`."""
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        scale = 2.0 * self.hidden**-0.5
        weight = (scale * normal(self.vocabulary, self.hidden)).to(dtype)
        hidden = normal(self.rows, self.hidden)
        made: dict[str, Any] = {
            "hidden": hidden.to(dtype),
            "weight": weight.t().contiguous().t() if self.transposed else weight,
            "targets": torch.randint(self.vocabulary, (self.rows,), generator=random),
            "temperature": self.temperature,
            "softcap": self.softcap,
            "bias": normal(self.vocabulary).to(dtype) if self.bias else None,
        }
        if self.reference:
            made["ref_hidden"] = (hidden + 0.3 * normal(self.rows, self.hidden)).to(dtype)
            own = weight + 0.1 * scale * normal(self.vocabulary, self.hidden)
            made["ref_weight"] = made["weight"] if self.reference == "shared" else own.to(dtype)
            made["ref_bias"] = normal(self.vocabulary).to(dtype) if self.bias else None
        return made

    def build_loss(self, dtype: torch.dtype, logprobs: Tensor) -> dict[str, Any]:
        """Arguments of `linear_policy_loss`, given the policy's true log probabilities.

        Ratios are e^-0.8, 1 and e^0.7: rounding the logits to `dtype` moves none of them over a clip, where loss and
        gradient jump.
        """
        random = torch.Generator().manual_seed(11)
        statistics = torch.promote_types(dtype, torch.float32)

        def normal() -> Tensor:
            return torch.randn(self.rows, generator=random, dtype=torch.float64)

        made = self.build(dtype) | {"clip_low": 0.2, "clip_high": 0.28}
        log_ratio = torch.tensor([-0.8, 0.0, 0.7], dtype=torch.float64)[torch.arange(self.rows) % 3]
        made["old_logprobs"] = (logprobs.double() - log_ratio).to(statistics)
        made["ref_logprobs"] = (logprobs.double() + 0.5 * normal()).to(statistics)
        made["advantages"] = normal().to(statistics)
        made["normalizer"] = torch.tensor(float(max(1, self.rows)))
        if self.mask:
            made["mask"] = torch.arange(self.rows) % 5 != 0 if self.mask == "some" else torch.zeros(self.rows).bool()
        return made | dict(self.loss)


LINEAR_CASES = [
    LinearCase("no rows", 0, 127, 8, bias=True, reference="own"),
    LinearCase("one row, one token", 1, 1, 4),
    LinearCase("two tokens", 7, 2, 4, bias=True, loss=(("entropy_coef", 0.1),)),
    LinearCase("plain", 255, 127, 32),
    LinearCase("GPT-2's vocabulary", 7, 50257, 16, mask="some", loss=(("dual_clip", 1.5),)),
    LinearCase("exact KL", 63, 127, 16, reference="own", bias=True, loss=(("kl_coef", 0.2), ("entropy_coef", 0.1))),
    LinearCase("exact KL, shared weight", 63, 127, 16, reference="shared", temperature=0.7, loss=(("kl_coef", 0.2),)),
    LinearCase("k2", 63, 127, 16, loss=(("kl_coef", 0.2), ("kl_kind", "k2"))),
    LinearCase("k3", 63, 127, 16, mask="some", loss=(("kl_coef", 0.2), ("kl_kind", "k3"), ("entropy_coef", 0.1))),
    LinearCase("softcap", 63, 127, 16, softcap=3.0, temperature=1.5, reference="own", loss=(("kl_coef", 0.2),)),
    LinearCase("transposed weight", 63, 127, 16, transposed=True, bias=True),
    LinearCase("every row dropped", 63, 127, 16, mask="all dropped", reference="own", loss=(("kl_coef", 0.2),)),
    LinearCase("cold", 63, 127, 16, temperature=0.3),
    LinearCase("hot", 63, 127, 16, temperature=2.0),
]


def in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64, for the truth."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim else x
        for name, x in arguments.items()
    }


def gradients(outputs: dict[str, Tensor], upstream: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """d(sum of upstream * output)/d(input) for each input."""
    pairs = [(outputs[name], g.to(outputs[name].dtype)) for name, g in upstream.items()]
    made = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [g for _, g in pairs])
    return {f"d_{name}": g for name, g in zip(inputs, made, strict=True)}


def assert_as_good(
    tested: dict[str, Tensor], same_dtype: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Each tested tensor is as near to the truth as the reference is in the same dtype, up to a small tolerance."""
    assert tested.keys() == truth.keys()
    for name, exact in truth.items():
        actual, eager = tested[name].double(), same_dtype[name].double()
        assert actual.shape == exact.shape, name
        if not exact.numel():
            continue
        finite = exact.isfinite()
        assert torch.equal(actual[~finite], exact[~finite]), f"{name}: infinite in other places"
        size = exact[finite].abs().max().item() if finite.any() else 0.0
        rounding = GRADIENT_ROUNDING[dtype] * size if name.startswith("d_") else TOLERANCE[dtype] * max(1.0, size)
        error = (actual - exact)[finite].abs().max().item() if finite.any() else 0.0
        own = (eager - exact)[finite].abs().nan_to_num(nan=0.0).max().item() if finite.any() else 0.0
        assert error <= own + rounding, (
            f"{name}: error {error:.3g}, the reference's {own:.3g}, tolerance {rounding:.3g}"
        )
